"""What a search by loss takes at most: the passes of one number of layers, for all it tries."""

from collections.abc import Callable
from dataclasses import replace

from ghostlayers.budgets.decide import settled
from ghostlayers.budgets.loss import most_tries, numbers_that_may_go
from ghostlayers.calibration.scoring import SWEEP
from ghostlayers.checkpoint.output import Output
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan.units import Plan, Predicted
from ghostlayers.recipe import Recipe


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
    return replace(one, lines=tuple(_often(line, tries) for line in one.lines))


def _often(line: Predicted, tries: int) -> Predicted:
    """A line for every number that is tried; one sweep serves all, and one result is written."""
    if line.name == SWEEP or line.disk:
        return line
    name = f"{line.name}, {tries} times at most"
    return replace(line, name=name, seconds=line.seconds * tries, flops=line.flops * tries)
