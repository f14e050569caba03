"""What tasks look like on the screen: a table a model, and the differences pair by pair."""

import math
from collections.abc import Sequence

from ghostlayers.cli import screen
from ghostlayers.evaluation import LoadedTasks, TaskComparison, TaskReport, TaskResult
from ghostlayers.evaluation.task_files import listed
from ghostlayers.evaluation.tasks import mean_over_tasks, metrics_of


def warn_of_code(tasks: LoadedTasks) -> None:
    """Say what runs because the user has allowed it."""
    if tasks.code:
        screen.warn(f"code of task files runs: {listed(tasks.code)}.")


def show_tasks(report: TaskReport, model: str, against: str | None) -> None:
    """Accuracies of one model or two, then their differences."""
    _show_results(report.results, f"Tasks: {model}")
    if against is not None:
        _show_results(report.against, f"Tasks: {against}")
        _show_comparisons(report.comparisons, f"Difference: {model} - {against}")
    _show_notes(report)


def _show_results(results: Sequence[TaskResult], title: str) -> None:
    rows = [
        [
            each.task,
            each.version,
            f"{each.num_documents:,}",
            _cell(each.acc.mean, each.acc.error),
            "" if each.acc_norm is None else _cell(each.acc_norm.mean, each.acc_norm.error),
        ]
        for each in results
    ]
    if len(results) > 1:
        documents = f"{sum(each.num_documents for each in results):,}"
        means = [_cell(*mean_over_tasks(results, metric)) for metric in metrics_of(results)]
        rows.append(["mean of tasks", "", documents, *means, ""][:5])
    columns = ("task", "version", "documents", "acc, %", "acc_norm, %")
    screen.table(columns, rows, title)


def _cell(mean: float, error: float) -> str:
    return f"{mean:.2%}".rstrip("%") + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def _show_comparisons(comparisons: Sequence[TaskComparison], title: str) -> None:
    rows = []
    for each in comparisons:
        name = each.tasks[0] if len(each.tasks) == 1 else "mean of tasks"
        paired = each.paired
        rows.append(
            [
                name,
                each.metric,
                f"{100 * paired.difference:+.2f} ± {100 * paired.error:.2f}",
                f"{100 * paired.low:+.2f} to {100 * paired.high:+.2f}",
                _p_value(paired.p_value, paired.samples),
            ]
        )
    columns = ("task", "metric", "points", "95 % interval", "p")
    screen.table(columns, rows, title)


def _p_value(value: float, samples: int) -> str:
    return f"< {2 / samples:.4f}" if value == 0 else f"{value:.4f}"


def protocol(results: Sequence[TaskResult]) -> str:
    """How accuracies were measured, in one line."""
    shots = [f"{each.task} {each.num_fewshot}" for each in results if each.num_fewshot]
    some = [
        f"{each.task} {each.num_documents:,} of {each.available_documents:,}"
        for each in results
        if each.num_documents < each.available_documents
    ]
    return "; ".join(
        (
            f"examples before each question: {', '.join(shots)}" if shots else "zero-shot",
            f"the first documents only: {', '.join(some)}" if some else "all documents",
        )
    )


def _show_notes(report: TaskReport) -> None:
    screen.say(screen.dim(protocol(report.results)))
    without = [each.task for each in report.results if each.acc_norm is None]
    if 0 < len(without) < len(report.results):
        tasks, has = ", ".join(without), "has" if len(without) == 1 else "have"
        screen.say(screen.dim(f"Means of acc_norm take acc for {tasks}, which {has} none."))
    if report.comparisons:
        samples = report.comparisons[0].paired.samples
        screen.say(
            screen.dim(
                f"Differences: paired bootstrap, {samples:,} resamples of the same documents "
                "within each task."
            )
        )
    for each in (*report.results, *report.against):
        if each.num_truncated:
            screen.warn(
                f"{each.num_truncated:,} prompts of {each.task} were longer than the model's "
                "positions and lost their beginning."
            )
