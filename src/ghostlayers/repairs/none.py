"""No repair: the bare cut, for comparison."""

from ghostlayers.moments import Moments
from ghostlayers.repairs.base import FitOptions, Method, Repair


def fit_none(moments: Moments, options: FitOptions) -> Repair:
    """Leave the stream as it is: the next layer receives what it was never trained on."""
    del options
    return Repair("none", None, moments.num_tokens, 1.0 if moments.target_energy else 0.0)


NONE = Method("none", "the bare cut", fit_none)
