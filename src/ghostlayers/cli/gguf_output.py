"""What `prune` leaves as a GGUF file, beside a checkpoint or alone, on the screen."""

from ghostlayers.checkpoint.output import Output
from ghostlayers.cli import saved_screen, screen
from ghostlayers.cli.export import write_gguf
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import parallel


def write_file(pruned: PrunedModel, output: Output, options: RunOptions) -> None:
    """Write the file, if there is to be one, and say where it lies."""
    file, folder = output.file, output.folder
    if file is None:
        return
    if not output.is_file:
        assert folder is not None
        parallel.by_first(
            lambda: write_gguf(
                folder, file, output.pre_tokenizer, options, overwrite=output.overwrite
            )
        )
        return
    screen.step(f"Writing {file} and reading it again ...")
    saved = pruned.save_gguf(
        file,
        fallback=output.how.fallback,
        split=output.how.split,
        pre_tokenizer=output.pre_tokenizer,
        options=options,
        overwrite=output.overwrite,
    )
    if output.copies(pruned.dense):
        saved_screen.show_copied(pruned, saved)
    else:
        saved_screen.show_exported(file)
