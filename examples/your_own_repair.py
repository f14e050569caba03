"""A repair of one's own: given as an object, or by name once a package announces it."""

from dataclasses import dataclass

import torch

from ghostlayers import repairs


@dataclass(frozen=True)
class Channels(repairs.RepairMethod):
    """A slope and a shift for each channel, by least squares.

    y_k = x_k + share (m_k x_k + b_k), m_k and b_k by the regression of y_k - x_k on x_k and 1.
    """

    keyword = "channels"
    needs = repairs.Needs(("x", "one"))
    share: float = repairs.argument(1.0, note="only in part")

    def fit(self, evidence: repairs.Evidence, options: repairs.FitOptions) -> repairs.Repair:
        sums = evidence.select(("x", "one")).moments
        count, x, d = sums.gram[-1, -1], sums.gram[:-1, -1], sums.cross[-1]
        spread = (1.0 + (options.ridge or 0.0)) * sums.gram.diagonal()[:-1] - x * x / count
        product = sums.cross.diagonal() - x * d / count
        slope = self.share * product / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        shift = (self.share * d - slope * x) / count
        return repairs.linear_repair(self.name, evidence, torch.diag(slope), shift)
