"""Orthogonal matrices of +-1 entries for the hidden sizes that language models have.

Sylvester's doubling gives every power of two; Paley's two constructions over the integers modulo a
prime give the odd factors: order q + 1 for a prime q = 3 mod 4, order 2 (q + 1) for a prime
q = 1 mod 4. Together they reach 192 = 12 x 16, 576 = 36 x 16, 640 = 20 x 32, 2560, 3584 and 5120.
The tables used elsewhere (Sloane's library) hold matrices of the same orders, equal up to signs and
order of rows and columns or inequivalent ones; the method needs any of them.

References:
    Sylvester, Phil. Mag. 34 (1867); Paley, J. Math. Phys. 12 (1933).
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import InputError


@lru_cache(maxsize=4)
def hadamard(size: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose entries are all +-1/sqrt(size), float64. Do not change it.

    Raises:
        InputError: no construction reaches this size; the message names near ones that work.
    """
    order = _core_order(size)
    if order is None:
        near = [n for n in range(1, 2 * size) if _core_order(n) is not None]
        below, above = max(n for n in near if n < size), min(n for n in near if n > size)
        raise InputError(
            f"no Hadamard matrix of order {size} can be built here; orders that work are 1, 2 and "
            f"multiples of four such as {below} and {above}. "
            "Use --repair linearpatch-diag or ghost for this model."
        )
    matrix = _core(order)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix / size**0.5
    return scaled


def _core_order(size: int) -> int | None:
    """The smallest order from which doubling reaches the size."""
    order = size
    best = None
    while order >= 1:
        if order == 1 or _paley_prime(order) is not None:
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


def _core(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
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
