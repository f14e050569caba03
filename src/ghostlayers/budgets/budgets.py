"""The budget of a recipe: what is counted of its model, and how much may be left."""

from ghostlayers.budgets.decide import Budget
from ghostlayers.budgets.size import Room, Weights
from ghostlayers.budgets.timing import timed
from ghostlayers.calibration.passes import Runner
from ghostlayers.checkpoint.output import Output
from ghostlayers.recipe import Recipe


def budget_of(runner: Runner, recipe: Recipe, output: Output) -> Budget:
    """What a recipe's wish for bytes or speed comes to for a model; speed is measured.

    Args:
        runner: of the dense model.
        recipe: with ``smaller``, ``faster`` or ``fits``.
        output: what is made of the result.

    Raises:
        GhostlayersError: it cannot be counted or timed.
    """
    wish, dense = recipe.wish, runner.model
    assert wish is not None
    weights = Weights(dense, recipe, output, recipe.as_type)
    if wish.kind == "smaller":
        return Budget(dense, recipe, output, weights, (1 - wish.value) * weights.of(()))
    if wish.kind == "fits":
        room = Room.of_model(weights, recipe.context)
        return Budget(dense, recipe, output, room, wish.value)
    seconds = timed(runner, recipe)
    return Budget(dense, recipe, output, seconds, seconds.of(()) / wish.value)
