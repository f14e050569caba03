"""Massive activations: which tokens grow enormous, and in which layer.

Real models write a huge vector on a few tokens, often the first, in one early layer, and carry it
to the end. A span that contains that layer cannot be replaced by a linear map of the stream before
it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.spans import Span

MASSIVE = 20.0
"""A token is massive at a boundary if its norm exceeds this many times the median norm there."""

GROWTH = 4.0
"""... and it is born inside a span if its norm, relative to the median, grows by this factor."""

NORM_WINDOWS = 4
"""Windows on which massive activations are looked for when nothing else is scored."""


@dataclass(frozen=True)
class NormProfile:
    """Norms of the same tokens at every boundary.

    Attributes:
        norms: ||h||, [boundaries, tokens].
    """

    norms: Float[Tensor, "boundaries tokens"]

    def relative(self) -> Float[Tensor, "boundaries tokens"]:
        """Norms divided by the boundary's median."""
        median = self.norms.median(dim=1, keepdim=True).values
        return self.norms / median.clamp_min(torch.finfo(self.norms.dtype).tiny)

    def median(self) -> list[float]:
        """The median norm at every boundary."""
        return [float(value) for value in self.norms.median(dim=1).values]

    def largest(self) -> list[float]:
        """The largest norm at every boundary."""
        return [float(value) for value in self.norms.max(dim=1).values]


def born_inside(profile: NormProfile, span: Span) -> bool:
    """Whether some token becomes massive between the two ends of a span.

    A token counts if, after the span, its norm is more than 20 times the median norm and at least
    4 times as large, relative to the median, as it was before the span.
    """
    relative = profile.relative()
    before, after = relative[span.start], relative[span.stop]
    return bool(((after > MASSIVE) & (after >= GROWTH * before)).any())
