"""A budget in seconds: timed once in a run, and kept in its journal."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ghostlayers.budgets import speed
from ghostlayers.budgets.speed import Point, Seconds
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.wish import AT, place_in
from ghostlayers.runtime.machine import processor_name
from ghostlayers.runtime.parallel import by_first, from_first
from ghostlayers.spans import Span


@dataclass(frozen=True)
class Timed:
    """Seconds of a model at one point, by parts.

    Attributes:
        point: where it was measured.
        seconds: of the parts.
        device: what it was measured on.
    """

    point: Point
    seconds: Seconds
    device: str

    def of(self, spans: Sequence[Span]) -> float:
        """Seconds without these layers, the repair included."""
        return self.seconds.of(spans)

    def bare(self, spans: Sequence[Span]) -> float:
        """The same without a repair."""
        return self.seconds.bare(spans)

    @property
    def layers(self) -> tuple[float, ...]:
        """Seconds of every decoder layer."""
        return self.seconds.layers


def point_of(recipe: Recipe) -> Point:
    """Where a recipe's speed is measured."""
    return Point(recipe.speed or "decode", *place_in(recipe.at or AT))


def timed(runner: Runner, recipe: Recipe) -> Timed:
    """Time a model as a recipe asks; a run that goes on takes what it has timed before.

    Of several processes the first one does, while the others wait.

    Raises:
        GhostlayersError: see `speed.time_parts`.
    """
    point, dense = point_of(recipe), runner.model
    speed.check_point(dense, point)
    seconds = torch.zeros(dense.num_layers + 2, dtype=torch.float64)
    record = None if runner.journal is None else runner.journal.next_pass("seconds")
    if record is not None:
        record.restore({"seconds": seconds})
    if not from_first(bool(seconds.any())):
        seconds.copy_(
            torch.tensor(by_first(lambda: _measured(runner, recipe, point)), dtype=seconds.dtype)
        )
        if record is not None:
            record.keep({"seconds": seconds})
    rest, operator, *layers = from_first(seconds.tolist())
    threads = f", threads: {torch.get_num_threads()}" if dense.device.type == "cpu" else ""
    kind = str(dense.dtype).removeprefix("torch.")
    device = f"{processor_name(dense.device)}{threads}, {kind}"
    return Timed(point, Seconds(tuple(layers), rest, operator), device)


def _measured(runner: Runner, recipe: Recipe, point: Point) -> list[float]:
    dense = runner.model
    parts = speed.time_parts(dense, point)
    return [parts.rest, repair_seconds(dense, recipe, point, parts), *parts.layers]


def repair_seconds(dense: DenseModel, recipe: Recipe, point: Point, parts: Seconds) -> float:
    """What the repair of one gap takes: its operator, or the layer that it is written as."""
    if recipe.export == "stock-layer":
        return statistics.fmean(parts.layers)
    return speed.time_operator(dense, recipe.method, point)
