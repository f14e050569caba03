"""What a comparison's models answered: accuracies and their differences, as words in a grid."""

from collections.abc import Sequence

from ghostlayers.report.results import Difference, Results
from ghostlayers.report.rows import Accuracy, Key
from ghostlayers.report.summary import mean_accuracy
from ghostlayers.report.words import NOTHING, decimal, percent

Grid = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The names of the columns, and the rows."""

DIFFERENCES = ("model", "against", "metric", "difference, points", "95% interval", "p", "verdict")
WITHIN_ERROR = "≈ within error"


def title_of(key: Key) -> str:
    """A model in words."""
    return "dense" if key.is_dense else f"{key.repair} · {key.select}, {key.layers} removed"


def accuracy_grid(results: Results) -> Grid:
    """A model a row, a task a column, the mean at the end."""
    names = list(dict.fromkeys(row.task for row in results.tasks))
    done = {(row.key, row.task): row for row in results.tasks}
    means = mean_accuracy(results)
    body = [
        (
            title_of(key),
            *(_accuracy(done.get((key, name))) for name in names),
            percent(means.get(key), 1),
        )
        for key in dict.fromkeys(key for key, _ in done)
    ]
    return ("model", *names, "mean"), body


def _accuracy(row: Accuracy | None) -> str:
    """Length-normalised accuracy, then plain accuracy, where both exist."""
    if row is None:
        return NOTHING
    texts = [
        f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
        for value, error in ((row.acc_norm, row.acc_norm_stderr), (row.acc, row.acc_stderr))
        if value is not None
    ]
    return " | ".join(texts) or NOTHING


def mean_rows(results: Results) -> list[tuple[str, ...]]:
    """A model a row: its mean accuracy, then what separates it from Ghost on the same cut."""
    metrics = {row.metric for row in results.comparisons}
    metric = "acc_norm" if "acc_norm" in metrics else "acc"
    differences = {
        row.a.key: _difference(row) for row in results.comparisons if row.metric == metric
    }
    means = mean_accuracy(results)
    rows: list[tuple[str, ...]] = []
    for key in dict.fromkeys(row.key for row in results.tasks):
        *_, gap, interval, _, verdict = differences.get(key, ("",) * len(DIFFERENCES))
        rows.append((title_of(key), percent(means.get(key), 1), gap, interval, verdict))
    return rows


def difference_rows(results: Results) -> list[tuple[str, ...]]:
    """The rows under `DIFFERENCES`: every repair against Ghost on the same cut, pair by pair."""
    return [_difference(row) for row in results.comparisons]


def _difference(row: Difference) -> tuple[str, ...]:
    known = row.low is not None and row.high is not None
    unsure = row.low is None or row.high is None or row.low <= 0 <= row.high
    gap = NOTHING if row.difference is None else f"{100 * row.difference:+.1f}"
    error = "" if row.stderr is None else f" ± {100 * row.stderr:.1f}"
    interval = f"{100 * (row.low or 0):+.1f} to {100 * (row.high or 0):+.1f}"
    return (
        title_of(row.a.key),
        title_of(row.b.key),
        row.metric,
        gap + error,
        interval if known else NOTHING,
        decimal(row.p),
        WITHIN_ERROR if unsure else "better" if (row.difference or 0) > 0 else "worse",
    )
