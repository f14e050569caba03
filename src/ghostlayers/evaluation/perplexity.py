"""Perplexity of any causal language model, and its divergence from a dense one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostlayers.errors import InputError
from ghostlayers.runtime import progress
from ghostlayers.runtime.machine import input_device
from ghostlayers.runtime.parallel import add_up, world
from ghostlayers.statistics.losses import LossSums, sum_losses
from ghostlayers.text.tokens import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**27
"""Elements of logits that one forward pass may make: half a gigabyte in float32."""


@dataclass(frozen=True)
class EvaluationResult:
    """What a model scores on one corpus.

    Attributes:
        corpus: as the caller named it.
        sums: over all predictions.
        num_windows: windows evaluated.
        available_windows: windows of the corpus; None if not all of it was read.
        complete: whether that was the whole corpus.
        sequence_length: tokens a window.
        bos: whether each window starts with a beginning-of-sequence token.
        calibration_overlap: documents that also served as calibration; None if not known.
        dense: losses of the model that it was compared with, on the same predictions; None
            without one.
        windows: what was evaluated.
    """

    corpus: str
    sums: LossSums
    num_windows: int
    available_windows: int | None
    sequence_length: int
    bos: bool
    complete: bool = True
    calibration_overlap: int | None = None
    dense: LossSums | None = None
    windows: Windows | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss; infinite where that overflows."""
        return self.sums.perplexity

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, with the keys that the command line writes."""
        result: dict[str, Any] = {
            "corpus": self.corpus,
            "num_tokens": self.sums.num_tokens,
            "loss_nats": self.sums.loss_nats,
            "perplexity": self.perplexity,
            "num_windows": self.num_windows,
            "available_windows": self.available_windows,
            "sequence_length": self.sequence_length,
            "bos": self.bos,
            "calibration_overlap": self.calibration_overlap,
        }
        if self.dense is not None:
            result |= self.sums.divergences()
            result["dense_loss_nats"] = self.dense.loss_nats
            result["dense_perplexity"] = self.dense.perplexity
        return result


def evaluate_windows(
    model: "PreTrainedModel",
    windows: Windows,
    *,
    corpus: str,
    against: "PreTrainedModel | None" = None,
    batch_size: int = 8,
    complete: bool = True,
    calibration: Sequence[str] | None = None,
) -> EvaluationResult:
    """Evaluate a model on windows, each token predicted from those before it in its window.

    Args:
        model: any causal language model.
        windows: what to evaluate on.
        corpus: its name in the result.
        against: a dense model to compare with, over the same vocabulary.
        batch_size: at most so many windows at a time.
        complete: whether the windows were cut from the whole corpus.
        calibration: hashes of documents that served as calibration, to count the shared ones.

    Raises:
        InputError: the two models' vocabularies differ in size.
    """
    batch = max(
        1, min(batch_size, LOGITS_AT_ONCE // (windows.sequence_length * vocabulary_of(model)))
    )
    if against is not None and vocabulary_of(model) != vocabulary_of(against):
        raise InputError(
            f"the models' vocabularies differ ({vocabulary_of(model)} and {vocabulary_of(against)} "
            "tokens): compare with the model that this one was made from."
        )
    sums = dense = LossSums()
    with progress.stage(f"Evaluating on {corpus}", len(windows)) as advance:
        for index, ids in enumerate(windows.input_ids.split(batch)):
            if world().takes(index):
                own, others = _evaluate_batch(model, against, ids)
                sums, dense = sums + own, dense + others
            advance(len(ids))
    sums, dense = _over_all_processes(sums), _over_all_processes(dense)
    shared = None if calibration is None else len(set(calibration) & set(windows.documents))
    return EvaluationResult(
        corpus=corpus,
        sums=sums,
        num_windows=len(windows),
        available_windows=windows.available,
        sequence_length=windows.sequence_length,
        bos=windows.bos,
        complete=complete,
        calibration_overlap=shared,
        dense=None if against is None else dense,
        windows=windows,
    )


def _over_all_processes(sums: LossSums) -> LossSums:
    row = sums.row()
    add_up([row])
    return LossSums.of_row(row)


def _evaluate_batch(
    model: "PreTrainedModel", against: "PreTrainedModel | None", ids: Tensor
) -> tuple[LossSums, LossSums]:
    """Of the model, and of the one that it is compared with."""
    logits = predictions(model, ids)
    targets = ids[:, 1:].flatten().to(logits.device)
    if against is None:
        return sum_losses(logits, targets), LossSums()
    reference = predictions(against, ids).to(logits.device)
    return sum_losses(logits, targets, reference), sum_losses(reference, targets)


@torch.no_grad()
def predictions(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """Logits of every position but the last, windows joined, [predictions, vocabulary]."""
    logits: Tensor = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def vocabulary_of(model: "PreTrainedModel") -> int:
    """Logits that a model gives for each token."""
    return int(model.config.get_text_config().vocab_size)
