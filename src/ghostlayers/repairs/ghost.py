r"""Ghosted Layers: the unconstrained least-squares map across a gap.

References:
    Yun, Jo, Karimireddy, Lee, *Ghosted Layers*, arXiv:2605.15491: W* = I + M*,
    M* = argmin ||X M - D||_F^2, solved there as (X'X + 1e-6 I) M = X'D in float64.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Method,
    Needs,
    Operator,
    Repair,
    linear,
    relative_residual,
)
from ghostlayers.repairs.linearpatch import PER
from ghostlayers.repairs.ridge import with_ridge
from ghostlayers.repairs.solve import regress
from ghostlayers.statistics.moments import Moments


def fit_ghost(
    evidence: Evidence,
    options: FitOptions,
    *,
    affine: bool = False,
    rank: int | None = None,
    name: str = "ghost",
) -> Repair:
    r"""M* = argmin ||X M - D||_W^2, damped as the options say.

    With unit token weights, ridge 0 and absolute ridge 1e-6 this is the paper's operator. Token
    weights 1/||y||^2 keep a few tokens of enormous norm from taking the whole fit: across the layer
    in which such a massive activation is born, no linear map can create it, and an unweighted fit
    spends itself on trying.

    Args:
        evidence: moments of X (the stream before the cut), and of the constant for ``affine``.
        options: damping; changes the answer.
        affine: also fit a bias.
        rank: of the best map of that rank in the fit's own metric (reduced-rank regression).
        name: of the result.

    Raises:
        InsufficientTokensError: fewer tokens than channels.
        SingularError: the normal equations are singular and undamped.
    """
    chosen = evidence.select(("x", "one") if affine else ("x",))
    last = rank is None  # a map of lower rank is found in the same metric
    solution = regress(chosen, options, overwrite=chosen.expendable and last)
    weight, residual = solution.weight, solution.relative_residual
    hidden = weight.shape[1]
    operator = linear(weight[:hidden], weight[hidden] if affine else None)
    if rank is not None and rank < hidden:
        reduce, expand = reduced_rank(chosen.moments, weight, rank)
        residual = relative_residual(chosen.moments, reduce @ expand)
        operator = _low_rank(reduce, expand, affine=affine)
    return Repair(
        name,
        operator,
        num_tokens=chosen.moments.num_tokens,
        relative_residual=residual,
        condition_number=solution.condition_number,
        ridge=solution.ridge,
    )


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


def make_ghost(arguments: Arguments) -> Method:
    """``ghost``, ``ghost:affine``, ``ghost:rank=R``, ``ghost:ridge=auto``, ``ghost:per=layer``.

    One operator a gap is what the paper says; its released code does so for one run of layers, and
    fits one for every removed layer where these lie apart.
    """
    affine, ridge = arguments.flag("affine"), arguments.ridge()
    per_layer = arguments.choice("per", PER) == "layer"
    rank = arguments.whole_number(arguments.value("rank"), "rank")
    arguments.finish()
    fit = partial(fit_ghost, affine=affine, rank=rank, name=arguments.text)
    source = "Ghosted Layers, arXiv:2605.15491"
    method = Method(arguments.text, source, fit, Needs(("x",)), stacks=True, per_layer=per_layer)
    if affine:
        method = replace(method, needs=Needs(("x", "one")))
    return with_ridge(method, ridge)
