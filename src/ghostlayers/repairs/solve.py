"""Ridge regression from moments: the one linear solve behind every least-squares repair."""

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import InsufficientTokensError, NonFiniteError, SingularError
from ghostlayers.moments import Moments
from ghostlayers.repairs.base import FitOptions


def solve_ridge(moments: Moments, options: FitOptions) -> Float[Tensor, "features hidden"]:
    r"""argmin_M ||F M - D||_W^2 + eps ||M||^2 + ridge ||S M||^2.

    S is the diagonal matrix of the features' weighted norms. The system is solved for S M, whose
    Gram matrix has a unit diagonal: a channel that is a thousand times larger than the others, as
    real models have, then costs no accuracy, and a relative ridge shrinks all channels alike.

    Returns:
        M.

    Raises:
        InsufficientTokensError: fewer tokens than features.
        NonFiniteError: the moments hold NaN or infinity.
        SingularError: the Gram matrix is singular and the ridge too small to cure it.
    """
    _check_tokens(moments)
    gram, scale = scaled_gram(moments, options)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        raise SingularError(
            f"the Gram matrix of {moments.num_tokens} tokens is singular at ridge "
            f"{options.ridge:g} (absolute {options.absolute_ridge:g}); raise --ridge to 1e-6 or "
            "more, or calibrate on more text."
        )
    solution = torch.cholesky_solve(moments.cross / scale[:, None], factor)
    return solution / scale[:, None]


def scaled_gram(
    moments: Moments, options: FitOptions
) -> tuple[Float[Tensor, "features features"], Float[Tensor, " features"]]:
    """The damped Gram matrix of features scaled to unit norm, and those norms."""
    scale = moments.gram.diagonal().sqrt()
    dead = scale == 0  # a channel that is zero on every token gets no row in M
    scale = torch.where(dead, 1.0, scale)
    gram = moments.gram / scale[:, None] / scale
    damping = options.ridge + options.absolute_ridge / scale.square()
    gram.diagonal().add_(damping + dead.to(gram.dtype))
    return gram, scale


def condition_number(moments: Moments, options: FitOptions) -> float:
    """Largest over smallest eigenvalue of the matrix that `solve_ridge` factors."""
    gram, _ = scaled_gram(moments, options)
    eigenvalues = torch.linalg.eigvalsh(gram)
    return float(eigenvalues[-1] / eigenvalues[0].clamp_min(torch.finfo(gram.dtype).tiny))


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
