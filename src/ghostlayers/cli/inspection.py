"""`ghostlayers inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers.checkpoint import records
from ghostlayers.cli import options as o
from ghostlayers.cli import saved_screen
from ghostlayers.cli.shell import command
from ghostlayers.runtime.documents import to_json


@command
def inspect_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that prune made.")],
    json_output: Annotated[
        bool, o.option("--json", text="Print the whole record as JSON instead.")
    ] = False,
) -> None:
    """What was removed, kept and repaired in a checkpoint, and on what evidence."""
    record = records.inspect(checkpoint)
    if json_output:
        typer.echo(to_json(record), nl=False)
    else:
        saved_screen.show_record(record)
