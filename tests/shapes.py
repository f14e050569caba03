"""Types and shapes of the mathematics, checked in every call that a test makes.

Installed by `conftest`, before anything of the package is imported.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ("spans", "statistics", "selection", "repairs")

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is wanted

install_import_hook([f"ghostlayers.{room}" for room in ROOMS], "shapes.checked")
