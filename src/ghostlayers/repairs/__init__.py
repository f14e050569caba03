"""Closed-form repairs of a gap, one method a file: each a pure function of moments.

To add one: write its file, add its row here, and its row in ``tests/test_repairs.py``.
"""

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.repairs.base import FitOptions, Method, Repair
from ghostlayers.repairs.ghost import GHOST
from ghostlayers.repairs.linearpatch import LINEARPATCH_DIAG, LINEARPATCH_HADAMARD
from ghostlayers.repairs.none import NONE

METHODS: dict[str, Method] = {
    method.name: method for method in (NONE, LINEARPATCH_DIAG, LINEARPATCH_HADAMARD, GHOST)
}


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        RecipeError: there is none; the message names near ones.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown repair '{name}'. {suggest(name, METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "FitOptions", "Method", "Repair", "find_method"]
