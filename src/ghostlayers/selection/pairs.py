"""Sums over units (tokens or windows) of something measured between every two boundaries."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PairSums:
    """The sum for every pair of boundaries, and the number of units in it."""

    total: Float[Tensor, "boundaries boundaries"]
    count: int

    def mean(self) -> Float[Tensor, "boundaries boundaries"]:
        """The mean over units."""
        return self.total / max(self.count, 1)

    def plus(self, total: Float[Tensor, "boundaries boundaries"], count: int) -> "PairSums":
        """With some more units."""
        return PairSums(self.total + total, self.count + count)


def empty_pairs(num_boundaries: int) -> PairSums:
    """No units yet."""
    return PairSums(torch.zeros(num_boundaries, num_boundaries, dtype=torch.float64), 0)
