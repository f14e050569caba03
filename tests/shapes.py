"""Types and shapes of the mathematics, checked in every call that a test makes.

Installed by `conftest`, before anything of the package is imported.
"""

from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ("spans", "statistics", "selection", "repairs")

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is wanted


def checked(function: Any) -> Any:
    """With its annotations checked, unless they say what it refuses itself."""
    made = function.__qualname__.endswith(".__init__")
    return function if made and is_of_methods(function.__module__) else check(function)


def is_of_methods(module: str) -> bool:
    """Whether a module holds repairs or selections, which have words of their own for wrong ones."""
    if module.startswith("ghostlayers.repairs."):
        return module != "ghostlayers.repairs.base"
    return module == "ghostlayers.selection.methods"


install_import_hook([f"ghostlayers.{room}" for room in ROOMS], "shapes.checked")
