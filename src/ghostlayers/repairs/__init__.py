"""Closed-form repairs of a gap, one method a file: each a pure function of what was gathered there.

To add one: write its file, add its row here, and its row in ``tests/test_repairs.py``.
"""

from collections.abc import Callable

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import FitOptions, Method, Repair
from ghostlayers.repairs.ghost import make_ghost
from ghostlayers.repairs.joint import make_joint, make_normed
from ghostlayers.repairs.linearpatch import make_linearpatch
from ghostlayers.repairs.magnitude import make_magnitude
from ghostlayers.repairs.none import make_none
from ghostlayers.repairs.piecewise import make_piecewise
from ghostlayers.repairs.refit import make_refit
from ghostlayers.repairs.replaceme import make_replaceme
from ghostlayers.repairs.restricted import make_restricted

METHODS: dict[str, Callable[[Arguments], Method]] = {
    "none": make_none,
    "magnitude": make_magnitude,
    "linearpatch-diag": make_linearpatch,
    "linearpatch-hadamard": make_linearpatch,
    "diagonal": make_restricted,
    "hadamard": make_restricted,
    "symmetric": make_restricted,
    "procrustes": make_restricted,
    "replaceme": make_replaceme,
    "refit": make_refit,
    "ghost": make_ghost,
    "normed": make_normed,
    "joint": make_joint,
    "piecewise": make_piecewise,
}

ALL: tuple[str, ...] = (
    "none",
    "magnitude",
    "linearpatch-diag",
    "linearpatch-hadamard",
    "diagonal",
    "hadamard",
    "symmetric",
    "procrustes",
    "replaceme",
    "replaceme:cosine",
    "replaceme:cosine:accurate",
    "replaceme:cosine-from-ls",
    "refit:1",
    "refit:2",
    "refit:3",
    "ghost",
    "ghost:affine",
    "ghost:rank=64",
    "ghost:ridge=auto",
    "normed",
    "joint:x+m",
    "joint:x+z",
    "joint:x+norm",
    "joint:o+z",
    "joint:x+o+z",
    "joint:x+phi",
    "piecewise:4",
    "piecewise:8",
    "joint:x+z:refit=2",
    "piecewise:8:z",
)
"""What ``--repair all`` compares."""


def find_method(name: str) -> Method:
    """The method of this name, its arguments included: ``ghost``, ``joint:x+z``, ``refit:2``.

    Raises:
        RecipeError: there is none; the message names near ones. Or its arguments mean nothing.
    """
    arguments = Arguments(name)
    if arguments.name not in METHODS:
        raise RecipeError(f"unknown repair '{arguments.name}'. {suggest(arguments.name, METHODS)}")
    return METHODS[arguments.name](arguments)


__all__ = ["ALL", "METHODS", "FitOptions", "Method", "Repair", "find_method"]
