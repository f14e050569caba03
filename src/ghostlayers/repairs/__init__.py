"""Closed-form repairs of a gap, one a file: each a pure function of what was gathered there.

To add one: write its class, name it in `METHODS` here, and in ``tests/test_repairs.py``. Another
package adds its own by an entry point of the group ``ghostlayers.repairs``; see
``docs/how-to/extend.md``.
"""

from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Fold,
    Needs,
    Operator,
    Repair,
    linear,
    linear_repair,
)
from ghostlayers.repairs.ghost import Ghost
from ghostlayers.repairs.joint import Joint, Normed
from ghostlayers.repairs.linearpatch import LinearPatchDiagonal, LinearPatchHadamard
from ghostlayers.repairs.magnitude import Magnitude
from ghostlayers.repairs.method import LeastSquares, RepairMethod, Stage
from ghostlayers.repairs.none import NoRepair
from ghostlayers.repairs.piecewise import Piecewise
from ghostlayers.repairs.refit import Refit
from ghostlayers.repairs.registry import Registry
from ghostlayers.repairs.replaceme import ReplaceMe
from ghostlayers.repairs.restricted import Diagonal, Hadamard, Procrustes, Symmetric
from ghostlayers.repairs.solve import regress

METHODS: dict[str, type[RepairMethod]] = {
    cls.keyword: cls
    for cls in (
        NoRepair,
        Magnitude,
        LinearPatchDiagonal,
        LinearPatchHadamard,
        Diagonal,
        Hadamard,
        Symmetric,
        Procrustes,
        ReplaceMe,
        Refit,
        Ghost,
        Normed,
        Joint,
        Piecewise,
    )
}
"""Our classes by keyword."""

REPAIR_REGISTRY: Registry[RepairMethod] = Registry(
    "repair",
    RepairMethod,  # type: ignore[type-abstract]
    METHODS,
)
"""Ours, and those of other packages."""

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


def find_method(given: str | RepairMethod) -> RepairMethod:
    """The repair that a text names, its arguments included: ``ghost``, ``joint:x+z``, ``refit:2``.

    Args:
        given: the text, or an object, which is given back.

    Raises:
        RecipeError: there is none; the message names near ones. Or its arguments mean nothing.
    """
    return REPAIR_REGISTRY.find(given)


__all__ = [
    "ALL",
    "METHODS",
    "Diagonal",
    "Evidence",
    "FitOptions",
    "Fold",
    "Ghost",
    "Hadamard",
    "Joint",
    "LeastSquares",
    "LinearPatchDiagonal",
    "LinearPatchHadamard",
    "Magnitude",
    "Needs",
    "NoRepair",
    "Normed",
    "Operator",
    "Piecewise",
    "Procrustes",
    "Refit",
    "Repair",
    "RepairMethod",
    "ReplaceMe",
    "Stage",
    "Symmetric",
    "argument",
    "find_method",
    "linear",
    "linear_repair",
    "regress",
]
