r"""Angular distance between boundaries at the last token of each window.

d(b, c) = mean over windows of arccos(cos(h_b, h_c)) / pi, the h at a window's last token, the only
one that has seen the whole window (Gromov et al., arXiv:2403.17887). The span [b, b + n) with
the lowest d(b, b + n) is the one to remove.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AngularSums:
    """Sum of angular distances over windows, and their count."""

    total: Float[Tensor, "boundaries boundaries"]
    count: int


def empty_angles(num_boundaries: int) -> AngularSums:
    """No windows yet."""
    return AngularSums(torch.zeros(num_boundaries, num_boundaries, dtype=torch.float64), 0)


def add_last_tokens(
    sums: AngularSums, streams: Float[Tensor, "boundaries windows hidden"]
) -> AngularSums:
    """Add some windows.

    Args:
        sums: the sums so far.
        streams: the stream at every boundary, at the last token of each window. The angle between
            similar vectors is lost in float32 (its cosine is 1 - angle^2 / 2), hence float64.
    """
    unit = torch.nn.functional.normalize(streams.cpu().double(), dim=-1).transpose(0, 1)
    cosines = (unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)
    distances = torch.arccos(cosines).sum(dim=0) / math.pi
    return AngularSums(sums.total + distances, sums.count + streams.shape[1])


def mean_angles(sums: AngularSums) -> Float[Tensor, "boundaries boundaries"]:
    """Mean angular distance of every pair of boundaries, from 0 (parallel) to 1 (opposite)."""
    return sums.total / max(sums.count, 1)
