"""What to do (`Recipe`), beside how to do it (`RunOptions`).

A recipe determines the result; run options change it by rounding at most.
"""

from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.recipe.recipe import CHOOSING, Recipe, Save
from ghostlayers.runtime.run_options import Offload, RunOptions, TypeName

__all__ = ["CHOOSING", "HealingRecipe", "Offload", "Recipe", "RunOptions", "Save", "TypeName"]
