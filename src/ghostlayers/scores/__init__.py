"""Criteria that say how much a layer, or a span of layers, matters: pure functions of streams."""

from ghostlayers.scores.table import ScoreTable, SpanScore, Step

__all__ = ["ScoreTable", "SpanScore", "Step"]
