r"""Products of matrices as exact as in float64, where float64 itself is slow.

Graphics cards for desktops run float64 at 1/64 of float32's rate. There A'B is summed from products
of slices (Ozaki, Ogita, Oishi, Rump 2012, "Error-free transformations of matrix multiplication"):
each column is scaled to below 1 by a power of two and cut into pieces of few bits, so few that a
product of two pieces, summed over all rows of a block, is a whole number below 2^24, which float32
holds exactly. A piece also fits the eight digits of bfloat16, so that Nvidia's cards multiply
pieces on their matrix units, which sum in float32. What remains to be added up are a few matrices,
in float64. Products of pieces below 2^-56 of the largest are left out, about where float64 ends.
The number of pieces follows from the data: three or four a bfloat16 stream, up to eight for
float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_PER_BLOCK = 1024
"""Rows that are summed in float32 at a time; more would leave fewer bits a piece."""

BITS = 7
"""2 * BITS + log2(ROWS_PER_BLOCK) = 24, the digits of float32."""

MOST_PIECES = 8
"""So many hold 56 bits below a column's largest entry; float64 has 53."""


@dataclass(frozen=True)
class Slices:
    """A matrix of at most `ROWS_PER_BLOCK` rows, in pieces.

    Attributes:
        scale: float64, [columns], powers of two.
        pieces: whole numbers of at most `BITS` bits and a sign, [rows, columns] each: the matrix
            is scale * sum_i pieces[i] * 2^(-BITS * (i + 1)), exactly if there are fewer than
            `MOST_PIECES`.
    """

    scale: Tensor
    pieces: tuple[Tensor, ...]

    def columns(self, columns: slice) -> "Slices":
        """Some columns of the same matrix."""
        return Slices(self.scale[columns], tuple(each[:, columns] for each in self.pieces))


def blocks_of_rows(count: int) -> Iterator[slice]:
    """Few enough rows at a time."""
    for start in range(0, count, ROWS_PER_BLOCK):
        yield slice(start, min(start + ROWS_PER_BLOCK, count))


def cut(matrix: Tensor) -> Slices:
    """Cut a matrix into pieces of whole numbers, column by column.

    Args:
        matrix: of any floating type, at most `ROWS_PER_BLOCK` rows.
    """
    rest, dtype = matrix.double(), _piece_dtype(matrix.device)
    _, exponent = torch.frexp(rest.abs().amax(dim=0))
    scale = torch.ldexp(torch.ones_like(exponent, dtype=rest.dtype), exponent)
    rest = torch.ldexp(rest, -exponent)
    pieces: list[Tensor] = []
    while len(pieces) < MOST_PIECES:
        rest = rest * 2.0**BITS
        piece = rest.trunc()
        pieces.append(piece.to(dtype))
        rest = rest - piece
        if not bool(rest.any()):
            break
    return Slices(scale, tuple(pieces))


def add_product(total: Tensor, a: Slices, b: Slices) -> None:
    """Add A'B to a float64 matrix, in place.

    Args:
        total: [p, q].
        a: of a matrix [rows, p].
        b: of a matrix [rows, q]; may be ``a`` itself, which saves half the products.
    """
    summed = torch.zeros_like(total)
    for i, left in enumerate(a.pieces):
        for j, right in enumerate(b.pieces[: MOST_PIECES - i]):
            if a is b and j < i:
                continue
            part = _multiply(left, right).to(total.dtype)
            if a is b and j > i:
                part = part + part.T
            summed.add_(part, alpha=2.0 ** (-BITS * (i + j + 2)))
    total.add_(summed.mul_(a.scale[:, None]).mul_(b.scale[None, :]))


def add_gram(total: Tensor, a: Slices, tiles: Sequence[tuple[slice, slice]]) -> None:
    """Add tiles of A'A, rows and columns each, to a float64 matrix, in place."""
    for rows, columns in tiles:
        left = a.columns(rows)
        add_product(total[rows, columns], left, left if rows == columns else a.columns(columns))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Of two pieces, in float32, though they be of bfloat16."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


def _piece_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is multiplied fast, and into float32: Nvidia's cards since Ampere."""
    if device.type == "cpu" or torch.version.cuda is None:
        return torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float32


def slow_at_float64(device: torch.device) -> bool:
    """Whether a device runs float64 at a small fraction of float32's rate.

    Nvidia's cards for computing (compute capability 6.0, 7.0, 8.0, 9.0, 10.0) run it at half the
    rate or more, all others at 1/32 or 1/64.
    """
    if device.type == "cpu" or torch.version.cuda is None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return minor != 0 or not 6 <= major <= 10
