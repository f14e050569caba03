"""`ghostlayers push`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers.checkpoint.hub import push as send
from ghostlayers.cli import options as o
from ghostlayers.cli import saved_screen, screen
from ghostlayers.cli.shell import command


@command
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint or an adapter that was made here.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="The hub's model repository, such as name/model.")
    ],
    private: Annotated[
        bool, o.option("--private", text="Make the repository private, if it is made.")
    ] = False,
    message: Annotated[
        str | None, o.option("--message", "-m", text="Of the commit. [default: what was done]")
    ] = None,
    dry_run: Annotated[
        bool, o.option("--dry-run", text="Send nothing; show what would be sent.")
    ] = False,
) -> None:
    """Share a checkpoint or an adapter on the Hugging Face Hub, with its model card."""
    screen.step(f"Checking {folder} ..." if dry_run else f"Sending {folder} to {repo} ...")
    saved_screen.show_upload(send(folder, repo, private=private, message=message, dry_run=dry_run))
