r"""How much of a span a linear map can replace: the residual of the repair itself.

r = mean over held-out tokens of ||y - x W||^2 / ||y||^2, W the *uniformly weighted* least-squares
map. On SmolLM2-135M it ranks cuts by their loss after the repair far better than the cosine does,
and it exceeds 1 on the spans in which a massive activation is born. It needs few tokens: a sample
of five times the hidden size (four to fit, one held out) ranks as all tokens do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ghostlayers.repairs.base import FitOptions
from ghostlayers.repairs.solve import solve_ridge
from ghostlayers.statistics import moments

TOKENS_PER_CHANNEL = 5
"""Sampled tokens a channel; see ``benchmarks/calibration.py`` for what fewer or more change."""

HELD_OUT_EVERY = 5
"""Every fifth sampled token is kept from the fit and measures it."""


@runtime_checkable
class Rows(Protocol):
    """The stream of some tokens at every boundary."""

    @property
    def shape(self) -> Sequence[int]:
        """Boundaries, tokens, channels."""

    def __getitem__(self, boundary: int) -> Float[Tensor, "tokens hidden"]:
        """All tokens at a boundary."""


@dataclass(frozen=True)
class TokenSample:
    """The stream of some tokens at every boundary.

    Attributes:
        streams: [boundaries, tokens, hidden], in the model's dtype: a tensor, or what gives out
            one boundary at a time.
    """

    streams: "Rows"

    @property
    def num_tokens(self) -> int:
        """Tokens at each boundary."""
        return int(self.streams.shape[1])

    def held_out(self) -> Bool[Tensor, " tokens"]:
        """Which tokens measure the fit instead of taking part in it."""
        return torch.arange(self.num_tokens) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def sample_mask(
    num_windows: int, sequence_length: int, wanted: int, generator: torch.Generator
) -> Bool[Tensor, "windows sequence"]:
    """Choose tokens spread evenly over positions, and at random over windows.

    The first position is sampled at the same rate as any other: attention sinks live there, and
    a sample without them, or full of them, would rank spans by something else.
    """
    total = num_windows * sequence_length
    wanted = min(wanted, total)
    edges = torch.linspace(0, total, wanted + 1, dtype=torch.float64)
    width = edges[1:] - edges[:-1]
    offsets = torch.rand(wanted, generator=generator, dtype=torch.float64)
    chosen = (edges[:-1] + offsets * width).long().clamp_max(total - 1)  # one a stretch
    mask = torch.zeros(total, dtype=torch.bool)
    mask[chosen] = True
    return mask.view(sequence_length, num_windows).T.contiguous()


def span_residual(
    source: Float[Tensor, "tokens hidden"],
    target: Float[Tensor, "tokens hidden"],
    held_out: Bool[Tensor, " tokens"],
) -> float:
    """Mean ||y - x W||^2 / ||y||^2 over held-out tokens, W fitted on the others, unweighted."""
    hidden = source.shape[1]
    fit = moments.update(
        moments.empty(hidden, hidden, source.device), source[~held_out], target[~held_out]
    )
    delta = solve_ridge(fit, FitOptions())
    x, y = source[held_out].to(moments.ACCUMULATOR), target[held_out].to(moments.ACCUMULATOR)
    error = (y - x - x @ delta).square().sum(dim=1)
    return float((error * moments.relative_weights(y)).mean())
