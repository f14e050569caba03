"""The difference between two models on the same documents, and how sure it is: pure functions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import InputError

DRAWS_AT_ONCE = 2**22
"""Documents drawn at a time: bounds memory, not the result."""


@dataclass(frozen=True)
class Answers:
    """How one model did on the documents of one task.

    Attributes:
        documents: what identifies each document, in order.
        values: its score, such as 1 where the answer was right; one a document.
    """

    documents: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class PairedDifference:
    """One model's mean minus another's, over the same documents.

    Attributes:
        difference: the first model's mean minus the second's; 0.01 is one point of accuracy.
        error: its standard error, the standard deviation over resamples.
        low: lower end of the central 95 % of resamples.
        high: upper end.
        p_value: twice the share of resamples that do not lie on the difference's side of zero, at
            most 1. Its resolution is ``2 / samples``.
        num_documents: documents of all tasks together.
        samples: resamples drawn.
    """

    difference: float
    error: float
    low: float
    high: float
    p_value: float
    num_documents: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain values."""
        return asdict(self)


def paired_bootstrap(
    a: Mapping[str, Answers],
    b: Mapping[str, Answers],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    r"""How much better a is than b on the same documents, and whether chance could explain it.

    With d_i = a_i - b_i on document i, the difference of a task is mean_i d_i; of several tasks,
    the plain mean over tasks. A resample draws as many documents as a task has from it, with
    replacement and each task for itself, and takes both models' answers to them.

    Why pairs: two models that share most of their weights fail on mostly the same documents. What
    makes a document hard for both, which is most of either model's own standard error, cancels in
    d_i. On a task of a thousand documents an accuracy has a standard error of about 1.5 points, so
    the margins of 0.3 to 0.65 points by which methods of layer pruning are ranked lie within a
    single task's standard error; from the pairs it can be told whether such a margin is real.

    Args:
        a: the first model's answers by task.
        b: the second's, to the same documents of the same tasks.
        samples: resamples, at least 1.
        seed: of the drawing.

    Raises:
        InputError: no task, no document, or other tasks or documents in b than in a.

    References:
        Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13; Koehn,
        Statistical Significance Tests for Machine Translation Evaluation, 2004.
    """
    if samples < 1:
        raise InputError(f"'samples' must be at least 1, got {samples}.")
    _check_pairs(a, b)
    generator = torch.Generator().manual_seed(seed)
    pairs = [_differences(a[task], b[task]) for task in a]
    resampled = torch.stack([_resample_means(d, samples, generator) for d in pairs]).mean(dim=0)
    difference = float(torch.stack([d.mean() for d in pairs]).mean())
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return PairedDifference(
        difference=difference,
        error=float(resampled.std()) if samples > 1 else 0.0,
        low=float(ends[0]),
        high=float(ends[1]),
        p_value=_two_sided(resampled, difference),
        num_documents=sum(len(d) for d in pairs),
        samples=samples,
    )


def _check_pairs(a: Mapping[str, Answers], b: Mapping[str, Answers]) -> None:
    if set(a) != set(b) or not a:
        raise InputError(
            f"the two models were evaluated on other tasks ({', '.join(sorted(a)) or 'none'}; "
            f"{', '.join(sorted(b)) or 'none'}): evaluate both on the same ones."
        )
    for task in a:
        if a[task].documents != b[task].documents or not a[task].documents:
            raise InputError(
                f"the documents of task '{task}' differ ({len(a[task].documents)} and "
                f"{len(b[task].documents)}, or others, or in another order): a paired comparison "
                "needs both models' answers to the same ones, with the same limit."
            )


def _differences(a: Answers, b: Answers) -> Float[Tensor, " documents"]:
    first, second = (torch.tensor(answers.values, dtype=torch.float64) for answers in (a, b))
    return first - second


def _resample_means(
    differences: Float[Tensor, " documents"], samples: int, generator: torch.Generator
) -> Float[Tensor, " samples"]:
    """The mean of every resample of one task."""
    count = len(differences)
    at_once = max(1, DRAWS_AT_ONCE // count)
    means = []
    for start in range(0, samples, at_once):
        rows = min(at_once, samples - start)
        drawn = torch.randint(count, (rows, count), generator=generator)
        means.append(differences[drawn].mean(dim=1))
    return torch.cat(means)


def _two_sided(resampled: Float[Tensor, " samples"], difference: float) -> float:
    if difference == 0:
        return 1.0
    other = resampled <= 0 if difference > 0 else resampled >= 0
    return min(1.0, 2 * float(other.double().mean()))
