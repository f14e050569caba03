"""Criteria that say how much a layer, or a span of layers, matters: pure functions of streams."""

from ghostlayers.selection.table import Scattered, ScoreTable, SpanScore, Step

__all__ = ["Scattered", "ScoreTable", "SpanScore", "Step"]
