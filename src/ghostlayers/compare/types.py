"""Dense and cut models as GGUF files of several types: bytes, losses, speed, memory in llama.cpp.

What people run is quantised, so a cut competes with a smaller type of the dense model as much as
with the dense model itself. Each model is written once in its own type; each type is made from
that, measured by processes of its own, and removed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from ghostlayers.checkpoint.gguf_export import check_exportable, export_gguf
from ghostlayers.checkpoint.gguf_tokenizer import read_tokenizer, splitting_name
from ghostlayers.checkpoint.quantise import Made, check_types, quantise
from ghostlayers.checkpoint.saving import write_model
from ghostlayers.errors import InputError, UnsupportedModelError
from ghostlayers.evaluation import llama_cpp
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_families import family_of
from ghostlayers.model.multimodal import check_gguf, whole_of
from ghostlayers.recipe import Recipe
from ghostlayers.report.summary import STOCK
from ghostlayers.runtime import progress
from ghostlayers.runtime.scratch import Scratch
from ghostlayers.statistics.losses import LossSums
from ghostlayers.text.tokens import Windows

REFERENCE = "F16"
"""The type of the dense model from which every file's divergence is measured."""

ANY_SPLIT = "gpt-2"
"""How text is split, where that is not known: every text reaches llama.cpp as tokens."""


class Parts(Protocol):
    """Finished parts by their keys; see `compare.store`."""

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished part, or None."""

    def put(self, key: str, part: dict[str, Any]) -> dict[str, Any]:
        """Keep a part; return it as it will be read again."""


def check_asked(types: Sequence[str]) -> None:
    """Refuse types that could not be measured, before anything is opened.

    Raises:
        RecipeError: a type needs an importance matrix, which a comparison does not make.
        DependencyError: llama.cpp is not installed.
    """
    if types:
        check_types(types, imatrix=False)
        llama_cpp.find_engine("--types")


def check_writable(model: DenseModel, types: Sequence[str]) -> None:
    """Refuse a model whose family is not written as GGUF.

    Raises:
        UnsupportedModelError: with those that are.
    """
    if types:
        config = whole_of(model.network).config
        check_gguf(config)
        family_of(config)


def can_be_a_file(repair: str, checkpoint: str) -> bool:
    """Whether a repair's model can be a GGUF file: it is a stock checkpoint that can be saved."""
    try:
        check_exportable(Recipe(repair=repair), "checkpoint")
    except InputError:
        return False
    return checkpoint == STOCK


@dataclass(frozen=True)
class Typed:
    """Measures models as files of several types.

    Attributes:
        dense: the dense model.
        types: of the files.
        corpora: evaluation windows by name.
        parts: keeps what is finished.
    """

    dense: DenseModel
    types: tuple[str, ...]
    corpora: Mapping[str, Windows]
    parts: Parts

    def measure(self, key: str, repair: str, model: PreTrainedModel) -> dict[str, Any]:
        """One model in each type.

        Args:
            key: of the cut; models of one cut and different repairs are as fast and as large.
            repair: its name.
            model: built, of stock classes.

        Returns:
            ``rows``, one a type; and ``refused``, why there are none, where llama.cpp has no place
            for what the cut left.
        """
        lacking = [kind for kind in self.types if self.parts.get(_key(key, repair, kind)) is None]
        if lacking:
            try:
                self._measure(key, repair, model, lacking)
            except UnsupportedModelError as error:
                return {"rows": [], "refused": str(error)}
        rows = [self.parts.get(_key(key, repair, kind)) for kind in self.types]
        return {"rows": rows, "refused": None}

    def _measure(self, key: str, repair: str, model: PreTrainedModel, kinds: Sequence[str]) -> None:
        with Scratch("types") as scratch:
            base = self._base(Path(scratch), model)
            for kind in kinds:
                file = Path(scratch, f"{kind}.gguf")
                part = self._file(key, repair, quantise(base, file, kind))
                self.parts.put(_key(key, repair, kind), part)
                file.unlink()

    def _base(self, place: Path, model: PreTrainedModel) -> Path:
        """The model in its own type, as `export` writes it."""
        folder = place / "model"
        folder.mkdir()
        write_model(folder, model, self.dense.tokenizer, self.dense.stored_dtype)
        try:
            splits = splitting_name(read_tokenizer(folder))
        except UnsupportedModelError:
            splits = ANY_SPLIT
        return export_gguf(folder, place / "base.gguf", pre_tokenizer=splits)

    @cached_property
    def _scratch(self) -> Scratch:
        """Holds the dense model's file for as long as this lives."""
        return Scratch("types")

    @cached_property
    def _reference(self) -> Path:
        """The dense model's file that divergences are measured from."""
        place = Path(self._scratch.name)
        return quantise(self._base(place, self.dense.network), place / "f16.gguf", REFERENCE).path

    def _file(self, key: str, repair: str, made: Made) -> dict[str, Any]:
        """All that is told of one file."""
        name = f"speed {key} {made.kind}"
        title = f"{repair} as {made.kind}"
        steps = sum(map(len, self.corpora.values())) + llama_cpp.REPEATS + 1
        with progress.stage(title, steps) as advance:
            losses = {
                corpus: _losses(
                    llama_cpp.measure_losses(made.path, windows, self._reference, advance)
                )
                for corpus, windows in self.corpora.items()
            }
            speed = self.parts.get(name) or self.parts.put(
                name, llama_cpp.measure_speed(made.path, advance=advance).to_dict()
            )
        return {
            "type": made.kind,
            "losses": losses,
            "file": {"size_bytes": made.size_bytes, "tensor_types": dict(made.tensors), **speed},
        }


def _key(key: str, repair: str, kind: str) -> str:
    return f"type {key} {repair} {kind}"


def _losses(windows: Sequence[LossSums]) -> dict[str, Any]:
    """Means over all tokens, and each window's loss."""
    total = sum(windows, LossSums())
    return {**total.to_dict(), "window_losses": [window.loss_nats for window in windows]}


def file_rows(
    measured: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """What the results hold of files, as plain values of `ModelFile` and `FileLoss`.

    Args:
        measured: what the rows call each model, and its part.
    """
    named = [
        ({**name, "type": row["type"]}, row)
        for name, part in measured
        for row in part.get("types", {}).get("rows", ())
    ]
    return {
        "files": [{**name, **row["file"]} for name, row in named],
        "file_losses": [
            {**name, "corpus": corpus, **losses}
            for name, row in named
            for corpus, losses in row["losses"].items()
        ],
    }


def refused_rows(
    measured: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> Iterator[dict[str, Any]]:
    """Models that are no files, with the reason, as plain values of `Skipped`."""
    for name, part in measured:
        reason = part.get("types", {}).get("refused")
        if reason:
            yield {**name, "reason": f"as a GGUF file: {reason}"}
