r"""Similarity of the residual stream at every pair of boundaries.

One matrix S [L + 1, L + 1] holds everything that cosine criteria need: S[b, b + n] scores the span
[b, b + n) (LLM-Streamline, arXiv:2403.19135), 1 - S[b, b + 1] is the Block Influence of layer b
(ShortGPT, arXiv:2403.03853).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.selection.pairs import PairSums

CosineAxis = Literal["hidden", "tokens"]

AT_ONCE = 512
"""Tokens, or channels, that are held in float32 at a time."""


def add_window(
    sums: PairSums, streams: Float[Tensor, "boundaries tokens hidden"], axis: CosineAxis
) -> PairSums:
    """Add one window's tokens.

    Args:
        sums: the sums so far.
        streams: the window's stream at every boundary, padding excluded.
        axis: ``hidden`` is the cosine of each token's two vectors, as the papers define it.
            ``tokens`` is what the released Ghosted Layers and LinearPatch code computes (torch's
            default axis on [1, tokens, hidden]): the cosine of each channel over the window.
    """
    along, across = (2, 1) if axis == "hidden" else (1, 2)
    parts = [_products(part.float(), along, across) for part in streams.split(AT_ONCE, across)]
    pairs = torch.stack(parts).cpu().double().sum(dim=0)
    if axis == "hidden":
        return sums.plus(pairs, streams.shape[1])
    return sums.plus(pairs / streams.shape[2], 1)


def _products(streams: Tensor, along: int, across: int) -> Tensor:
    """Cosines of every pair, summed over the other axis."""
    unit = torch.nn.functional.normalize(streams, dim=along, eps=1e-8)
    if unit.device.type == "cpu":
        flat = unit.flatten(1)
        return flat @ flat.T  # sums the products over tokens and channels at once
    # Many small products keep an accelerator busy, one long one does not.
    matrices = unit.movedim(across, 0)
    return (matrices @ matrices.mT).sum(dim=0)


def block_influence(similarity: Float[Tensor, "boundaries boundaries"]) -> list[float]:
    """BI_i = 1 - mean cos(h_i, h_{i+1}) of every layer (ShortGPT, arXiv:2403.03853, eq. 1)."""
    return [float(1.0 - value) for value in similarity.diagonal(offset=1)]
