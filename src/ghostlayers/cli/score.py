"""`ghostlayers score`."""

from pathlib import Path
from typing import Annotated

from ghostlayers import pipeline
from ghostlayers.checkpoint.record import table_to_dict
from ghostlayers.cli import options as o
from ghostlayers.cli import scores_screen, screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import shared_command, write_json
from ghostlayers.errors import RecipeError, counted
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.report.heatmap import check_can_draw, draw_heatmap
from ghostlayers.runtime.parallel import world


@shared_command
def score(
    model: o.Model,
    recipe: Annotated[
        Recipe,
        Fields(
            "layers smaller faster at speed fits context as_type repair cosine_axis data "
            "text_column separator windows held_out_windows sequence_length bos seed token_weight",
            make=o.recipe_from,
        ),
    ],
    options: Annotated[
        RunOptions, Fields(f"json_file png overwrite {o.RUN} revision trust_remote_code")
    ],
    json_file: o.Json = None,
    png: Annotated[
        Path | None, o.option("--png", text="Also draw the heat map into this file.")
    ] = None,
    overwrite: o.OverwriteFile = False,
    revision: o.Revision = None,
) -> None:
    """Score every layer, and every span of N layers: cosine, residual, loss after repair."""
    del overwrite  # see `claims`
    check_can_draw(png)
    if recipe.layers is None and recipe.wish is None:
        raise RecipeError(
            "say how many layers to remove (--layers), or a budget such as --smaller 20%: every "
            "span of that length is scored."
        )
    screen.step(f"Loading {model} ...")
    table = pipeline.score(
        model,
        recipe,
        options=options,
        revision=revision,
        show_text=screen.show_text,
    )
    scores_screen.show_block_influence(table)
    scores_screen.show_spans(
        table.spans, table, f"Every span of {counted(len(table.spans[0].span), 'layer')}"
    )
    scores_screen.show_score_notes()
    if json_file is not None:
        write_json(json_file, table_to_dict(table))
    if png is not None and world().leads:
        draw_heatmap(table, png, title=model)
        screen.say(f"Heat map: {png}")
