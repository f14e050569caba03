"""Proof: perplexity, divergence from the dense model, agreement, tasks, speed."""

from ghostlayers.evaluation.perplexity import EvaluationResult, evaluate_windows
from ghostlayers.evaluation.speed import prefill_seconds
from ghostlayers.evaluation.tasks import (
    LoadedTasks,
    TaskComparison,
    TaskReport,
    TaskResult,
    compare_tasks,
    evaluate_tasks,
    open_tasks,
    tokens_to_answer,
)
from ghostlayers.statistics.bootstrap import Answers, PairedDifference, paired_bootstrap
from ghostlayers.statistics.losses import LossSums

__all__ = [
    "Answers",
    "EvaluationResult",
    "LoadedTasks",
    "LossSums",
    "PairedDifference",
    "TaskComparison",
    "TaskReport",
    "TaskResult",
    "compare_tasks",
    "evaluate_tasks",
    "evaluate_windows",
    "open_tasks",
    "paired_bootstrap",
    "prefill_seconds",
    "tokens_to_answer",
]
