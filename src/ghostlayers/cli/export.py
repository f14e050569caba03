"""`ghostlayers export`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.cli import options as o
from ghostlayers.cli import saved_screen, screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.recipe import RunOptions, TypeName


@command
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a stock checkpoint.")
    ],
    file: Annotated[
        Path, o.option("--gguf", metavar="FILE", text="The GGUF file to make, for llama.cpp.")
    ],
    options: Annotated[RunOptions, Fields("pre_tokenizer dtype overwrite offload max_memory")],
    pre_tokenizer: o.PreTokenizer = None,
    dtype: Annotated[
        TypeName,
        o.option(
            "--dtype",
            text="Type of the file's matrices. 'auto' is the checkpoint's. [default: auto]",
        ),
    ] = "auto",
    overwrite: o.OverwriteFile = False,
) -> None:
    """Write a checkpoint as a GGUF file, and prove that it holds the same numbers."""
    write_gguf(checkpoint, file, pre_tokenizer, options, dtype=dtype, overwrite=overwrite)


def write_gguf(
    checkpoint: Path,
    file: Path,
    pre_tokenizer: str | None,
    options: RunOptions,
    *,
    dtype: str = "auto",
    overwrite: bool,
) -> None:
    """Write a checkpoint as a GGUF file, and say where it lies."""
    screen.step(f"Reading {checkpoint} and writing {file} ...")
    export_gguf(
        checkpoint,
        file,
        pre_tokenizer=pre_tokenizer,
        dtype=dtype,
        options=options,
        overwrite=overwrite,
        progress=screen.Bars(),
    )
    saved_screen.show_exported(file)
