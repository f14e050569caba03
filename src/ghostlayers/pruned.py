"""The result of pruning: a smaller model, and the evidence for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlayers.calibration import journal
from ghostlayers.calibration.contest import Contest
from ghostlayers.checkpoint import adapter, gguf_saving, proof, saving
from ghostlayers.checkpoint.packed import PackedBase, packed_base
from ghostlayers.evaluation import LossSums
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import text_view
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.recipe.decision import Decision
from ghostlayers.repairs import Repair
from ghostlayers.runtime.locks import holding
from ghostlayers.selection import ScoreTable
from ghostlayers.spans import Span, format_layers, kept_layers, removed_layers
from ghostlayers.text.tokens import Windows

Result = TypeVar("Result")


@dataclass(frozen=True)
class PrunedModel:
    """A smaller, repaired model, and the evidence for it.

    Attributes:
        model: an ordinary transformers model, whole where it sees images, too; the dense one is
            unchanged and shares its weights.
        dense: the dense model it was made from.
        recipe: what was asked for.
        spans: what was removed, in the dense model's numbering.
        num_layers: decoder layers of the dense model.
        repairs: one a gap.
        table: the scores, where layers were chosen by them.
        evidence: losses on held-out windows of ``dense``, ``cut`` and ``repaired``.
        births: removed spans in which a massive activation is born.
        record: provenance, as it is written into the checkpoint.
        held_out: the windows of the evidence.
        kept_in: the folder of what the run keeps until the result is saved; see `pipeline.prune`.
        decision: how a budget came to the number of layers, where there was one.
        contest: what chose the repair, where it was left to held-out windows.
    """

    model: PreTrainedModel
    dense: DenseModel
    recipe: Recipe
    spans: tuple[Span, ...]
    num_layers: int
    repairs: dict[Span, Repair]
    table: ScoreTable | None
    evidence: dict[str, LossSums]
    births: tuple[Span, ...]
    record: dict[str, Any]
    held_out: Windows | None = None
    kept_in: Path | None = None
    decision: Decision | None = None
    contest: Contest | None = None

    def __repr__(self) -> str:
        layers = f"layers {format_layers(self.removed)} of {self.num_layers} removed"
        return f"PrunedModel({self.dense.base.name!r}, {layers}, {self.recipe.repair!r})"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The dense model's tokenizer."""
        return self.dense.tokenizer

    @property
    def removed(self) -> list[int]:
        """The removed layers, in the dense model's numbering."""
        return removed_layers(self.spans)

    @property
    def kept(self) -> list[int]:
        """The kept layers, in the dense model's numbering."""
        return kept_layers(self.spans, self.num_layers)

    def save(self, out: str | Path, *, overwrite: bool = False) -> proof.Verification:
        """Write a checkpoint, and prove in a fresh process that it reloads.

        Of several processes the first one does, and the others wait for it. A name that ends in
        ``.gguf`` makes one file; see `save_gguf`.

        Raises:
            OutputError: the folder exists, or cannot be written.
            VerificationError: the reloaded model differs; nothing is left behind.
        """
        if Path(out).suffix == ".gguf":
            return self.save_gguf(out, overwrite=overwrite).verification
        packed = packed_base(self.dense, self.recipe)
        return self._once(out, lambda: self._write(Path(out), packed, overwrite=overwrite))

    def save_adapter(self, out: str | Path, *, overwrite: bool = False) -> proof.Verification:
        """Write only what distinguishes the model from its base: megabytes, see `adapter`.

        `ghostlayers.from_adapter` builds the model again, and `ghostlayers.materialize` writes the
        whole checkpoint.

        Raises:
            OutputError: the folder exists, or cannot be written.
            VerificationError: the rebuilt model differs; nothing is left behind.
        """
        return self._once(
            out,
            lambda: adapter.save_adapter(
                Path(out),
                self.dense,
                text_view(self.model),
                self.repairs,
                self.record,
                overwrite=overwrite,
            ),
        )

    def save_gguf(
        self,
        out: str | Path,
        *,
        fallback: str = "Q8_0",
        split: str | None = None,
        pre_tokenizer: str | None = None,
        options: RunOptions | None = None,
        overwrite: bool = False,
    ) -> gguf_saving.SavedGguf:
        """Write one GGUF file; of a model that was read from one, what is quantised stays so.

        Then all that the cut leaves alone is copied, byte for byte; weights that the repair changed
        are encoded anew in their own type, or in ``fallback`` where the `gguf` library has no
        encoder for that. The model that is then read is measured again on the held-out windows.
        Of any other model a checkpoint is written beside the file for a while, and exported.

        Args:
            out: the file to make.
            fallback: a type such as ``Q8_0`` or ``F16``.
            split: start another file where one would exceed a size such as ``4G``.
            pre_tokenizer: llama.cpp's name for how the tokenizer splits text, where the base is no
                GGUF file and it is not known.
            options: how much memory that checkpoint may take.
            overwrite: replace a file of that name.

        Raises:
            UnsupportedModelError: llama.cpp could not run the result.
            RecipeError: ``split``, and the base is no GGUF file.
            OutputError: the file exists, or cannot be written.
            VerificationError: what is read differs; nothing is left behind.
        """
        model, how, file = text_view(self.model), gguf_saving.How(fallback, split), Path(out)

        def write() -> gguf_saving.SavedGguf:
            with holding(file, replace=overwrite):
                if self.dense.base.file is None:
                    return gguf_saving.save_through_folder(
                        model,
                        self.tokenizer,
                        file,
                        how,
                        self._write,
                        pre_tokenizer=pre_tokenizer,
                        options=options,
                        overwrite=overwrite,
                    )
                return gguf_saving.save_gguf(
                    self.dense,
                    model,
                    self.kept,
                    self.record,
                    file,
                    how,
                    self.held_out,
                    overwrite=overwrite,
                )

        return self._once(file, write)

    def _write(
        self, out: Path, packed: PackedBase | None = None, *, overwrite: bool = False
    ) -> proof.Verification:
        """Write a checkpoint, plain unless a packed base is given."""
        return saving.save_checkpoint(
            out,
            text_view(self.model),
            self.tokenizer,
            self.record,
            stored_dtype=self.dense.stored_dtype,
            base_folder=self.dense.base.folder,
            processor=self.dense.processor,
            packed=packed,
            overwrite=overwrite,
        )

    def _once(self, out: str | Path, write: Callable[[], Result]) -> Result:
        read = [self.dense.base.name, self.recipe.data]
        return journal.write_once(write, out, read, self.kept_in)


def checkpoint_bytes(dense: DenseModel, recipe: Recipe) -> int:
    """Bytes that a whole checkpoint takes at most."""
    base = packed_base(dense, recipe)
    return (
        saving.checkpoint_bytes(dense.network, dense.stored_dtype) if base is None else base.bytes
    )
