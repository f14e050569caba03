r"""Products of float32 matrices as exact as in float64, where float64 itself is slow.

Graphics cards for desktops run float64 at 1/64 of float32's rate. There A'B is summed from products
of slices (Ozaki, Ogita, Oishi, Rump 2012, "Error-free transformations of matrix multiplication"):
each column is scaled to below 1 by a power of two and cut into pieces of few bits, so few that a
product of two pieces, summed over all rows of a block, is a whole number below 2^24, which float32
holds exactly. What remains to be added up are a few matrices, in float64. No piece is dropped that
float64 would keep, so this is as exact as float64, and the number of pieces follows from the data:
three or four a bfloat16 stream, up to eight for float32 with large outliers.
"""

import torch
from torch import Tensor

ROWS_PER_BLOCK = 1024
"""Rows that are summed in float32 at a time; more would leave fewer bits a piece."""

BITS = 7
"""2 * BITS + log2(ROWS_PER_BLOCK) = 24, the digits of float32."""

MOST_PIECES = 8
"""So many hold 56 bits below a column's largest entry; float64 has 53."""


def add_split_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add A'B to a float64 matrix, in place.

    Args:
        total: [p, q].
        a: float32 (or shorter), [rows, p].
        b: the same, [rows, q]; may be ``a`` itself, which is then cut once.
    """
    for start in range(0, a.shape[0], ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        scale_a, pieces_a = split_columns(a[rows])
        scale_b, pieces_b = (scale_a, pieces_a) if b is a else split_columns(b[rows])
        summed = torch.zeros_like(total)
        for i, left in enumerate(pieces_a):
            for j, right in enumerate(pieces_b):
                if i + j < MOST_PIECES:
                    part = (left.T @ right).to(total.dtype)
                    summed.add_(part, alpha=2.0 ** (-BITS * (i + j + 2)))
        total.add_(summed.mul_(scale_a[:, None]).mul_(scale_b[None, :]))


def split_columns(matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Cut a matrix into pieces of whole numbers, column by column.

    Returns:
        (scales, pieces): powers of two in float64, [columns], and matrices like the first with
        whole numbers of at most `BITS` bits and a sign, so that the matrix is
        scale * sum_i piece_i * 2^(-BITS * (i + 1)), exactly if there are fewer than `MOST_PIECES`.
    """
    rest = matrix.float()
    _, exponent = torch.frexp(rest.abs().amax(dim=0))
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    # Scaling may need more range than float32 has, so it takes two steps.
    half = torch.div(exponent, 2, rounding_mode="floor")
    rest = torch.ldexp(torch.ldexp(rest, -half), half - exponent)
    pieces: list[Tensor] = []
    while len(pieces) < MOST_PIECES:
        rest = rest * 2.0**BITS
        piece = rest.trunc()
        pieces.append(piece)
        rest = rest - piece
        if not bool(rest.any()):
            break
    return scale, pieces


def slow_at_float64(device: torch.device) -> bool:
    """Whether a device runs float64 at a small fraction of float32's rate.

    Nvidia's cards for computing (compute capability 6.0, 7.0, 8.0, 9.0, 10.0) run it at half the
    rate or more, all others at 1/32 or 1/64.
    """
    if device.type == "cpu" or torch.version.cuda is None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return minor != 0 or not 6 <= major <= 10
