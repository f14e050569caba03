"""A cut model as one GGUF file: of a GGUF file by copying, of any other base through a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlayers.checkpoint.gguf_copy import (
    check_gguf_cut,
    cut_gguf,
    split_size,
    write_gguf_cut,
)
from ghostlayers.checkpoint.gguf_encoding import fallback_named
from ghostlayers.checkpoint.proof import Verification, mode_of
from ghostlayers.checkpoint.record import evidence_row
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.evaluation import evaluate_windows
from ghostlayers.model import multimodal
from ghostlayers.model.dense import DenseModel
from ghostlayers.runtime.progress import Progress, Silent
from ghostlayers.runtime.settings import WHAT, documented, setting
from ghostlayers.spans import kept_layers, merge_layers
from ghostlayers.statistics.losses import LossSums
from ghostlayers.surgery import removal
from ghostlayers.text.tokens import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def check_gguf_base(dense: DenseModel, how: How) -> None:
    """Refuse what no GGUF file can be made of by copying, before anything is computed.

    Raises:
        UnsupportedModelError: the model was not read from such a file.
        RecipeError: the options cannot be read.
    """
    how.check()
    if dense.base.file is None:
        raise UnsupportedModelError(
            f"'{dense.base.name}' was not read from a GGUF file, so there is none to copy from. "
            "Save a folder, and make a GGUF file of it (ghostlayers export)."
        )


def check_named_cut(dense: DenseModel, removed: Sequence[int] | None) -> None:
    """Refuse layers that are named to go and whose cut no GGUF file could hold.

    Raises:
        GhostlayersError: with the reason.
    """
    if removed is None:
        return
    spans = merge_layers(removed)
    pruned = multimodal.text_view(removal.prune_layers(dense, spans))
    check_gguf_cut(dense, pruned, kept_layers(spans, dense.num_layers))


def save_gguf(
    dense: DenseModel,
    pruned: "PreTrainedModel",
    kept: Sequence[int],
    record: Mapping[str, Any],
    out: Path,
    how: How,
    held_out: Windows | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SavedGguf:
    """Write a cut model whose base is a GGUF file as one, and measure what is read from it.

    Args:
        dense: its base.
        pruned: as `removal.prune_layers` returns it.
        kept: the layers that stay, in the dense model's numbering.
        record: provenance, as `make_record` makes it.
        out: the file to make.
        how: see `How`.
        held_out: windows to measure on; nothing is measured without them.
        overwrite: replace files of that name.
        progress: told of every tensor.

    Raises:
        GhostlayersError: see `write_gguf_cut`.
    """
    check_gguf_base(dense, how)
    progress = progress or Silent()
    if mode_of(pruned) == "custom" or pruned.config.num_hidden_layers != len(kept):
        raise UnsupportedModelError(
            "a GGUF file has no place for an operator or a layer of its own between layers. Repair "
            "with refit:3:ridge=auto, replaceme, magnitude or none, or save a folder."
        )
    cut = cut_gguf(dense, pruned, kept, fallback_named(how.fallback))
    encoded = None
    if cut.lossy and held_out is not None and len(held_out):
        encoded = evaluate_windows(
            cut.network, held_out, corpus="held out", against=dense.network, progress=progress
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
        progress=progress,
    )
    return SavedGguf(tuple(paths), verification, cut.types, encoded)
