r"""LinearPatch: one positive scale a channel, in the stream's basis or in a Hadamard basis.

References:
    Chen et al., *A Simple Linear Patch Revives Layer-Pruned LLMs*, arXiv:2505.24680:
    x -> x H diag(d) H', d_k the ratio of the mean absolute values after and before the cut in the
    rotated basis. With H = I the diagonal form. The ratio is of means over all tokens, as the
    paper's formula reads; ``mean=ratios`` averages the ratios of single windows, as the released
    code does. ``per=layer`` fits one operator for every removed layer where these lie apart.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Method,
    Needs,
    Repair,
    linear_repair,
)
from ghostlayers.repairs.hadamard import hadamard

SOURCE = "LinearPatch, arXiv:2505.24680"

MEANS = ("totals", "ratios")
"""A channel's ratio of the means over all tokens, or the mean over windows of each one's ratio."""

PER = ("gap", "layer")
"""One operator a gap; or where the layers lie apart, one for every removed layer."""


def channel_scales(
    before: Float[Tensor, " hidden"], after: Float[Tensor, " hidden"]
) -> Float[Tensor, " hidden"]:
    """d_k = mean |y_k| / mean |x_k|; 1 for a channel that is zero before the cut."""
    dead = before == 0
    return torch.where(dead, 1.0, after / before.masked_fill(dead, 1.0))


def stream_scales(evidence: Evidence, mean: str) -> Float[Tensor, " hidden"]:
    """The scales of the stream's own channels, by one of `MEANS`."""
    if mean == "totals":
        return channel_scales(evidence.moments.abs_source, evidence.moments.abs_target)
    assert evidence.ratios is not None
    return evidence.ratios


def fit_linearpatch_diag(
    evidence: Evidence,
    options: FitOptions,
    *,
    mean: str = MEANS[0],
    name: str = "linearpatch-diag",
) -> Repair:
    """M = diag(d) - I."""
    del options
    sums = evidence.select(("x",)).moments
    scales = stream_scales(evidence, mean)
    return linear_repair(name, torch.diag(scales - 1.0), sums)


def fit_linearpatch_hadamard(
    evidence: Evidence,
    options: FitOptions,
    *,
    mean: str = MEANS[0],
    name: str = "linearpatch-hadamard",
) -> Repair:
    """M = H diag(d) H' - I, d from the rotated streams X H and Y H."""
    del options
    scales = evidence.rotated_ratios
    if mean == "totals":
        assert evidence.rotated is not None
        scales = channel_scales(*evidence.rotated)
    assert scales is not None
    basis = hadamard(len(scales)).to(scales.device)
    delta = (basis * (scales - 1.0)) @ basis.T
    return linear_repair(name, delta, evidence.select(("x",)).moments)


def make_linearpatch(arguments: Arguments) -> Method:
    """``linearpatch-diag`` and ``linearpatch-hadamard``, with ``mean=ratios`` and ``per=layer``."""
    mean = arguments.choice("mean", MEANS)
    per_layer = arguments.choice("per", PER) == "layer"
    arguments.finish()
    rotated = arguments.name == "linearpatch-hadamard"
    fit = fit_linearpatch_hadamard if rotated else fit_linearpatch_diag
    return Method(
        arguments.text,
        SOURCE,
        partial(fit, mean=mean, name=arguments.text),
        Needs(("x",), rotated=rotated, basis=rotated, ratios=mean == "ratios"),
        stacks=True,
        per_layer=per_layer,
    )
