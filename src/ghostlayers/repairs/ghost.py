"""The unconstrained linear map across a gap."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Needs,
    Operator,
    Repair,
    linear,
    relative_residual,
)
from ghostlayers.repairs.method import LeastSquares, Per
from ghostlayers.repairs.solve import regress
from ghostlayers.statistics.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Ghost(LeastSquares):
    """Ghosted Layers: the best unconstrained linear map of the stream.

    y = x + x M (+ b), M = argmin ||X M - D||_W^2. With uniform token weights, ridge 0 and absolute
    ridge 1e-6 this is the paper's operator. Weights 1/||y||^2 keep a few tokens of enormous norm
    from taking the whole fit: across the layer in which such a massive activation is born, no
    linear map can create it, and an unweighted fit spends itself on trying.

    Cost: one product of hidden x hidden a token; 2 rank x hidden with a rank.

    Attributes:
        affine: also fit a bias.
        rank: of the best map of that rank in the fit's own metric (reduced-rank regression).
        per: one operator a ``gap``, as the paper says, or for every removed ``layer``, as its
            released code does where layers lie apart.

    References:
        Yun, Jo, Karimireddy, Lee, *Ghosted Layers*, arXiv:2605.15491: W* = I + M*,
        M* = argmin ||X M - D||_F^2, solved there as (X'X + 1e-6 I) M = X'D in float64.
    """

    keyword = "ghost"
    source = "Ghosted Layers, arXiv:2605.15491"
    stacks = True

    affine: bool = argument(False, note="with a constant")
    rank: int | None = argument(None, note="with an operator of limited rank")
    per: Per = argument("gap", note="one operator for every removed layer where these lie apart")

    @property
    def gathers(self) -> Needs:
        return Needs(("x", "one") if self.affine else ("x",))

    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        """M*, and the best map of its rank.

        Raises:
            InsufficientTokensError: fewer tokens than channels.
            SingularError: the normal equations are singular and undamped.
        """
        chosen = evidence.select(self.gathers.features)
        last = self.rank is None  # a map of lower rank is found in the same metric
        solution = regress(chosen, options, overwrite=chosen.expendable and last)
        weight = solution.weight
        hidden = weight.shape[1]
        operator = linear(weight[:hidden], weight[hidden] if self.affine else None)
        if self.rank is not None and self.rank < hidden:
            reduce, expand = reduced_rank(chosen.moments, weight, self.rank)
            left = relative_residual(chosen.moments, reduce @ expand)
            solution = replace(solution, relative_residual=left)
            operator = _low_rank(reduce, expand, affine=self.affine)
        return solution.repair(self.name, operator)


def reduced_rank(
    moments: Moments, weight: Float[Tensor, "features hidden"], rank: int
) -> tuple[Float[Tensor, "features rank"], Float[Tensor, "rank hidden"]]:
    """The best map of a rank in the fit's metric: M V V', V the leading directions of X M.

    Izenman, *Reduced-rank regression*, J. Multivariate Anal. 5 (1975).
    """
    fitted = weight.T @ moments.gram @ weight
    _, vectors = torch.linalg.eigh(fitted)
    leading = vectors[:, -rank:]
    return weight @ leading, leading.T


def _low_rank(reduce: Tensor, expand: Tensor, *, affine: bool) -> Operator:
    hidden = expand.shape[1]
    parameters = {"reduce": reduce[:hidden].T.contiguous(), "expand": expand.T.contiguous()}
    if affine:
        parameters["bias"] = reduce[hidden] @ expand
    return Operator(parameters)
