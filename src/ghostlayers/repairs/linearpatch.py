"""One positive scale a channel, in the stream's basis or in a Hadamard basis."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import Evidence, FitOptions, Needs, Repair, linear_repair
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.repairs.method import Per, RepairMethod

Mean = Literal["totals", "ratios"]
"""A channel's ratio of the means over all tokens, or the mean over windows of each one's ratio."""


def channel_scales(
    before: Float[Tensor, " hidden"], after: Float[Tensor, " hidden"]
) -> Float[Tensor, " hidden"]:
    """d_k = mean |y_k| / mean |x_k|; 1 for a channel that is zero before the cut."""
    dead = before == 0
    return torch.where(dead, 1.0, after / before.masked_fill(dead, 1.0))


def stream_scales(evidence: Evidence, mean: Mean) -> Float[Tensor, " hidden"]:
    """The scales of the stream's own channels, of one kind of mean."""
    if mean == "totals":
        return channel_scales(evidence.moments.abs_source, evidence.moments.abs_target)
    assert evidence.ratios is not None
    return evidence.ratios


@dataclass(frozen=True, kw_only=True)
class LinearPatchDiagonal(RepairMethod):
    """LinearPatch: one scale for each channel.

    M = diag(d) - I, d_k the ratio of the mean absolute values after and before the cut.

    Cost: one product of hidden x hidden a token.

    Attributes:
        mean: ``totals`` for the ratio of means over all tokens, as the paper's formula reads;
            ``ratios`` for the mean of single windows' ratios, as the released code does.
        per: one operator a ``gap``, or for every removed ``layer``.

    References:
        Chen et al., *A Simple Linear Patch Revives Layer-Pruned LLMs*, arXiv:2505.24680.
    """

    keyword = "linearpatch-diag"
    source = "LinearPatch, arXiv:2505.24680"
    stacks = True

    mean: Mean = argument("totals", note="with the mean of single windows' ratios")
    per: Per = argument("gap", note="one operator for every removed layer where these lie apart")

    @property
    def needs(self) -> Needs:
        return Needs(("x",), ratios=self.mean == "ratios")

    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        del options
        delta = torch.diag(stream_scales(evidence, self.mean) - 1.0)
        return linear_repair(self.name, evidence, delta)


@dataclass(frozen=True, kw_only=True)
class LinearPatchHadamard(LinearPatchDiagonal):
    """LinearPatch: one scale for each channel of a Hadamard-rotated stream.

    M = H diag(d) H' - I, d from the rotated streams X H and Y H.

    Cost: one product of hidden x hidden a token.
    """

    keyword = "linearpatch-hadamard"

    @property
    def needs(self) -> Needs:
        return Needs(("x",), rotated=True, basis=True, ratios=self.mean == "ratios")

    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        del options
        scales = evidence.rotated_ratios
        if self.mean == "totals":
            assert evidence.rotated is not None
            scales = channel_scales(*evidence.rotated)
        assert scales is not None
        basis = hadamard(len(scales)).to(scales.device)
        delta = (basis * (scales - 1.0)) @ basis.T
        return linear_repair(self.name, evidence, delta)
