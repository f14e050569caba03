"""`ghostlayers heal`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers import heal_pipeline
from ghostlayers.calibration import journal
from ghostlayers.checkpoint import records
from ghostlayers.cli import heal_screen, screen
from ghostlayers.cli import options as o
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.prune import kept_folder
from ghostlayers.cli.shell import shared_command
from ghostlayers.errors import RecipeError
from ghostlayers.healed import Save, check_save
from ghostlayers.healing.sharding_checks import check_sharding, options_for_shards
from ghostlayers.preparation import open_model
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.runtime.outputs import check_output
from ghostlayers.runtime.settings import WHAT

ASKED = (
    "train tokens minutes loss learning_rate positions completions preset rank modules "
    "step_tokens cache save overwrite data held_out held_out_windows text_column separator "
    "sequence_length bos seed"
)
"""Fields of the recipe, as help shows them."""


def healing_from(**values: object) -> HealingRecipe:
    """A recipe of the options that were given.

    Raises:
        RecipeError: no text is named.
    """
    if values.get("data") is None:
        raise RecipeError(
            "no training text: give --data a file of yours, or the name of a corpus on the hub "
            "(c4), several with their shares as c4:0.7,mine.jsonl:0.3."
        )
    return HealingRecipe.from_dict(values)


@shared_command
def heal(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A folder that prune made, or an adapter's."),
    ],
    against: Annotated[
        str,
        o.option("--against", metavar="MODEL", text="The dense model that it was cut from."),
    ],
    output: o.Out,
    recipe: Annotated[HealingRecipe, Fields(ASKED, make=healing_from)],
    options: Annotated[RunOptions, Fields(f"{o.RUN} keep keep_worse restart plan")],
    save: Annotated[
        Save,
        o.option(
            "--save",
            text="Write the whole model, only what distinguishes it from its dense one, or the "
            "adapters of --train lora for the cut checkpoint, as PEFT has them. "
            "[default: checkpoint]",
            panel=WHAT,
        ),
    ] = "checkpoint",
    overwrite: o.Overwrite = False,
    keep: Annotated[
        bool,
        o.option(
            "--keep",
            text="Train no further: write the best state of an interrupted run. [default: off]",
        ),
    ] = False,
    keep_worse: Annotated[
        bool,
        o.option(
            "--keep-worse",
            text="Write the result even if it is no better on held-out text. [default: off]",
        ),
    ] = False,
    restart: o.Restart = False,
    plan: o.PlanOnly = False,
) -> None:
    """Train a cut model for minutes, against the dense one, and prove that it reloads."""
    check_save(save, recipe.parts, records.inspect(checkpoint)["mode"])
    check_sharding(checkpoint, against)
    heal_screen.show_preset(recipe)
    if not plan:
        check_output(output, overwrite=overwrite, needed_bytes=0)
    screen.step(f"Loading {against} and {checkpoint} ...")
    dense = open_model(against, None, options_for_shards(options), surgery_follows=True)
    if plan:
        screen.show_plan(heal_pipeline.plan_healing(checkpoint, dense, recipe, options, output))
        return
    folder = kept_folder(output, restart=restart)
    healed = heal_pipeline.heal(
        checkpoint,
        against=dense,
        recipe=recipe,
        options=options,
        keep=folder,
        take_kept=keep,
    )
    heal_screen.show_healed(healed)
    if not keep_worse:
        healed.check_better()
    heal_screen.save_healed(healed, output, save, overwrite=overwrite)
    journal.finish(folder)
