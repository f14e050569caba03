"""Which repairs a model has a place for, told before anything is computed."""

from collections.abc import Sequence

from ghostlayers.errors import GhostlayersError, RecipeError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import check_recipe
from ghostlayers.recipe import Recipe
from ghostlayers.repairs.auto import CONTESTANTS
from ghostlayers.spans import Span
from ghostlayers.surgery.features import check_fit_tokens, check_method
from ghostlayers.surgery.stock_layer import check_stock_layer


def check_repair(
    model: DenseModel, recipe: Recipe, spans: Sequence[Span] = (), *, saved: bool = True
) -> None:
    """Refuse a repair that cannot be fitted on a model, or whose result could not be saved.

    Args:
        model: the dense model.
        recipe: names the repair, and how much text it is fitted on.
        spans: the gaps, where they are known.
        saved: a checkpoint is to be made.

    Raises:
        GhostlayersError: with the reason.
    """
    method = recipe.method
    if saved and not method.savable:
        raise RecipeError(
            f"repair '{recipe.repair}' cannot be saved in a checkpoint yet; `ghostlayers compare` "
            "measures it. To save: ghost, normed, joint:x+z, joint:x+norm, piecewise or refit."
        )
    if recipe.export == "stock-layer" and saved:
        check_stock_layer(model.network)
    check_method(model, method, spans)
    check_fit_tokens(model, method, recipe.num_fit_windows * recipe.sequence_length)


def contestants(
    model: DenseModel, recipe: Recipe, spans: Sequence[Span]
) -> tuple[list[str], dict[str, str]]:
    """The repairs that ``auto`` may choose from, and why the others cannot compete.

    Args:
        model: the dense model.
        recipe: says what must load the result, and how much text there is.
        spans: the gaps.
    """
    names: list[str] = []
    refused: dict[str, str] = {}
    for name in CONTESTANTS:
        try:
            named = recipe.repaired_by(name)
            check_recipe(model.network, named.method.form, named.export, name)
            check_repair(model, named, spans)
        except GhostlayersError as error:
            refused[name] = str(error)
        else:
            names.append(name)
    return names, refused
