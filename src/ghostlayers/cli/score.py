"""`ghostlayers score`."""

from pathlib import Path
from typing import Annotated

from ghostlayers import pipeline
from ghostlayers.checkpoint.record import table_to_dict
from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.shell import shared_command, write_json
from ghostlayers.errors import RecipeError
from ghostlayers.recipe import RunOptions
from ghostlayers.report.heatmap import check_can_draw, draw_heatmap
from ghostlayers.runtime.files import check_can_write
from ghostlayers.runtime.parallel import world


@shared_command
def score(
    model: o.Model,
    layers: o.Layers = None,
    repair: o.RepairOption = None,
    cosine_axis: o.CosineAxisOption = None,
    data: o.Data = None,
    text_column: o.TextColumn = None,
    separator: o.Separator = None,
    windows: o.WindowsOption = None,
    held_out_windows: o.HeldOutWindows = None,
    sequence_length: o.SequenceLength = None,
    bos: o.Bos = None,
    seed: o.Seed = None,
    token_weight: o.TokenWeightOption = None,
    json_file: o.Json = None,
    png: Annotated[
        Path | None, o._option("--png", text="Also draw the heat map into this file.")
    ] = None,
    overwrite: o.OverwriteFile = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = 0,
    offload: o.OffloadOption = "auto",
    max_memory: o.MaxMemory = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    debug: o.Debug = False,
) -> None:
    """Score every layer, and every span of N layers: cosine, residual, loss after repair."""
    del debug, overwrite  # see `claims`
    check_can_write(json_file)
    check_can_draw(png)
    if layers is None:
        raise RecipeError(
            "say how many layers to remove (--layers): every span of that length is scored."
        )
    recipe = o.recipe_from(
        None,
        separator,
        layers=layers,
        repair=repair,
        cosine_axis=cosine_axis,
        data=data,
        text_column=text_column,
        windows=windows,
        held_out_windows=held_out_windows,
        sequence_length=sequence_length,
        bos=bos,
        seed=seed,
        token_weight=token_weight,
    )
    screen.step(f"Loading {model} ...")
    table = pipeline.score(
        model,
        recipe,
        options=RunOptions(dtype, device, batch_size, trust_remote_code, offload, max_memory),
        revision=revision,
        show_text=screen.show_text,
        progress=screen.Bars(),
    )
    screen.show_block_influence(table)
    screen.show_spans(table.spans, table, f"Every span of {len(table.spans[0].span)} layers")
    screen.show_score_notes()
    if json_file is not None:
        write_json(json_file, table_to_dict(table))
    if png is not None and world().leads:
        draw_heatmap(table, png, title=model)
        screen.say(f"Heat map: {png}")
