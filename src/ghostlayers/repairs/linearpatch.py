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

from ghostlayers.moments import Moments
from ghostlayers.repairs.base import FitOptions, Method, Repair, relative_residual
from ghostlayers.repairs.hadamard import hadamard


def channel_scales(moments: Moments) -> Float[Tensor, " hidden"]:
    """d_k = mean |y_k| / mean |x_k|; 1 for a channel that is zero before the cut."""
    dead = moments.abs_source == 0
    return torch.where(dead, 1.0, moments.abs_target / moments.abs_source.masked_fill(dead, 1.0))


def fit_linearpatch_diag(moments: Moments, options: FitOptions) -> Repair:
    """M = diag(d) - I."""
    del options
    delta = torch.diag(channel_scales(moments) - 1.0)
    return Repair("linearpatch-diag", delta, moments.num_tokens, relative_residual(moments, delta))


def fit_linearpatch_hadamard(moments: Moments, options: FitOptions) -> Repair:
    """M = H diag(d) H' - I, from moments of the rotated streams X H and Y H.

    The residual is the same in either basis, because H is orthogonal.
    """
    del options
    rotated = torch.diag(channel_scales(moments) - 1.0)
    basis = hadamard(rotated.shape[0]).to(rotated.device)
    return Repair(
        "linearpatch-hadamard",
        basis @ rotated @ basis.T,
        moments.num_tokens,
        relative_residual(moments, rotated),
    )


LINEARPATCH_DIAG = Method("linearpatch-diag", "LinearPatch, arXiv:2505.24680", fit_linearpatch_diag)
LINEARPATCH_HADAMARD = Method(
    "linearpatch-hadamard",
    "LinearPatch, arXiv:2505.24680",
    fit_linearpatch_hadamard,
    basis=hadamard,
)
