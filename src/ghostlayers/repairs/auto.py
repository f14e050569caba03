"""``--repair auto``: which repairs compete, what each costs at run time, and which one is taken."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.statistics.race import Race

AUTO = "auto"

NONE = "none"

CONTESTANTS: tuple[str, ...] = (
    NONE,
    "magnitude",
    "refit:1:ridge=auto",
    "refit:2:ridge=auto",
    "refit:3:ridge=auto",
    "linearpatch-diag",
    "ghost:ridge=auto",
    "joint:x+z:ridge=auto",
    "joint:x+norm:ridge=auto",
    "piecewise:8:ridge=auto",
    "piecewise:8:z:ridge=auto",
)
"""What competes where it can: of every kind of result the ones that were the best on some model.

``docs/how-to/auto.md`` says where each has won. Whatever solves lets held-out tokens choose its
damping, so that it can be compared on little text, too."""

STAND_IN = "ghost"
STOCK_STAND_IN = "refit:3:ridge=auto"
"""By what layers are chosen before a repair is: `STOCK_STAND_IN` where only what folds will do."""


@dataclass(frozen=True)
class Cost:
    """What a repair costs whoever runs the model.

    Attributes:
        changes: 0 for none, 1 for anything else.
        overhead: share of the kept layers' multiply-adds that its operators add.
        parameters: that they add.
    """

    changes: int
    overhead: float
    parameters: int

    @property
    def kind(self) -> int:
        """What one can tell: 0 for none, 1 for changed weights, 2 for more arithmetic.

        Operators are not told apart: they differ by tenths of a per cent of the layers, which
        ``--overhead`` bounds, and by less than what a tie may hide of their losses.
        """
        return self.changes + int(self.overhead > 0)

    @classmethod
    def of(cls, repairs: Iterable[Repair], layers_products: float) -> "Cost":
        """Of the repairs of all gaps.

        Args:
            repairs: one a gap.
            layers_products: multiply-adds a token of all layers that stay.
        """
        repairs = list(repairs)
        operators = [repair.operator for repair in repairs if repair.operator is not None]
        return cls(
            int(any(repair.changes_something for repair in repairs)),
            sum(map(products_of_a_token, operators)) / layers_products,
            sum(operator.num_parameters for operator in operators),
        )


def products_of_a_token(operator: Operator) -> int:
    """Multiply-adds of an operator for one token: one a number, of pieces those of one piece."""
    pieces = operator.parameters.get("pieces")
    unused = 0 if pieces is None else pieces.numel() - pieces[0].numel()
    return operator.num_parameters - unused


def tied(race: Race) -> list[str]:
    """Candidates that lose at most one standard error more than the best.

    The paired difference's own standard error, as in the rule for the simplest model within one
    standard error of the best (Breiman, Friedman, Olshen & Stone, *Classification and Regression
    Trees*, 1984, 3.4.3).
    """

    def is_near(name: str) -> bool:
        difference, error = race.behind(name)
        return difference <= error

    return [name for name in race.running if is_near(name)]


def decide(race: Race, costs: Mapping[str, Cost]) -> str:
    """The cheapest kind in a tie with the lowest loss, and never one that loses more than none.

    Args:
        race: of the repairs, none among them.
        costs: of each.
    """

    def order(name: str) -> tuple[int, float]:
        return costs[name].kind, race.behind(name)[0]

    chosen = min(tied(race), key=order)
    gains = race.behind(NONE)[0] > race.behind(chosen)[0]
    return chosen if gains else NONE
