"""New output projections of kept layers before the gap."""

from dataclasses import dataclass

from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import Evidence, FitOptions, Fold, Needs, Repair
from ghostlayers.repairs.method import LeastSquares, Ridge, Stage
from ghostlayers.repairs.solve import regress


@dataclass(frozen=True)
class Refit(LeastSquares):
    """A new output projection for the last kept MLP (refit:3: for the last three).

    The last kept layer writes z W_down into the stream. Writing z (W_down + B) instead,
    B = argmin ||z B - D||_W^2 (with a bias where the projection has one), folds the repair into a
    weight that is there anyway. With k layers, each in turn, from the first, takes an equal share
    of what is left, on the stream that the ones before it wrote. Where a norm stands behind the
    projection, `through_norm` fits both.

    Cost: none at run time.

    Attributes:
        count: k, kept layers before the gap that are refitted.

    References:
        ours; k = 1 contains ReplaceMe (arXiv:2505.02819), whose B is W_down T.
    """

    keyword = "refit"
    form = "fold"
    through_norm = True
    gathers = Needs(("z", "one"))

    count: int = argument(1, placed=True, what="the number of layers")

    @property
    def before(self) -> tuple[Stage, ...]:
        return refit_stages(self.count, self.ridge)

    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        biased = evidence.mlp_bias is not None
        chosen = evidence.select(("z", "one") if biased else ("z",))
        solution = regress(chosen, options, overwrite=chosen.expendable)
        width = dict(chosen.moments.blocks)["z"]
        bias = solution.weight[width] if biased else None
        return solution.repair(self.name, folds=(Fold(1, solution.weight[:width], bias),))


def refit_stages(count: int, ridge: Ridge) -> tuple[Stage, ...]:
    """The layers count, ..., 2 before the gap, each taking an equal share of what is left."""
    one = Refit(ridge=ridge)
    return tuple(Stage(one.fit, one.needs, back, 1.0 / back) for back in range(count, 1, -1))
