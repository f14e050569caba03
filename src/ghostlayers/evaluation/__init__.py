"""Proof: perplexity, divergence from the dense model, agreement, speed."""

from ghostlayers.evaluation.losses import LossSums
from ghostlayers.evaluation.perplexity import EvaluationResult, evaluate_windows
from ghostlayers.evaluation.speed import prefill_seconds

__all__ = ["EvaluationResult", "LossSums", "evaluate_windows", "prefill_seconds"]
