"""Ridge regression from moments: the one linear solve behind every least-squares repair."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import InsufficientTokensError, NonFiniteError, SingularError
from ghostlayers.repairs.base import Evidence, FitOptions, Fold, Operator, Repair
from ghostlayers.repairs.condition import condition_number
from ghostlayers.statistics.moments import Moments

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Relative ridges that held-out windows choose from."""

ROWS_AT_A_TIME = 256
"""Of the solution, where it is compared with what it was solved from."""


@dataclass(frozen=True)
class Solution:
    """A least-squares map, and what its fit says about itself.

    Attributes:
        weight: M, [features, hidden].
        relative_residual: on the fit tokens, with the fit's weights.
        condition_number: None unless asked for.
        ridge: the one that was chosen; None if it was given.
        num_tokens: that it was fitted on.
    """

    weight: Float[Tensor, "features hidden"]
    relative_residual: float
    condition_number: float | None
    ridge: float | None = None
    num_tokens: int = 0

    def repair(
        self, name: str, operator: Operator | None = None, folds: tuple[Fold, ...] = ()
    ) -> Repair:
        """What was made of it, with what the fit says about itself."""
        return Repair(
            name,
            operator,
            folds,
            num_tokens=self.num_tokens,
            relative_residual=self.relative_residual,
            condition_number=self.condition_number,
            ridge=self.ridge,
        )


def regress(evidence: Evidence, options: FitOptions, *, overwrite: bool = False) -> Solution:
    """The least-squares map from the evidence's features, with the ridge given or chosen.

    Args:
        evidence: its moments, and those that choose a ridge where one is to be chosen.
        options: damping.
        overwrite: the Gram matrix may be used up, because nobody reads it again. The solve then
            holds three matrices in place of four: the factor, F'WD and the solution.

    Raises:
        NumericalError: see `solve_ridge`.
    """
    chosen = None
    if options.ridge is None:
        assert evidence.training is not None
        assert evidence.held_out is not None
        chosen = choose_ridge(evidence.training, evidence.held_out, options)
        options = replace(options, ridge=chosen)
    moments = evidence.moments
    _check_tokens(moments)
    diagonal = moments.gram.diagonal().clone()
    gram, scale = scaled_gram(moments, options, overwrite=overwrite)
    factor = _factor(gram, moments, options)
    weight = _solved(factor, scale, moments)
    condition = condition_number(factor) if options.report_condition else None
    left = _left_over(moments, diagonal, weight, options)
    return Solution(weight, left, condition, chosen, moments.num_tokens)


def solve_ridge(moments: Moments, options: FitOptions) -> Float[Tensor, "features hidden"]:
    r"""argmin_M ||F M - D||_W^2 + eps ||M||^2 + ridge ||S M||^2.

    S is the diagonal matrix of the features' weighted norms. The system is solved for S M, whose
    Gram matrix has a unit diagonal: a channel that is a thousand times larger than the others, as
    real models have, then costs no accuracy, and a relative ridge shrinks all channels alike.

    Returns:
        M, laid out so that its transpose, which a checkpoint holds, is contiguous.

    Raises:
        InsufficientTokensError: fewer tokens than features.
        NonFiniteError: the moments hold NaN or infinity.
        SingularError: the Gram matrix is singular and the ridge too small to cure it.
    """
    _check_tokens(moments)
    gram, scale = scaled_gram(moments, options)
    return _solved(_factor(gram, moments, options), scale, moments)


def _factor(gram: Tensor, moments: Moments, options: FitOptions) -> Tensor:
    """Cholesky's, in the place of the scaled system: matrices of features are a fit's memory."""
    factor = gram.T  # the same matrix, in the order of columns that LAPACK factors in place
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) != 0:
        raise SingularError(
            f"the Gram matrix of {moments.num_tokens} tokens is singular at ridge "
            f"{options.ridge:g} (absolute {options.absolute_ridge:g}); raise --ridge to 1e-6 or "
            "more, or calibrate on more text."
        )
    return factor


def _solved(factor: Tensor, scale: Tensor, moments: Moments) -> Tensor:
    """M of the scaled system."""
    solution = torch.empty_like(moments.cross.T, memory_format=torch.contiguous_format).T
    torch.div(moments.cross, scale[:, None], out=solution)
    torch.linalg.solve_triangular(factor, solution, upper=False, out=solution)
    torch.linalg.solve_triangular(factor.T, solution, upper=True, out=solution)
    return solution.div_(scale[:, None])


def _left_over(moments: Moments, diagonal: Tensor, weight: Tensor, options: FitOptions) -> float:
    """Share of the discrepancy that the ridge solution leaves, without its Gram matrix.

    (F'WF + R) M = F'WD with the damping R makes tr M'F'WF M = tr M'F'WD - tr M'R M, so that the
    squared error is tr D'WD - tr M'F'WD - tr M'R M.
    """
    if moments.target_energy == 0.0:
        return 0.0
    assert options.ridge is not None
    damping = options.ridge * diagonal + options.absolute_ridge
    explained = sum(
        float((weight[rows] * moments.cross[rows]).sum())
        + float((damping[rows] * weight[rows].square().sum(dim=1)).sum())
        for rows in _stretches(len(weight))
    )
    return max(0.0, moments.target_energy - explained) / moments.target_energy


def _stretches(count: int) -> list[slice]:
    """Rows at a time, so that no product of whole matrices is held."""
    return [slice(start, start + ROWS_AT_A_TIME) for start in range(0, count, ROWS_AT_A_TIME)]


def choose_ridge(
    training: Moments,
    held_out: Moments,
    options: FitOptions,
    ridges: tuple[float, ...] = RIDGES,
) -> float:
    r"""The relative ridge whose map leaves least of the held-out discrepancy.

    One eigendecomposition serves all ridges: with the scaled Gram matrix V diag(l) V', the map is
    S^-1 V diag(1/(l + ridge)) P with P = V' S^-1 F'WD, and its held-out error a quadratic form in
    the vector 1/(l + ridge), so that each further ridge costs one product of a matrix and a vector.
    """
    _check_tokens(training)
    gram, scale = scaled_gram(training, replace(options, ridge=0.0))
    values, vectors = torch.linalg.eigh(gram)
    back = vectors / scale[:, None]
    projected = vectors.T @ (training.cross / scale[:, None])
    linear = (projected * (back.T @ held_out.cross)).sum(dim=1)
    quadratic = (back.T @ held_out.gram @ back) * (projected @ projected.T)

    def error(ridge: float) -> float:
        damped = 1.0 / (values.clamp_min(0.0) + ridge)
        return float(damped @ quadratic @ damped - 2.0 * damped @ linear)

    return min(ridges, key=error)


def scaled_gram(
    moments: Moments, options: FitOptions, *, overwrite: bool = False
) -> tuple[Float[Tensor, "features features"], Float[Tensor, " features"]]:
    """The damped Gram matrix of features scaled to unit norm, and those norms.

    With ``overwrite`` in the place of the moments' own.
    """
    scale = moments.gram.diagonal().sqrt()
    dead = scale == 0  # a channel that is zero on every token gets no row in M
    scale = torch.where(dead, 1.0, scale)
    gram = moments.gram if overwrite else moments.gram.clone()
    gram.div_(scale[:, None]).div_(scale)
    assert options.ridge is not None
    damping = options.ridge + options.absolute_ridge / scale.square()
    gram.diagonal().add_(damping + dead.to(gram.dtype))
    return gram, scale


def _check_tokens(moments: Moments) -> None:
    num_features = moments.gram.shape[0]
    if moments.num_tokens < num_features:
        raise InsufficientTokensError(
            f"{moments.num_tokens} calibration tokens cannot fit a map of {num_features} channels; "
            f"give at least {num_features}, better ten times as many (more --fit-windows, or a "
            "longer --sequence-length)."
        )
    if not bool(torch.isfinite(moments.gram).all() and torch.isfinite(moments.cross).all()):
        raise NonFiniteError("the moments hold NaN or infinity; check the model and its dtype.")
