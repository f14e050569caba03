"""No repair: the bare cut, for comparison."""

from dataclasses import dataclass

from ghostlayers.repairs.base import Evidence, FitOptions, Needs, Repair
from ghostlayers.repairs.method import RepairMethod


@dataclass(frozen=True)
class NoRepair(RepairMethod):
    """The layers are gone and nothing is done about it.

    y = x: the next layer receives what it was never trained on.
    """

    keyword = "none"
    source = "the bare cut"
    form = "fold"
    writes_weights = False
    needs = Needs(features=())

    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        del options
        sums = evidence.moments
        left = 1.0 if sums.target_energy else 0.0
        return Repair(self.name, num_tokens=sums.num_tokens, relative_residual=left)
