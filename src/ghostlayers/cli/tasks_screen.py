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
            result.task,
            result.version,
            f"{result.num_documents:,}",
            _share(result.acc.mean, result.acc.error),
            "" if result.acc_norm is None else _share(result.acc_norm.mean, result.acc_norm.error),
        ]
        for result in results
    ]
    if len(results) > 1:
        documents = f"{sum(result.num_documents for result in results):,}"
        means = [_share(*mean_over_tasks(results, metric)) for metric in metrics_of(results)]
        rows.append(["mean of tasks", "", documents, *means, ""][:5])
    columns = ("task", "version", "documents", "acc, %", "acc_norm, %")
    screen.table(columns, rows, title)


def _share(mean: float, error: float) -> str:
    return f"{mean:.2%}".rstrip("%") + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def _show_comparisons(comparisons: Sequence[TaskComparison], title: str) -> None:
    rows = []
    for comparison in comparisons:
        name = comparison.tasks[0] if len(comparison.tasks) == 1 else "mean of tasks"
        paired = comparison.paired
        rows.append(
            [
                name,
                comparison.metric,
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
    shots = [f"{result.task} {result.num_fewshot}" for result in results if result.num_fewshot]
    some = [
        f"{result.task} {result.num_documents:,} of {result.available_documents:,}"
        for result in results
        if result.num_documents < result.available_documents
    ]
    written = [result.task for result in results if result.measure != "acc"]
    return "; ".join(
        (
            *([f"answers written, and matched exactly: {', '.join(written)}"] if written else []),
            f"examples before each question: {', '.join(shots)}" if shots else "zero-shot",
            f"the first documents only: {', '.join(some)}" if some else "all documents",
        )
    )


def _show_notes(report: TaskReport) -> None:
    screen.say(screen.dim(protocol(report.results)))
    without = [result.task for result in report.results if result.acc_norm is None]
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
    for result in (*report.results, *report.against):
        if result.num_truncated:
            screen.warn(
                f"{result.num_truncated:,} prompts of {result.task} were longer than the model's "
                "positions and lost their beginning."
            )
