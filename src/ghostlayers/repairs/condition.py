"""The condition number of a positive definite matrix, from its Cholesky factor.

All eigenvalues of a large matrix take several times as long as the solve that they are reported
beside, and on a graphics card thirty times as long. The extreme ones alone are found in a small
Krylov space (Golub and Underwood 1977, "The block Lanczos method for computing eigenvalues"),
by products with the matrix, and with its inverse for the smallest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EXACT_UP_TO = 512
"""Matrices no wider have all their singular values computed."""

BLOCK, DEPTH = 16, 6
"""Of the Krylov space. An extreme eigenvalue is then a few percent too small at worst, where many
others lie beside it, and right to many digits where it stands alone."""


def condition_number(factor: Tensor) -> float:
    """Largest over smallest eigenvalue of L L'.

    Args:
        factor: L, lower triangular with zeros above, [n, n], float64.
    """
    if len(factor) <= EXACT_UP_TO:
        values = torch.linalg.svdvals(factor)
        return float(values[0] / values[-1]) ** 2

    def product(vectors: Tensor) -> Tensor:
        return factor @ (factor.mT @ vectors)

    def inverse(vectors: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, vectors, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return whole

    return _largest(product, factor) * _largest(inverse, factor)


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue of a symmetric operator, within a block Krylov space."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(like), BLOCK, generator=generator, dtype=like.dtype).to(like.device)
    basis, _ = torch.linalg.qr(start)
    newest = basis
    for _ in range(DEPTH - 1):
        added = apply(newest)
        for _turn in range(2):  # once leaves what rounding makes of nearly parallel vectors
            added = added - basis @ (basis.mT @ added)
        newest, _ = torch.linalg.qr(added)
        basis = torch.cat([basis, newest], dim=1)
    inner = basis.mT @ apply(basis)
    return float(torch.linalg.eigvalsh((inner + inner.mT) / 2)[-1])
