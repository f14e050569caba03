"""What a run will take: of a number of layers, or of a search for one at most."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ghostlayers.budgets.decide import Budget, settled
from ghostlayers.budgets.loss import most_tries, numbers_that_may_go
from ghostlayers.calibration.scoring import SWEEP
from ghostlayers.checkpoint.output import Output
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan.expected import plan_prune
from ghostlayers.plan.probe import probe_blindly
from ghostlayers.plan.saving import CHECKPOINT
from ghostlayers.plan.units import Plan, Predicted
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.recipe.decision import Decision
from ghostlayers.runtime.parallel import world


def plan_search(
    dense: DenseModel, recipe: Recipe, output: Output, price: Callable[[Recipe], Plan]
) -> Plan:
    """The plan of a budget of loss: a bound, since nothing tells how many numbers it will try.

    Args:
        dense: the model.
        recipe: with ``max_loss``.
        output: what is made of the result.
        price: the plan of a recipe with a number of layers.
    """
    numbers = numbers_that_may_go(dense, recipe, output)
    tries = most_tries(len(numbers))
    held, race = recipe.num_held_out_windows, recipe.num_race_windows
    middle = numbers[len(numbers) // 2]
    one = price(settled(recipe, middle, held_out_windows=held, race_windows=race))
    says = (
        f"of {numbers[0]} to {numbers[-1]} layers, {tries} numbers are tried at most, by doubling "
        "until one loses more and by halving from there; what stays within is measured on "
        f"{held} held-out windows.",
    )
    lines = tuple(_often(line, tries) for line in one.lines)
    return replace(one, lines=lines, budget=Decision(str(recipe.wish), 0, says))


def _often(line: Predicted, tries: int) -> Predicted:
    """A line for every number that is tried; one sweep serves all, and one result is written."""
    if line.name == SWEEP or line.disk:
        return line
    name = f"{line.name}, {tries} times at most"
    return replace(line, name=name, seconds=line.seconds * tries, flops=line.flops * tries)


def plan_run(
    dense: DenseModel,
    recipe: Recipe,
    options: RunOptions,
    started: float,
    output: Output | None,
    budget: Budget | None = None,
) -> Plan:
    """What pruning a model by a recipe takes on this machine, after a probe of a second or two."""
    speed = probe_blindly(dense, recipe.sequence_length, options.batch_size)

    def price(recipe: Recipe) -> Plan:
        how: dict[str, Any] = {"started": started, "output": output, "processes": world().size}
        return plan_prune(dense, recipe, speed, **how)

    if recipe.max_loss is not None:
        return plan_search(dense, recipe, output or CHECKPOINT, price)
    plan = price(recipe)
    if budget is None or recipe.layers is None:
        return plan
    return replace(plan, budget=budget.foreseen(recipe.layers))
