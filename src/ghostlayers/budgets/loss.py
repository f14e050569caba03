"""The largest number of layers whose repaired cut stays within a loss, on held-out windows.

For each number that is tried, layers are chosen and repaired as for the result, and the loss of
every held-out window is taken beside the dense model's. The differences of windows vary much less
than their losses; a number stays within the budget where their mean, and what their standard
error allows with 95 % confidence beyond it (Student's one-sided bound), does.

Numbers are tried by doubling until one is beyond, then by halving the gap. That takes the loss to
rise with the number of layers. Where it does not, a larger number that would do may be missed; the
one that is found was measured itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ghostlayers.budgets.decide import refusal, settled
from ghostlayers.calibration import search
from ghostlayers.calibration.cuts import window_losses
from ghostlayers.calibration.fits import make_fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.measuring import StudyLike
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.checkpoint.output import Output
from ghostlayers.errors import InputError, counted
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.decision import Decision
from ghostlayers.spans import format_layers, removed_layers
from ghostlayers.statistics.race import student_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Tried:
    """A repaired cut, and how much more it loses than the dense model.

    Attributes:
        cut: with its repairs.
        more: nats a token by window, [windows].
    """

    cut: ChosenCut
    more: Float[Tensor, " windows"]

    @property
    def layers(self) -> int:
        """How many are gone."""
        return sum(map(len, self.cut.spans))

    @property
    def mean(self) -> float:
        """Nats more, over all windows."""
        return float(self.more.mean())

    @property
    def error(self) -> float:
        """Standard error of that."""
        return float(self.more.std() / math.sqrt(len(self.more)))

    @property
    def bound(self) -> float:
        """At most so much, with 95 % confidence."""
        return self.mean + student_quantile(CONFIDENCE, len(self.more) - 1) * self.error

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "layers": self.layers,
            "removed": removed_layers(self.cut.spans),
            "more_nats": self.mean,
            "error": self.error,
            "bound": self.bound,
        }

    def __str__(self) -> str:
        return (
            f"{self.layers} ({format_layers(removed_layers(self.cut.spans))}) "
            f"{self.mean:.3f} ± {self.error:.3f}"
        )


def numbers_that_may_go(dense: DenseModel, recipe: Recipe, output: Output) -> list[int]:
    """The numbers of layers that a search may try."""
    every = range(1, dense.num_layers)
    return [n for n in every if refusal(dense, settled(recipe, n), output) is None]


def most_tries(numbers: int) -> int:
    """Of so many numbers, at most so many are tried."""
    return 2 * numbers.bit_length() - 1


def search_loss(study: StudyLike, output: Output) -> ChosenCut:
    """The deepest cut that stays within the recipe's ``max_loss``, with its repairs.

    Args:
        study: what to choose, fit and measure on.
        output: what is made of the result.

    Raises:
        InputError: even the fewest layers lose more.
    """
    recipe = study.recipe
    assert recipe.max_loss is not None
    numbers = numbers_that_may_go(study.runner.model, recipe, output)
    tried: dict[int, Tried] = {}

    def within(place: int) -> bool:
        tried[place] = _try(study, numbers[place])
        return tried[place].bound <= float(recipe.max_loss or 0.0)

    place = last_within(len(numbers), within)
    every = sorted(tried.values(), key=lambda trial: trial.layers)
    if place is None:
        raise InputError(_out_of_reach(recipe, every[0]))
    return replace(tried[place].cut, decision=_decision(recipe, tried[place], every))


def last_within(count: int, within: Callable[[int], bool]) -> int | None:
    """The last place, of so many, that is within, if those before it are; None if the first is not.

    By doubling, then by halving.
    """
    good, step, beyond = -1, 1, count
    while good + 1 < beyond:
        place = min(good + step, beyond - 1)
        if not within(place):
            beyond = place
            break
        good, step = place, 2 * step
    while beyond - good > 1:
        place = (good + beyond) // 2
        good, beyond = (place, beyond) if within(place) else (good, place)
    return None if good < 0 else good


def _try(study: StudyLike, count: int) -> Tried:
    recipe = study.recipe
    held = {"held_out_windows": recipe.num_held_out_windows}
    own = settled(recipe, count, **held, race_windows=recipe.num_race_windows)
    here: Any = replace(study, recipe=own)  # type: ignore[type-var]
    cut = search.choose(here)
    repairs = cut.repairs
    if repairs is None:
        windows = study.windows.first(own.num_fit_windows)
        repairs = fit_gaps(study.runner, windows, cut.spans, make_fitting(study.runner.model, own))
    title = f"Measuring {counted(count, 'layer')} less"
    mine, dense = window_losses(study.runner, study.held_out, repairs, title=title)
    return Tried(replace(cut, repairs=repairs), mine - dense)


def _decision(recipe: Recipe, chosen: Tried, every: Sequence[Tried]) -> Decision:
    beyond = [trial for trial in every if trial.layers > chosen.layers]
    says = [
        f"{counted(chosen.layers, 'layer')} less: "
        f"{chosen.mean:.3f} ± {chosen.error:.3f} nats a token above dense on {len(chosen.more)} "
        f"held-out windows, at most {chosen.bound:.3f} with 95% confidence.",
        f"Tried (layers, nats above dense ± standard error): {'; '.join(map(str, every))}.",
    ]
    if not beyond:
        says.append("No larger number may go.")
    figures = {
        "counted": "loss",
        "unit": "nats a token above dense",
        "predicted": chosen.mean,
        "error": chosen.error,
        "bound": chosen.bound,
        "limit": recipe.max_loss,
        "windows": len(chosen.more),
        "tried": [trial.to_dict() for trial in every],
    }
    return Decision(str(recipe.wish), chosen.layers, tuple(says), figures)


def _out_of_reach(recipe: Recipe, least: Tried) -> str:
    near = least.mean <= float(recipe.max_loss or 0.0)
    more = " More held-out windows (--held-out-windows) would tell better." if near else ""
    return (
        f"{recipe.wish} is out of reach: without {counted(least.layers, 'layer')} "
        f"({format_layers(removed_layers(least.cut.spans))}), the fewest that may go, the repaired "
        f"model loses {least.mean:.3f} ± {least.error:.3f} nats a token more than the dense one on "
        f"{len(least.more)} held-out windows, which may be {least.bound:.3f} with 95% confidence."
        f"{more}"
    )
