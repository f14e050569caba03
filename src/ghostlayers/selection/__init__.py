"""Criteria that say how much a layer, or a span of layers, matters: pure functions of streams."""

from ghostlayers.selection.methods import (
    SELECTIONS,
    Angular,
    Lorp,
    Magnitude,
    Perplexity,
    Recoverable,
    Selection,
    ShortGPT,
    Streamline,
    Taylor,
    find_selection,
)
from ghostlayers.selection.table import Scattered, ScoreTable, SpanScore, Step

__all__ = [
    "SELECTIONS",
    "Angular",
    "Lorp",
    "Magnitude",
    "Perplexity",
    "Recoverable",
    "Scattered",
    "ScoreTable",
    "Selection",
    "ShortGPT",
    "SpanScore",
    "Step",
    "Streamline",
    "Taylor",
    "find_selection",
]
