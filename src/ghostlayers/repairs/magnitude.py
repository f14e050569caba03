"""One scale for the whole stream."""

from dataclasses import dataclass

from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import Evidence, FitOptions, Needs, Repair
from ghostlayers.repairs.linearpatch import Mean, stream_scales
from ghostlayers.repairs.method import RepairMethod
from ghostlayers.statistics.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Magnitude(RepairMethod):
    """Prune&Comp: one number rescales the whole stream, folded into weights.

    y = s x, s the mean over channels of mean |y_k| / mean |x_k|. The paper multiplies the
    embeddings and every write before the cut by s, which a tied head would feel; dividing every
    write *after* the cut by s is the same to all later norms and leaves the head alone.

    Cost: none at run time.

    Attributes:
        mean: ``totals`` for the ratio of means over all tokens; ``ratios`` for the mean of single
            windows' ratios, as the released code does.

    References:
        *Prune&Comp*, arXiv:2507.18212.
    """

    keyword = "magnitude"
    source = "Prune&Comp, arXiv:2507.18212"
    form = "fold"
    scales = True
    stacks = True

    mean: Mean = argument("totals", note="with the mean of single windows' ratios")

    @property
    def needs(self) -> Needs:
        return Needs(("x",), ratios=self.mean == "ratios")

    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        del options
        scale = float(stream_scales(evidence, self.mean).mean())
        return Repair(
            self.name,
            scale=scale,
            num_tokens=evidence.moments.num_tokens,
            relative_residual=_residual(evidence.select(("x",)).moments, scale),
        )


def _residual(sums: Moments, scale: float) -> float:
    """||(s - 1) X - D||^2 / ||D||^2."""
    if sums.target_energy == 0.0:
        return 0.0
    step = scale - 1.0
    left = sums.target_energy - 2 * step * float(sums.cross.trace())
    return max(0.0, left + step * step * float(sums.gram.trace())) / sums.target_energy
