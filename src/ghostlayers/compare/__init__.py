"""Many cuts and repairs of one model, under one protocol: results, page and tables."""

from ghostlayers.compare.engine import compare
from ghostlayers.compare.request import Comparison

__all__ = ["Comparison", "compare"]
