r"""Ghosted Layers: the unconstrained least-squares map across a gap.

References:
    Yun, Jo, Karimireddy, Lee, *Ghosted Layers*, arXiv:2605.15491: W* = I + M*,
    M* = argmin ||X M - D||_F^2, solved there as (X'X + 1e-6 I) M = X'D in float64.
"""

from ghostlayers.moments import Moments
from ghostlayers.repairs.base import FitOptions, Method, Repair, relative_residual
from ghostlayers.repairs.solve import condition_number, solve_ridge


def fit_ghost(moments: Moments, options: FitOptions) -> Repair:
    r"""M* = argmin ||X M - D||_W^2, damped as the options say.

    With unit token weights, ridge 0 and absolute ridge 1e-6 this is the paper's operator. Token
    weights 1/||y||^2 keep a few tokens of enormous norm from taking the whole fit: across the layer
    in which such a massive activation is born, no linear map can create it, and an unweighted fit
    spends itself on trying.

    Args:
        moments: of features X (the stream before the cut).
        options: damping; changes the answer.

    Raises:
        InsufficientTokensError: fewer tokens than channels.
        SingularError: the normal equations are singular and undamped.
    """
    delta = solve_ridge(moments, options)
    return Repair(
        method="ghost",
        delta=delta,
        num_tokens=moments.num_tokens,
        relative_residual=relative_residual(moments, delta),
        condition_number=condition_number(moments, options) if options.report_condition else None,
    )


GHOST = Method("ghost", "Ghosted Layers, arXiv:2605.15491", fit_ghost, weighs_tokens=True)
