r"""LinearPatch: one positive scale a channel, in the stream's basis or in a Hadamard basis.

References:
    Chen et al., *A Simple Linear Patch Revives Layer-Pruned LLMs*, arXiv:2505.24680:
    x -> x H diag(d) H', d_k the ratio of the mean absolute values after and before the cut in the
    rotated basis. With H = I the diagonal form. The ratio here is of means over all tokens, as the
    paper's formula reads; the released code for a contiguous cut averages the ratios of single
    windows instead.
"""

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


def channel_scales(
    before: Float[Tensor, " hidden"], after: Float[Tensor, " hidden"]
) -> Float[Tensor, " hidden"]:
    """d_k = mean |y_k| / mean |x_k|; 1 for a channel that is zero before the cut."""
    dead = before == 0
    return torch.where(dead, 1.0, after / before.masked_fill(dead, 1.0))


def fit_linearpatch_diag(evidence: Evidence, options: FitOptions) -> Repair:
    """M = diag(d) - I."""
    del options
    sums = evidence.select(("x",)).moments
    delta = torch.diag(channel_scales(sums.abs_source, sums.abs_target) - 1.0)
    return linear_repair("linearpatch-diag", delta, sums)


def fit_linearpatch_hadamard(evidence: Evidence, options: FitOptions) -> Repair:
    """M = H diag(d) H' - I, d from the rotated streams X H and Y H."""
    del options
    assert evidence.rotated is not None
    scales = channel_scales(*evidence.rotated)
    basis = hadamard(len(scales)).to(scales.device)
    delta = (basis * (scales - 1.0)) @ basis.T
    return linear_repair("linearpatch-hadamard", delta, evidence.select(("x",)).moments)


def make_linearpatch_diag(arguments: Arguments) -> Method:
    """``linearpatch-diag``, without arguments."""
    arguments.finish()
    return Method("linearpatch-diag", SOURCE, fit_linearpatch_diag)


def make_linearpatch_hadamard(arguments: Arguments) -> Method:
    """``linearpatch-hadamard``, without arguments."""
    arguments.finish()
    needs = Needs(("x",), rotated=True, basis=True)
    return Method("linearpatch-hadamard", SOURCE, fit_linearpatch_hadamard, needs)
