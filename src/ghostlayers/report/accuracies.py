"""What a comparison's models answered: accuracies and their differences, as words in a grid."""

from collections.abc import Mapping
from typing import Any

from ghostlayers.report.summary import Key, Results, key_of, mean_accuracy, number
from ghostlayers.report.words import NOTHING, decimal, percent

Grid = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""The names of the columns, and the rows."""

DIFFERENCES = ("model", "against", "metric", "difference, points", "95% interval", "p", "verdict")
WITHIN_ERROR = "≈ within error"


def title_of(key: Key) -> str:
    """A model in words."""
    return "dense" if key.is_dense else f"{key.repair} · {key.select}, {key.layers} removed"


def accuracy_grid(results: Results) -> Grid | None:
    """A model a row, a task a column, the mean at the end; None where no tasks were answered."""
    rows = results.get("tasks") or []
    if not rows:
        return None
    names = list(dict.fromkeys(str(row["task"]) for row in rows))
    done = {(key_of(row), str(row["task"])): row for row in rows}
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


def _accuracy(row: Mapping[str, Any] | None) -> str:
    """Length-normalised accuracy, then plain accuracy, where both exist."""
    if row is None:
        return NOTHING
    texts = []
    for name in ("acc_norm", "acc"):
        value, error = number(row.get(name)), number(row.get(f"{name}_stderr"))
        if value is not None:
            texts.append(f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"))
    return " | ".join(texts) or NOTHING


def mean_rows(results: Results) -> list[tuple[str, ...]]:
    """A model a row: its mean accuracy, then what separates it from Ghost on the same cut."""
    differences = {
        (key_of(row["a"]), str(row.get("metric"))): _difference(row)
        for row in results.get("comparisons") or []
    }
    metric = "acc_norm" if any(name == "acc_norm" for _, name in differences) else "acc"
    means = mean_accuracy(results)
    rows: list[tuple[str, ...]] = []
    for key in dict.fromkeys(map(key_of, results.get("tasks") or [])):
        *_, gap, interval, _, verdict = differences.get((key, metric), ("",) * len(DIFFERENCES))
        rows.append((title_of(key), percent(means.get(key), 1), gap, interval, verdict))
    return rows


def difference_rows(results: Results) -> list[tuple[str, ...]]:
    """The rows under `DIFFERENCES`: every repair against Ghost on the same cut, pair by pair."""
    return [_difference(row) for row in results.get("comparisons") or []]


def _difference(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = number(row.get("low")), number(row.get("high"))
    unsure = low is None or high is None or low <= 0 <= high
    gap, error = number(row.get("difference")), number(row.get("stderr"))
    shown = NOTHING if gap is None else f"{100 * gap:+.1f}"
    interval = NOTHING if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return (
        title_of(key_of(row["a"])),
        title_of(key_of(row["b"])),
        str(row.get("metric", "")),
        shown + ("" if error is None else f" ± {100 * error:.1f}"),
        interval,
        decimal(number(row.get("p"))),
        WITHIN_ERROR if unsure else "better" if (gap or 0) > 0 else "worse",
    )
