"""`ghostlayers merge`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers import merged
from ghostlayers.cli import options as o
from ghostlayers.cli import saved_screen, screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.runtime.outputs import check_output
from ghostlayers.runtime.settings import WHAT

ASKED = "slerp overwrite held_out held_out_windows text_column separator sequence_length bos seed"
"""Fields of the recipe, as help shows them."""


@command
def merge(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A checkpoint that heal made of a cut model.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same cut.")],
    against: Annotated[
        str, o.option("--against", metavar="MODEL", text="The dense model that both are cut from.")
    ],
    output: o.Out,
    recipe: Annotated[HealingRecipe, Fields(ASKED, make=HealingRecipe)],
    options: Annotated[RunOptions, Fields(o.RUN)],
    slerp: Annotated[
        str,
        o.option(
            "--slerp",
            metavar="SHARE",
            text="Share of the way from A to B; 'auto' tries some, and keeps what is nearest to "
            "the dense model on held-out text, A or B included.",
            panel=WHAT,
            show_default=True,
        ),
    ] = "auto",
    overwrite: o.Overwrite = False,
) -> None:
    """Merge two healed checkpoints of one cut into one, and prove that it reloads."""
    share = merged.read_share(slerp)
    check_output(output, overwrite=overwrite, needed_bytes=0)
    screen.step(f"Loading {against}, {first} and {second} ...")
    made = merged.merge(
        first,
        second,
        against=against,
        recipe=recipe,
        t=share,
        options=options,
    )
    saved_screen.show_merged(made.record["merged"])
    screen.step(f"Writing {output} and proving it ...")
    saved_screen.show_materialized(output, made.save(output, overwrite=overwrite))
