"""The budget of a recipe: what is counted of its model, how much may be left, what cannot be."""

from collections.abc import Sequence

from ghostlayers.budgets.decide import Budget, check_wished
from ghostlayers.budgets.size import Room, Weights
from ghostlayers.budgets.timing import timed
from ghostlayers.calibration.passes import Runner
from ghostlayers.checkpoint.output import Output
from ghostlayers.checkpoint.packed import packed_base
from ghostlayers.errors import GhostlayersError
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan.saving import CHECKPOINT
from ghostlayers.preparation import check_result
from ghostlayers.recipe import Recipe
from ghostlayers.repairs.auto import CONTESTANTS
from ghostlayers.spans import Span


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


def check_what_follows(dense: DenseModel, recipe: Recipe, output: Output | None) -> None:
    """Refuse a result that could not be saved as it is asked for."""
    packed_base(dense, recipe)
    if recipe.wish is not None:
        check_wished(dense, recipe, output or CHECKPOINT)
        if recipe.smaller is not None or (recipe.fits and not dense.residency.offloaded):
            # What needs no text is refused before any is read.
            budget_of(Runner(dense), recipe, output or CHECKPOINT).fewest()
        return
    check_result(dense, recipe)
    (output or CHECKPOINT).check_base(dense, recipe)


def beyond_budget(runner: Runner, budget: Budget | None, spans: Sequence[Span]) -> dict[str, str]:
    """Repairs with which a cut would break its budget of bytes, each with the reason.

    What an operator costs of time is bounded by the recipe's overhead.
    """
    if budget is None or budget.wish.kind == "faster":
        return {}
    reasons = {}
    for name in CONTESTANTS:
        try:
            is_met = budget_of(runner, budget.recipe.repaired_by(name), budget.output).met(spans)
        except GhostlayersError:  # it could not compete anyway
            continue
        if not is_met:
            reasons[name] = f"breaks the budget ({budget.wish}) by what it adds"
    return reasons
