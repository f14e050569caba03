"""A cut model as one GGUF file: of a GGUF file by copying, of any other base through a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlayers.checkpoint.gguf_copy import cut_gguf, split_size, write_gguf_cut
from ghostlayers.checkpoint.gguf_encoding import fallback_named
from ghostlayers.checkpoint.gguf_export import check_model, check_target, export_gguf
from ghostlayers.checkpoint.proof import Verification, mode_of
from ghostlayers.checkpoint.record import evidence_row
from ghostlayers.errors import OutputError, RecipeError, UnsupportedModelError
from ghostlayers.evaluation import evaluate_windows
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_families import check_facts
from ghostlayers.model.multimodal import whole_of
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import drafts
from ghostlayers.runtime.places import PART
from ghostlayers.runtime.settings import WHAT, documented, setting
from ghostlayers.statistics.losses import LossSums
from ghostlayers.text.tokens import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@documented
@dataclass(frozen=True)
class How:
    """How a GGUF file is written."""

    fallback: str = setting(
        "Q8_0",
        "For -o FILE.gguf: type of repaired weights whose own type cannot be encoded.",
        WHAT,
        option="--gguf-fallback",
        metavar="TYPE",
    )
    split: str | None = setting(
        None,
        "For -o FILE.gguf: several files of at most this size, such as 4G.",
        WHAT,
        option="--gguf-split",
        metavar="SIZE",
        says="one file",
    )

    def check(self) -> None:
        """Refuse what cannot be read.

        Raises:
            RecipeError: with what was expected.
        """
        fallback_named(self.fallback)
        if self.split is not None:
            split_size(self.split)

    def check_copied(self, file: Path, out: Path) -> None:
        """Refuse parts whose names may be those of the parts of the file that is copied.

        Raises:
            OutputError: with what to do.
        """
        named = PART.fullmatch(file.name)
        if self.split is None or named is None or named["stem"] != out.stem:
            return
        if file.parent.resolve() == out.parent.resolve():
            raise OutputError(
                f"the parts of '{out}' would be named as those of the input, '{file.name}', are. "
                "What is read is never written to; choose another name."
            )

    def check_made_anew(self) -> None:
        """Refuse what is for files that are copied from a GGUF file.

        Raises:
            RecipeError: several files are asked for.
        """
        if self.split is not None:
            raise RecipeError(
                "--gguf-split is for files that are copied from a GGUF file; split this one by "
                "llama.cpp's gguf-split."
            )


@dataclass(frozen=True)
class SavedGguf:
    """What was written.

    Attributes:
        paths: the files.
        verification: how the model that is read from them compares with the one in memory.
        types: of changed tensors, by name: what each was, and what it is.
        encoded: losses of the model as it is read; None where nothing was rounded or measured.
    """

    paths: tuple[Path, ...]
    verification: Verification
    types: dict[str, tuple[str, str]]
    encoded: LossSums | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)


def save_gguf(
    dense: DenseModel,
    pruned: "PreTrainedModel",
    kept_layers: Sequence[int],
    record: Mapping[str, Any],
    out: Path,
    how: How,
    held_out: Windows | None = None,
    *,
    overwrite: bool = False,
) -> SavedGguf:
    """Write a cut model whose base is a GGUF file as one, and measure what is read from it.

    Args:
        dense: its base.
        pruned: as `removal.prune_layers` returns it.
        kept_layers: those that stay, in the dense model's numbering.
        record: provenance, as `make_record` makes it.
        out: the file to make.
        how: see `How`.
        held_out: windows to measure on; nothing is measured without them.
        overwrite: replace files of that name.

    Raises:
        GhostlayersError: see `write_gguf_cut`.
    """
    how.check()
    assert dense.base.file is not None
    how.check_copied(dense.base.file, out)
    check_target(out, overwrite=overwrite)
    _check_stock(pruned, extra=pruned.config.num_hidden_layers - len(kept_layers))
    cut = cut_gguf(dense, pruned, kept_layers, fallback_named(how.fallback))
    encoded = None
    if cut.lossy and held_out is not None and len(held_out):
        encoded = evaluate_windows(
            cut.network, held_out, corpus="held out", against=dense.network
        ).sums
    record = dict(record)
    record["gguf"] = {name: list(types) for name, types in cut.types.items()}
    record["mode"] = "stock"
    if encoded is not None:
        record["evidence"] = [*record["evidence"], evidence_row("encoded", encoded)]
    paths, verification = write_gguf_cut(
        cut,
        out,
        record,
        split=0 if how.split is None else split_size(how.split),
        overwrite=overwrite,
    )
    return SavedGguf(tuple(paths), verification, cut.types, encoded)


def save_through_folder(
    pruned: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    how: How,
    write: Callable[[Path], Verification],
    *,
    pre_tokenizer: str | None = None,
    options: RunOptions | None = None,
    overwrite: bool = False,
) -> SavedGguf:
    """Write a cut model whose base is no GGUF file as one: first a checkpoint, then that as a file.

    Args:
        pruned: as `removal.prune_layers` returns it.
        tokenizer: its own.
        out: the file to make, whose lock is held.
        how: see `How`.
        write: makes a folder of the model, plain, and proves it.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, where it is not known.
        options: how much memory reading that folder may take.
        overwrite: replace a file of that name.

    Raises:
        GhostlayersError: see `export_gguf`.
    """
    how.check()
    how.check_made_anew()
    check_target(out, overwrite=overwrite)
    _check_stock(pruned)
    check_model(whole_of(pruned), tokenizer, pre_tokenizer)
    check_facts(pruned.config)
    folder = drafts.new_folder(out)
    try:
        verification = write(folder / "checkpoint")
        export_gguf(
            folder / "checkpoint",
            out,
            pre_tokenizer=pre_tokenizer,
            options=options,
            overwrite=overwrite,
        )
    finally:
        drafts.remove(folder)
    return SavedGguf((out,), verification, {})


def _check_stock(pruned: "PreTrainedModel", extra: int = 0) -> None:
    """Refuse operators, and layers more than the base's header can tell of."""
    if mode_of(pruned) == "custom" or extra:
        raise UnsupportedModelError(
            "a GGUF file has no place for an operator or a layer of its own between layers. Repair "
            "with refit:3:ridge=auto, replaceme, magnitude or none, or save a folder."
        )
