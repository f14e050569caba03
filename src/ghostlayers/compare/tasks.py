"""Zero-shot tasks of every model of a comparison, and what separates two repairs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostlayers.evaluation import LoadedTasks, evaluate_tasks
from ghostlayers.evaluation.tasks import METRICS, MetricName
from ghostlayers.statistics.bootstrap import Answers, paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 4000
"""Resamples a difference."""

RIVAL = "ghost"
"""The repair that every other one of the same cut is set against."""

Rows = Sequence[Mapping[str, Any]]


def run_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: LoadedTasks,
    limit: int | None,
) -> list[dict[str, Any]]:
    """One row a task, every document's score included."""
    results = evaluate_tasks(model, tokenizer, tasks, limit=limit)
    return [result.to_dict() for result in results]


def task_row(name: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the results hold it: without the documents."""
    return {
        **name,
        "task": row["task"],
        "version": row["version"],
        "num_documents": row["num_documents"],
        "acc": row["acc"],
        "acc_stderr": row["acc_error"],
        "acc_norm": row["acc_norm"],
        "acc_norm_stderr": row["acc_norm_error"],
    }


def differences(
    models: Sequence[tuple[Mapping[str, Any], Rows]],
) -> Iterator[dict[str, Any]]:
    """Every repair's mean accuracy over tasks minus Ghost's on the same cut, pair by pair.

    Args:
        models: a model's name (layers, select, repair) and its rows of `run_tasks`.
    """
    rivals = {_cut(name): rows for name, rows in models if name["repair"] == RIVAL}
    for name, rows in models:
        rival = rivals.get(_cut(name))
        if rival is None or name["repair"] in {RIVAL, "dense"}:
            continue
        for metric in METRICS:
            yield _difference(name, rows, rival, metric)


def _cut(name: Mapping[str, Any]) -> tuple[int, str]:
    return name["layers"], name["select"]


def _difference(
    name: Mapping[str, Any], rows: Rows, rival: Rows, metric: MetricName
) -> dict[str, Any]:
    paired = paired_bootstrap(_answers(rows, metric), _answers(rival, metric), samples=SAMPLES)
    keys = ("layers", "select", "repair")
    return {
        "a": {key: name[key] for key in keys},
        "b": {**{key: name[key] for key in keys}, "repair": RIVAL},
        "metric": metric,
        "difference": paired.difference,
        "stderr": paired.error,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p_value,
    }


def _answers(rows: Rows, metric: MetricName) -> dict[str, Answers]:
    """Every document's score by task; acc where a task has no acc_norm."""
    return {
        row["task"]: Answers(
            tuple(row["documents"]),
            tuple(row[f"{metric}_values"] or row["acc_values"]),
        )
        for row in rows
    }
