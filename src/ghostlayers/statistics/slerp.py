"""Spherical interpolation: between two tensors along the arc, not the chord."""

import torch
from torch import Tensor

SMALL = 1e-4
"""Sine of the angle below which arc and chord are the same, and the formula divides by nothing."""


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The point at a share of the way from one tensor to another of the same shape, float32.

    With the angle theta between them, as vectors, it is
    (sin((1 - t) theta) a + sin(t theta) b) / sin(theta); (1 - t) a + t b where sin(theta) is small.

    Args:
        first: a.
        second: b.
        t: from 0, the first, to 1, the second.
    """
    a, b = first.float(), second.float()
    lengths = a.square().sum(dtype=torch.float64) * b.square().sum(dtype=torch.float64)
    cosine = (a * b).sum(dtype=torch.float64) / lengths.sqrt().clamp_min(1e-300)
    theta = torch.arccos(cosine.clamp(-1.0, 1.0))
    sine = torch.sin(theta)
    if not lengths or sine < SMALL:
        return (1.0 - t) * a + t * b
    of_a, of_b = torch.sin((1.0 - t) * theta) / sine, torch.sin(t * theta) / sine
    return float(of_a) * a + float(of_b) * b
