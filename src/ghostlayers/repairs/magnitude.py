r"""Prune&Comp's magnitude compensation: one scale for the whole stream.

References:
    *Prune&Comp*, arXiv:2507.18212: s is the mean over channels of mean |y_k| / mean |x_k|. The
    paper multiplies the embeddings and every write before the cut by s, which a tied head would
    feel; dividing every write *after* the cut by s is the same to all later norms and leaves the
    head alone. The ratio is of means over all tokens; ``mean=ratios`` averages the ratios of
    single windows, as the released code does.
"""

from functools import partial

from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import Evidence, FitOptions, Method, Needs, Repair
from ghostlayers.repairs.linearpatch import MEANS, stream_scales
from ghostlayers.statistics.moments import Moments


def fit_magnitude(
    evidence: Evidence, options: FitOptions, *, mean: str = MEANS[0], name: str = "magnitude"
) -> Repair:
    """Y = s x, s the mean channel ratio of absolute values."""
    del options
    sums = evidence.moments
    scale = float(stream_scales(evidence, mean).mean())
    return Repair(
        name,
        scale=scale,
        num_tokens=sums.num_tokens,
        relative_residual=_residual(evidence.select(("x",)).moments, scale),
    )


def _residual(sums: Moments, scale: float) -> float:
    """||(s - 1) X - D||^2 / ||D||^2."""
    if sums.target_energy == 0.0:
        return 0.0
    step = scale - 1.0
    left = sums.target_energy - 2 * step * float(sums.cross.trace())
    return max(0.0, left + step * step * float(sums.gram.trace())) / sums.target_energy


def make_magnitude(arguments: Arguments) -> Method:
    """``magnitude``, ``magnitude:mean=ratios``."""
    mean = arguments.choice("mean", MEANS)
    arguments.finish()
    return Method(
        arguments.text,
        "Prune&Comp, arXiv:2507.18212",
        partial(fit_magnitude, mean=mean, name=arguments.text),
        Needs(("x",), ratios=mean == "ratios"),
        scales=True,
        form="fold",
        stacks=True,
        writes_weights=True,
    )
