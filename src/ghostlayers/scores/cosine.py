r"""Similarity of the residual stream at every pair of boundaries.

One matrix S [L + 1, L + 1] holds everything that cosine criteria need: S[b, b + n] scores the span
[b, b + n) (LLM-Streamline, arXiv:2403.19135), 1 - S[b, b + 1] is the Block Influence of layer b
(ShortGPT, arXiv:2403.03853).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

CosineAxis = Literal["hidden", "tokens"]


@dataclass(frozen=True)
class CosineSums:
    """Sum of cosines over units (tokens, or windows for the published variant), and their count."""

    total: Float[Tensor, "boundaries boundaries"]
    count: int


def empty_cosines(num_boundaries: int) -> CosineSums:
    """No units yet."""
    return CosineSums(torch.zeros(num_boundaries, num_boundaries, dtype=torch.float64), 0)


def add_window(
    sums: CosineSums, streams: Float[Tensor, "boundaries tokens hidden"], axis: CosineAxis
) -> CosineSums:
    """Add one window's tokens.

    Args:
        sums: the sums so far.
        streams: the window's stream at every boundary, padding excluded.
        axis: ``hidden`` is the cosine of each token's two vectors, as the papers define it.
            ``tokens`` is what the released Ghosted Layers and LinearPatch code computes (torch's
            default axis on [1, tokens, hidden]): the cosine of each channel over the window.
    """
    along = -1 if axis == "hidden" else 1
    unit = torch.nn.functional.normalize(streams.float(), dim=along, eps=1e-8)
    flat = unit.flatten(1)
    pairs = (flat @ flat.T).double().cpu()  # sums the products over tokens and channels at once
    if axis == "hidden":
        return CosineSums(sums.total + pairs, sums.count + unit.shape[1])
    return CosineSums(sums.total + pairs / unit.shape[2], sums.count + 1)


def mean_cosine(sums: CosineSums) -> Float[Tensor, "boundaries boundaries"]:
    """S, the mean cosine of every pair of boundaries."""
    return sums.total / max(sums.count, 1)


def block_influence(similarity: Float[Tensor, "boundaries boundaries"]) -> list[float]:
    """BI_i = 1 - mean cos(h_i, h_{i+1}) of every layer (ShortGPT, arXiv:2403.03853, eq. 1)."""
    return [float(1.0 - value) for value in similarity.diagonal(offset=1)]
