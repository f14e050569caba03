r"""Which of several candidates loses least, on as few windows of text as tell.

All candidates are measured on the same windows, so that their differences vary much less than their
losses. Tokens of a window are not independent, so the unit is a window's mean loss. After 4, 8, 16,
... windows, a candidate leaves whose mean difference d to the leader is more than

    t(1 - p, windows - 1) s / sqrt(windows),

s the standard deviation of the differences and t Student's quantile. When one is left, or all
windows are spent, the lowest mean loss wins; nothing else decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

FIRST_WINDOWS = 4
"""Windows before any candidate may leave; then twice as many, and so on."""

LEAVES_AT = 0.005
"""Chance, at each look, that a candidate as good as the leader leaves. There are few looks, since
windows double: ``tests/test_race.py`` simulates what they add up to."""

Measure = Callable[[Sequence[str], int, int], Mapping[str, Float[Tensor, " windows"]]]
"""Mean losses of the windows from one number to another, of some candidates by name."""


@dataclass(frozen=True)
class Race:
    """Losses of candidates that were compared on the same windows.

    Attributes:
        losses: mean loss of every window in nats, by candidate; of the first windows only for one
            that left.
        left: those that left.
    """

    losses: Mapping[str, Float[Tensor, " windows"]]
    left: frozenset[str] = field(default=frozenset())

    @property
    def running(self) -> list[str]:
        """Those that are still measured."""
        return [name for name in self.losses if name not in self.left]

    @property
    def best(self) -> str:
        """The lowest loss of those that were measured to the end; the first of equal ones."""
        return min(self.running, key=lambda name: float(self.losses[name].mean()))

    def behind(self, name: str) -> tuple[float, float]:
        """How much more it loses than the best on the windows of both, and the standard error.

        One window tells no error: it is then 0.
        """
        mine = self.losses[name]
        difference = mine - self.losses[self.best][: len(mine)]
        count = len(difference)
        error = float(difference.std()) / count**0.5 if count > 1 else 0.0
        return float(difference.mean()), error

    def hopeless(self, name: str) -> bool:
        """Whether a candidate has fallen too far behind to be measured any further."""
        count = len(self.losses[name])
        if name == self.best or count < FIRST_WINDOWS:
            return False
        difference, error = self.behind(name)
        return difference > student_quantile(1.0 - LEAVES_AT, count - 1) * error


def run_race(names: Sequence[str], measure: Measure, budget: int) -> Race:
    """Measure candidates until one is left or the windows are spent.

    Args:
        names: of the candidates.
        measure: see `Measure`; what it gives beside the candidates asked for is passed over.
        budget: windows there are.
    """
    race, done = Race({name: torch.empty(0, dtype=torch.float64) for name in names}), 0
    while done < budget and (done == 0 or len(race.running) > 1):
        stop = min(budget, max(FIRST_WINDOWS, 2 * done))
        measured = measure(race.running, done, stop)
        losses = {
            name: before if name in race.left else torch.cat([before, measured[name].double()])
            for name, before in race.losses.items()
        }
        race, done = Race(losses, race.left), stop
        gone = [name for name in race.running if race.hopeless(name)]
        race = Race(losses, race.left.union(gone))
    return race


def student_quantile(p: float, freedom: int) -> float:
    """Student's quantile by Cornish and Fisher's expansion about the normal one.

    Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.5; 4 % low at three degrees of
    freedom and p = 0.995, 1 % at five.
    """
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(float(term / freedom**power) for power, term in enumerate(terms, start=1))
