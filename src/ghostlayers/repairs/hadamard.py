"""Orthogonal matrices of +-1 entries for the hidden sizes that language models have.

The method's result depends on which matrix it is, so this is the one of the authors' code: a core
from Sloane's library of Hadamard matrices, of the first order of `TABLES` that divides the size and
leaves a power of two, and Sylvester's doubling:

    B = kron(core, Sylvester(size / order))' / sqrt(size);    powers of two: Sylvester's alone.

Where their tables reach no size, Paley's two constructions over the integers modulo a prime may:
order q + 1 for a prime q = 3 mod 4, order 2 (q + 1) for a prime q = 1 mod 4.

References:
    LinearPatch, arXiv:2505.24680, and its code; Sloane, *A library of Hadamard matrices*;
    Sylvester, Phil. Mag. 34 (1867); Paley, J. Math. Phys. 12 (1933).
"""

from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import InputError

TABLES = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)
"""Orders of the tabulated cores, in the order in which the authors' code tries them."""

Construction = Literal["Sylvester", "tables", "Paley"]


@lru_cache(maxsize=4)
def hadamard(size: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose entries are all +-1/sqrt(size), float64. Do not change it.

    Raises:
        InputError: no construction reaches this size; the message names near ones that work.
    """
    made = construction(size)
    if made is None:
        near = [n for n in range(1, 2 * size) if construction(n) is not None]
        below, above = max(n for n in near if n < size), min(n for n in near if n > size)
        raise InputError(
            f"no Hadamard matrix of order {size} can be built here; orders that work are 1, 2 and "
            f"multiples of four such as {below} and {above}. "
            "Use --repair linearpatch-diag or ghost for this model."
        )
    if made == "Paley":
        core = _paley(_paley_order(size) or 1)
    else:
        core = _tabulated(_table_order(size)) if made == "tables" else torch.ones(1, 1)
    whole = torch.kron(core.double(), _sylvester(size // core.shape[0]))
    scaled: Tensor = whole.T.contiguous() / size**0.5
    return scaled


def construction(size: int) -> Construction | None:
    """How the matrix of a size is made; None if it cannot be."""
    if _is_power_of_two(size):
        return "Sylvester"
    if _table_order(size):
        return "tables"
    return "Paley" if _paley_order(size) is not None else None


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _table_order(size: int) -> int:
    """The first tabulated order that divides a size; 0 if what is left can then not be doubled to.

    The authors' code looks no further than the first, either.
    """
    order = next((number for number in TABLES if size > 0 and size % number == 0), 0)
    return order if order and _is_power_of_two(size // order) else 0


@cache
def _tables() -> dict[int, Tensor]:
    """Rows of bits, 1 for +1, by order."""
    cores = {}
    with (files(__package__) / "hadamard_cores.npz").open("rb") as file, np.load(file) as packed:
        for order in TABLES:
            bits = np.unpackbits(packed[f"order_{order}"], count=order * order)
            cores[order] = torch.from_numpy(bits.reshape(order, order).astype(np.float64)) * 2 - 1
    return cores


def _tabulated(order: int) -> Tensor:
    return _tables()[order]


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley_order(size: int) -> int | None:
    """The smallest order of Paley's from which doubling reaches the size."""
    order, best = size, None
    while order >= 1:
        if _paley_prime(order) is not None:
            best = order
        if order % 2:
            break
        order //= 2
    return best


def _paley_prime(order: int) -> int | None:
    """The prime whose Paley construction has this order."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    half = order // 2 - 1
    if order % 2 == 0 and _is_prime(half) and half % 4 == 1:
        return half
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _paley(order: int) -> Tensor:
    prime = _paley_prime(order)
    assert prime is not None
    jacobsthal = _jacobsthal(prime)
    ones = torch.ones(prime, dtype=torch.float64)
    if prime % 4 == 3:  # H = I + S with S skew: first row 1, first column -1, Q elsewhere
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = ones, -ones, jacobsthal
        return skew + torch.eye(order, dtype=torch.float64)
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = ones, ones, jacobsthal
    # Each entry c of the conference matrix becomes c A, each diagonal zero becomes B.
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    identity = torch.eye(prime + 1, dtype=torch.float64)
    return torch.kron(conference, a) + torch.kron(identity, b)


def _jacobsthal(prime: int) -> Tensor:
    """Q[i, j] = Legendre symbol of i - j."""
    symbol = torch.full((prime,), -1.0, dtype=torch.float64)
    squares = sorted({(n * n) % prime for n in range(1, prime)})
    symbol[squares] = 1.0
    symbol[0] = 0.0
    index = torch.arange(prime)
    return symbol[(index[:, None] - index[None, :]) % prime]
