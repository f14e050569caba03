"""Zero-shot tasks through lm-evaluation-harness, kept document by document."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ghostlayers.errors import CorpusError, DependencyError, ModelError, RecipeError
from ghostlayers.evaluation.task_files import check_code
from ghostlayers.statistics.bootstrap import Answers, PairedDifference, paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MetricName = Literal["acc", "acc_norm"]
METRICS: tuple[MetricName, ...] = ("acc", "acc_norm")

RIGHT = ("acc", "exact_match")
"""What tasks call the share of documents that are answered right: chosen, or written."""


@dataclass(frozen=True)
class Accuracy:
    """An accuracy over documents.

    Attributes:
        mean: as the harness reports it, between 0 and 1.
        error: its standard error, the sample standard deviation over the root of their number;
            NaN for a single document.
        values: every document's, in order.
    """

    mean: float
    error: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class TaskResult:
    """What a model scores on one task.

    Attributes:
        task: its name.
        version: the task file's version, which changes with its prompt.
        num_documents: documents answered.
        available_documents: documents that the task has.
        num_fewshot: examples shown before each question.
        num_truncated: requests whose prompt lost its beginning to fit the model.
        acc: share of documents whose right option is the most likely one, or whose answer was
            written as it is in the document.
        acc_norm: the same with log-likelihoods divided by the options' length in characters; None
            where the task does not measure it.
        documents: hashes that identify the documents, in order.
        measure: what the task calls ``acc``: one of `RIGHT`.
    """

    task: str
    version: str
    num_documents: int
    available_documents: int
    num_fewshot: int
    num_truncated: int
    acc: Accuracy
    acc_norm: Accuracy | None
    documents: tuple[str, ...]
    measure: str = RIGHT[0]

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """The metrics that the task measures."""
        return METRICS[:1] if self.acc_norm is None else METRICS

    def accuracy(self, metric: MetricName) -> Accuracy:
        """One metric; acc where there is no acc_norm."""
        return self.acc if metric == "acc" or self.acc_norm is None else self.acc_norm

    def answers(self, metric: MetricName) -> Answers:
        """Every document's score, for a paired comparison."""
        return Answers(self.documents, self.accuracy(metric).values)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, with every document's."""
        result: dict[str, Any] = {
            "task": self.task,
            "version": self.version,
            "measure": self.measure,
            "num_documents": self.num_documents,
            "available_documents": self.available_documents,
            "num_fewshot": self.num_fewshot,
            "num_truncated": self.num_truncated,
        }
        for name, accuracy in (("acc", self.acc), ("acc_norm", self.acc_norm)):
            result[name] = None if accuracy is None else accuracy.mean
            known = accuracy is not None and not math.isnan(accuracy.error)
            result[f"{name}_error"] = accuracy.error if accuracy and known else None
        result["documents"] = list(self.documents)
        result["acc_values"] = list(self.acc.values)
        result["acc_norm_values"] = None if self.acc_norm is None else list(self.acc_norm.values)
        return result


@dataclass(frozen=True)
class TaskComparison:
    """One model against another, on one task or on the plain mean over several.

    Attributes:
        tasks: the tasks.
        metric: acc, or acc_norm (acc on tasks without it).
        mean: the first model's.
        against: the second's.
        paired: the difference, from the same documents.
    """

    tasks: tuple[str, ...]
    metric: MetricName
    mean: float
    against: float
    paired: PairedDifference

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values."""
        return {
            "tasks": list(self.tasks),
            "metric": self.metric,
            "mean": self.mean,
            "against": self.against,
            **self.paired.to_dict(),
        }


@dataclass(frozen=True)
class TaskReport:
    """What one model scores on tasks, and how it compares with another.

    Attributes:
        results: the model's, one a task.
        against: the other model's, where there is one.
        comparisons: every task and metric, then the means over tasks.
    """

    results: tuple[TaskResult, ...]
    against: tuple[TaskResult, ...] = ()
    comparisons: tuple[TaskComparison, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with the keys that the command line writes."""
        return {
            "tasks": [result.to_dict() for result in self.results],
            "tasks_against": [result.to_dict() for result in self.against],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that were found and read, to be run on one model or several.

    Attributes:
        tasks: the harness's tasks by name.
        seed: what their documents were shuffled with, where a task does so.
        trusted: whether their code may run.
        code: places in their files that run code.
    """

    tasks: dict[str, Any]
    seed: int | None
    trusted: bool = False
    code: tuple[str, ...] = ()


def open_tasks(
    tasks: Sequence[str],
    *,
    tasks_path: str | Path | None = None,
    trust_tasks: bool = False,
    seed: int | None = None,
) -> LoadedTasks:
    """Find tasks by name and read their documents.

    Task files can name Python functions, and their templates are programs. Unless they are
    trusted, files of a folder that would run code are refused, and templates run in a sandbox.
    Files that come with lm-evaluation-harness are as trusted as that package.

    Args:
        tasks: names of tasks, or of groups and tags, which stand for the tasks in them.
        tasks_path: a folder of task files, which come before the harness's own of the same name.
            If it holds all of the tasks, nothing else is read.
        trust_tasks: let task files of the folder, templates and metrics run code.
        seed: for few-shot examples and shuffled options; None is the harness's own.

    Raises:
        DependencyError: lm-evaluation-harness is not installed.
        RecipeError: no task, one named twice, an unknown one, one without accuracy, or files that
            run code and are not trusted.
        CorpusError: there is no such folder, or documents cannot be read.
    """
    names = list(tasks)
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"name at least one task, and each once; got: {', '.join(names)}.")
    folder = None if tasks_path is None else Path(tasks_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise CorpusError(
            f"there is no folder '{tasks_path}'; --tasks-path wants a folder of YAML."
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise DependencyError(
            "tasks need lm-evaluation-harness, which is not installed: "
            "pip install 'ghostlayers[tasks]'."
        )
    code = [] if folder is None else check_code(folder, trusted=trust_tasks)
    from ghostlayers.evaluation import harness

    manager = harness.find_tasks(names, folder)
    loaded = harness.load_tasks(manager, names, seed, trusted=trust_tasks)
    for name, task in loaded.items():
        _check_metric(name, task)
    return LoadedTasks(loaded, seed, trust_tasks, tuple(code))


def _check_metric(name: str, task: Any) -> None:
    measured = sorted(task.aggregation())
    if not set(RIGHT) & set(measured):
        raise RecipeError(
            f"task '{name}' measures {', '.join(measured) or 'nothing'}; only tasks that measure "
            "acc (multiple choice, or a word to guess) or exact_match (an answer to write) can be "
            "compared here."
        )


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str] | LoadedTasks,
    *,
    tasks_path: str | Path | None = None,
    trust_tasks: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int | None = None,
) -> list[TaskResult]:
    """Run tasks on a model in memory, as it is: hooks and changed layers included.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; not changed.
        tasks: names as for `open_tasks`, or what that returned.
        tasks_path: a folder of task files.
        trust_tasks: let them run code.
        limit: the first so many documents of each task; all where None.
        batch_size: options of answers at a time; changes results by rounding only.
        seed: as for `open_tasks`.

    Returns:
        One result a task, in the order given.

    Raises:
        GhostlayersError: as `open_tasks`.
        ModelError: the tokenizer has neither a BOS nor an EOS token, which the harness needs.
        RecipeError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"'limit' must be at least 1, got {limit}.")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has neither a BOS nor an EOS token; lm-evaluation-harness starts empty "
            "prompts with one. Set tokenizer.eos_token first."
        )
    if not isinstance(tasks, LoadedTasks):
        tasks = open_tasks(tasks, tasks_path=tasks_path, trust_tasks=trust_tasks, seed=seed)
    from ghostlayers.evaluation import harness

    quiet_model = harness.QuietModel(model, tokenizer, batch_size)
    outcome = harness.run_tasks(quiet_model, tasks.tasks, limit, tasks.seed, trusted=tasks.trusted)
    return [_result(name, outcome, quiet_model.truncated[name]) for name in tasks.tasks]


def tokens_to_answer(
    tasks: LoadedTasks, tokenizer: "PreTrainedTokenizerBase", limit: int | None
) -> int:
    """About how many tokens one model reads to answer tasks, every option counted."""
    from ghostlayers.evaluation import harness

    return harness.count_tokens(tasks.tasks, tokenizer, limit, tasks.seed, trusted=tasks.trusted)


def _result(task: str, outcome: dict[str, Any], truncated: int) -> TaskResult:
    every = outcome["samples"][task]
    filter_name = every[0]["filter"]  # tasks with several read the same answers in other ways
    samples = [sample for sample in every if sample["filter"] == filter_name]
    reported = outcome["results"][task]
    accuracies = {
        metric: _accuracy(float(reported[f"{metric},{filter_name}"]), metric, samples)
        for metric in {*METRICS, *RIGHT}
        if f"{metric},{filter_name}" in reported
    }
    measure = next(metric for metric in RIGHT if metric in accuracies)
    return TaskResult(
        task=task,
        version=str(outcome["versions"][task]),
        num_documents=len(samples),
        available_documents=int(outcome["n-samples"][task]["original"]),
        num_fewshot=int(outcome["n-shot"][task] or 0),
        num_truncated=truncated,
        acc=accuracies[measure],
        acc_norm=accuracies.get("acc_norm"),
        documents=tuple(sample["doc_hash"][:16] for sample in samples),
        measure=measure,
    )


def _accuracy(mean: float, metric: str, samples: Sequence[dict[str, Any]]) -> Accuracy:
    from lm_eval.api.metrics import mean_stderr

    values = tuple(float(sample[metric]) for sample in samples)
    error = float(mean_stderr(values)) if len(values) > 1 else math.nan
    return Accuracy(mean, error, values)


def metrics_of(results: Sequence[TaskResult]) -> tuple[MetricName, ...]:
    """The metrics that any of the tasks measures."""
    return METRICS if any(result.acc_norm for result in results) else METRICS[:1]


def mean_over_tasks(results: Sequence[TaskResult], metric: MetricName) -> tuple[float, float]:
    """The plain mean of a metric over tasks, and its standard error.

    Every task counts alike, whatever its size: error = sqrt(sum_t error_t^2) / tasks.
    """
    accuracies = [result.accuracy(metric) for result in results]
    mean = sum(accuracy.mean for accuracy in accuracies) / len(accuracies)
    return mean, math.hypot(*(accuracy.error for accuracy in accuracies)) / len(accuracies)


def compare_tasks(
    results: Sequence[TaskResult],
    against: Sequence[TaskResult],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> list[TaskComparison]:
    """Every task and metric of two models, pair by pair; then, of several, the means over tasks.

    Args:
        results: the first model's.
        against: the second's, on the same tasks in the same order.
        samples: resamples of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: other tasks or other documents.
    """
    compared = [
        _compare([ours], [theirs], metric, samples, seed)
        for ours, theirs in zip(results, against, strict=True)
        for metric in ours.metrics
    ]
    if len(results) > 1:
        measured = metrics_of(results)
        compared += [_compare(results, against, metric, samples, seed) for metric in measured]
    return compared


def _compare(
    results: Sequence[TaskResult],
    against: Sequence[TaskResult],
    metric: MetricName,
    samples: int,
    seed: int,
) -> TaskComparison:
    paired = paired_bootstrap(
        {result.task: result.answers(metric) for result in results},
        {result.task: result.answers(metric) for result in against},
        samples=samples,
        seed=seed,
    )
    return TaskComparison(
        tasks=tuple(result.task for result in results),
        metric=metric,
        mean=mean_over_tasks(results, metric)[0],
        against=mean_over_tasks(against, metric)[0],
        paired=paired,
    )
