"""`ghostlayers export`."""

from pathlib import Path
from typing import Annotated

import typer

from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.cli import options as o
from ghostlayers.cli import saved_screen, screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.export import Family, export_family
from ghostlayers.recipe import RunOptions, TypeName


@command
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="The folder of a stock checkpoint; with --type a GGUF file of 16 bits as well.",
        ),
    ],
    file: Annotated[
        Path,
        o.option(
            "--gguf",
            metavar="FILE",
            text="The GGUF file to make, for llama.cpp; '{type}' in its name is each of --type.",
        ),
    ],
    family: Annotated[
        Family,
        Fields(
            "types pre_tokenizer dtype overwrite imatrix_data windows sequence_length text_column "
            "separator seed"
        ),
    ],
    options: Annotated[RunOptions, Fields("offload max_memory device batch_size")],
    pre_tokenizer: o.PreTokenizer = None,
    dtype: Annotated[
        TypeName,
        o.option(
            "--dtype",
            text="Type of the file's matrices, and of what --type is made from. 'auto' is the "
            "checkpoint's. [default: auto]",
        ),
    ] = "auto",
    overwrite: o.OverwriteFile = False,
) -> None:
    """Write a checkpoint as a GGUF file, or one of each type, and prove what they hold."""
    if not family.paths(file):
        write_gguf(checkpoint, file, pre_tokenizer, options, dtype=dtype, overwrite=overwrite)
        return
    screen.step(f"Reading {checkpoint} ...")
    made = export_family(
        checkpoint,
        file,
        family,
        pre_tokenizer=pre_tokenizer,
        dtype=dtype,
        options=options,
        overwrite=overwrite,
    )
    saved_screen.show_family(made, family.next_command(file))


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
    )
    saved_screen.show_exported(file)
