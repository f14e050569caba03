r"""Angular distance between boundaries at the last token of each window.

d(b, c) = mean over windows of arccos(cos(h_b, h_c)) / pi, the h at a window's last token, the only
one that has seen the whole window (Gromov et al., arXiv:2403.17887). The span [b, b + n) with
the lowest d(b, b + n) is the one to remove.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.selection.pairs import PairSums


def add_last_tokens(
    sums: PairSums, streams: Float[Tensor, "boundaries windows hidden"]
) -> PairSums:
    """Add some windows: distances lie between 0 (parallel) and 1 (opposite).

    Args:
        sums: the sums so far.
        streams: the stream at every boundary, at the last token of each window. The angle between
            similar vectors is lost in float32 (its cosine is 1 - angle^2 / 2), hence float64.
    """
    unit = torch.nn.functional.normalize(streams.cpu().double(), dim=-1).transpose(0, 1)
    cosines = (unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)
    distances = torch.arccos(cosines).sum(dim=0) / math.pi
    return sums.plus(distances, streams.shape[1])
