r"""The best operators of restricted families, for the paper's theorem.

LinearPatch's scales come from ratios of absolute values, not from a fit, so a comparison with an
unconstrained fit confounds the family with the way its member was chosen. Here each family gets its
own least-squares optimum: diagonal; H diag H' in a Hadamard basis; symmetric (which both are); and
one scaled rotation.

References:
    Ghosted Layers, arXiv:2605.15491, theorem 4.1 (the best operator is not symmetric); Schoenemann,
    Psychometrika 31 (1966) for the orthogonal Procrustes problem.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Method,
    Needs,
    Repair,
    linear_repair,
)
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.statistics.moments import Moments

SOURCE = "best of its family, for arXiv:2605.15491, theorem 4.1"


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(top.dtype).tiny), 0.0)


def fit_diagonal(evidence: Evidence, options: FitOptions) -> Repair:
    """The diagonal M: m_k = <x_k, d_k> / <x_k, x_k>."""
    del options
    sums = evidence.select(("x",)).moments
    return linear_repair(
        "diagonal", torch.diag(_ratio(sums.cross.diagonal(), sums.gram.diagonal())), sums
    )


def fit_hadamard(evidence: Evidence, options: FitOptions) -> Repair:
    """M = H diag(m) H', m fitted in the rotated basis, whose moments are H'GH and H'CH."""
    del options
    sums = evidence.select(("x",)).moments
    basis = hadamard(sums.gram.shape[0]).to(sums.gram.device)
    gram, cross = basis.T @ sums.gram @ basis, basis.T @ sums.cross @ basis
    scales = _ratio(cross.diagonal(), gram.diagonal())
    return linear_repair("hadamard", (basis * scales) @ basis.T, sums)


def fit_symmetric(evidence: Evidence, options: FitOptions) -> Repair:
    """The symmetric M: G M + M G = C + C', in the eigenbasis of the Gram matrix G."""
    del options
    sums = evidence.select(("x",)).moments
    return linear_repair("symmetric", best_symmetric(sums), sums)


def best_symmetric(sums: Moments) -> Float[Tensor, "hidden hidden"]:
    """Argmin over M = M' of ||X M - D||_W^2, a Sylvester equation."""
    values, vectors = torch.linalg.eigh(sums.gram)
    values = values.clamp_min(0.0)
    right = vectors.T @ (sums.cross + sums.cross.T) @ vectors
    total = values[:, None] + values
    # Pairs of directions in which there is no data leave M free: take none of it.
    floor = values[-1] * torch.finfo(values.dtype).eps * len(values)
    solved = torch.where(total > floor, right / total.clamp_min(floor), 0.0)
    back: Tensor = vectors @ solved @ vectors.T
    return back


def fit_procrustes(evidence: Evidence, options: FitOptions) -> Repair:
    """Y = s X Q, Q orthogonal: U V' of the singular value decomposition of X'Y, s = tr S / tr G."""
    del options
    sums = evidence.select(("x",)).moments
    left, values, right = torch.linalg.svd(sums.gram + sums.cross)
    scale = values.sum() / sums.gram.trace()
    identity = torch.eye(left.shape[0], dtype=left.dtype, device=left.device)
    return linear_repair("procrustes", scale * left @ right - identity, sums)


FITS = {
    "diagonal": fit_diagonal,
    "hadamard": fit_hadamard,
    "symmetric": fit_symmetric,
    "procrustes": fit_procrustes,
}


def make_restricted(arguments: Arguments) -> Method:
    """``diagonal``, ``hadamard``, ``symmetric`` or ``procrustes``, without arguments."""
    arguments.finish()
    name = arguments.name
    return Method(name, SOURCE, FITS[name], Needs(("x",), basis=name == "hadamard"), stacks=True)
