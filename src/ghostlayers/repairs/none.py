"""No repair: the bare cut, for comparison."""

from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import Evidence, FitOptions, Method, Needs, Repair


def fit_none(evidence: Evidence, options: FitOptions) -> Repair:
    """Leave the stream as it is: the next layer receives what it was never trained on."""
    del options
    sums = evidence.moments
    return Repair(
        "none",
        num_tokens=sums.num_tokens,
        relative_residual=1.0 if sums.target_energy else 0.0,
    )


def make_none(arguments: Arguments) -> Method:
    """``none``, without arguments."""
    arguments.finish()
    return Method("none", "the bare cut", fit_none, Needs(features=()), form="fold")
