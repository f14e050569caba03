r"""Sufficient statistics of a regression from the stream before a cut to the stream after it.

Everything that a closed-form repair needs of N tokens is a handful of sums. With features F
[tokens, features], the stream before the cut X and after it Y [tokens, hidden], D = Y - X and
token weights w:

    gram = F' diag(w) F,    cross = F' diag(w) D,    target_energy = tr D' diag(w) D

The sums are additive, so batches, processes and machines merge by addition.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ACCUMULATOR = torch.float64
"""All sums are kept in this type, whatever the model's own."""

TOKENS_PER_BLOCK = 4096
"""Tokens converted to float64 at a time: bounds the copy, not the result."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens; see the module's docstring for the letters.

    Attributes:
        num_tokens: tokens counted, padding excluded.
        total_weight: sum of the token weights.
        gram: F' W F, [features, features].
        cross: F' W D, [features, hidden].
        target_energy: sum of w ||d||^2.
        abs_source: unweighted sum of |x| a channel, [hidden].
        abs_target: unweighted sum of |y| a channel, [hidden].
    """

    num_tokens: int
    total_weight: float
    gram: Float[Tensor, "features features"]
    cross: Float[Tensor, "features hidden"]
    target_energy: float
    abs_source: Float[Tensor, " hidden"]
    abs_target: Float[Tensor, " hidden"]


def empty(num_features: int, hidden_size: int, device: torch.device | str | None = None) -> Moments:
    """Moments of no tokens."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=ACCUMULATOR, device=device)

    return Moments(
        num_tokens=0,
        total_weight=0.0,
        gram=zeros(num_features, num_features),
        cross=zeros(num_features, hidden_size),
        target_energy=0.0,
        abs_source=zeros(hidden_size),
        abs_target=zeros(hidden_size),
    )


def update(
    moments: Moments,
    source: Float[Tensor, "tokens hidden"],
    target: Float[Tensor, "tokens hidden"],
    *,
    features: Float[Tensor, "tokens features"] | None = None,
    weights: Float[Tensor, " tokens"] | None = None,
) -> Moments:
    """Add tokens to the moments.

    Args:
        moments: the sums so far.
        source: the stream before the cut, X.
        target: the stream after the cut, Y, same shape.
        features: what the repair regresses on; the source itself if not given.
        weights: one weight >= 0 a token; one each if not given.

    Returns:
        New moments; the argument is unchanged.
    """
    for start in range(0, source.shape[0], TOKENS_PER_BLOCK):
        block = slice(start, start + TOKENS_PER_BLOCK)
        x, y = source[block].to(ACCUMULATOR), target[block].to(ACCUMULATOR)
        f = x if features is None else features[block].to(ACCUMULATOR)
        w = None if weights is None else weights[block].to(ACCUMULATOR)
        moments = _add_block(moments, x, y, f, w)
    return moments


def _add_block(moments: Moments, x: Tensor, y: Tensor, f: Tensor, w: Tensor | None) -> Moments:
    d = y - x
    # Weighting the left factor alone keeps F'WF = (WF)'F without a square root.
    weighted = f if w is None else f * w[:, None]
    energy = d.square().sum(dim=1)
    return Moments(
        num_tokens=moments.num_tokens + x.shape[0],
        total_weight=moments.total_weight + (x.shape[0] if w is None else float(w.sum())),
        gram=torch.addmm(moments.gram, weighted.T, f),
        cross=torch.addmm(moments.cross, weighted.T, d),
        target_energy=moments.target_energy
        + float(energy.sum() if w is None else torch.dot(energy, w)),
        abs_source=moments.abs_source + x.abs().sum(dim=0),
        abs_target=moments.abs_target + y.abs().sum(dim=0),
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the tokens of both."""
    return Moments(
        num_tokens=a.num_tokens + b.num_tokens,
        total_weight=a.total_weight + b.total_weight,
        gram=a.gram + b.gram,
        cross=a.cross + b.cross,
        target_energy=a.target_energy + b.target_energy,
        abs_source=a.abs_source + b.abs_source,
        abs_target=a.abs_target + b.abs_target,
    )


def residual_energy(moments: Moments, weight: Float[Tensor, "features hidden"]) -> float:
    """Weighted squared error of a map from features to the difference.

    sum_t w_t ||d_t - f_t M||^2 = tr D'WD - 2 tr M'F'WD + tr M'F'WF M, from the moments alone.
    Rounding can make a perfect fit slightly negative; it is clamped at zero.
    """
    explained = 2.0 * torch.sum(weight * moments.cross)
    penalty = torch.sum(weight * (moments.gram @ weight))
    return max(0.0, moments.target_energy - float(explained) + float(penalty))


def relative_weights(target: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
    """One weight 1/||y||^2 a token: every token's *relative* error then counts alike.

    The next layer's norm divides each token by its own length, so that is the error it sees. A
    zero token has no direction to preserve and gets weight zero.
    """
    energy = target.to(ACCUMULATOR).square().sum(dim=-1)
    return torch.where(energy > 0, 1.0 / energy.clamp_min(torch.finfo(ACCUMULATOR).tiny), 0.0)
