"""Types and shapes of the mathematics, checked in every call that a test makes.

Installed by `conftest`, before anything of the package is imported.
"""

from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ("spans", "statistics", "selection", "repairs")

DOORS = frozenset(
    f"ghostlayers.{name}"
    for name in (
        *("repairs", "repairs.arguments", "repairs.method", "repairs.registry"),
        *("selection.methods", "selection.choices"),
    )
)
"""Where users' texts and objects come in: what is wrong is refused there in words of our own."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is wanted


def checked(function: Any) -> Any:
    """With its annotations checked, unless what comes is a user's."""
    module, made = function.__module__, function.__qualname__.endswith(".__init__")
    is_argument = made and module.startswith("ghostlayers.repairs.") and not module.endswith("base")
    return function if module in DOORS or is_argument else check(function)


install_import_hook([f"ghostlayers.{room}" for room in ROOMS], "shapes.checked")
