"""`ghostlayers materialize`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers.checkpoint.adapter import materialize as write
from ghostlayers.cli import options as o
from ghostlayers.cli import saved_screen, screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.recipe import RunOptions


@command
def materialize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of an adapter.")],
    output: o.Out,
    options: Annotated[RunOptions, Fields("base overwrite dtype device")],
    base: Annotated[
        str | None,
        o.option("--base", text="Where the base model is now. [default: where it was]"),
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Write the whole checkpoint that an adapter describes, and prove that it reloads."""
    screen.step(f"Loading the base of {adapter}, writing {output} and loading it again ...")
    saved_screen.show_materialized(
        output, write(adapter, output, base, options, overwrite=overwrite)
    )
