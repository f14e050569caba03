"""What a repair leaves to run, before it is fitted: the shapes of its operator's parameters."""

import math

from ghostlayers.repairs.method import RepairMethod


def operator_shapes(method: RepairMethod, hidden: int) -> dict[str, tuple[int, ...]]:
    """Parameters of the operator at one gap, as `modeling.repair_stream` calls them.

    Empty for what folds into existing weights. Of another package's method its features tell: a
    map of the stream for ``x``, of the normalised stream for ``norm``; what comes from a kept layer
    is taken to fold.

    Args:
        method: the repair.
        hidden: channels of the stream.
    """
    if method.form == "fold":
        return {}
    features = getattr(method, "regressors", method.needs.features)
    pieces, rank = max(method.needs.pieces, default=0), getattr(method, "rank", None)
    shapes: dict[str, tuple[int, ...]] = {}
    if pieces:
        shapes = {"centroids": (pieces, hidden), "pieces": (pieces, hidden, hidden)}
    elif rank is not None and rank < hidden:
        shapes = {"reduce": (rank, hidden), "expand": (hidden, rank)}
    elif "x" in features:
        shapes["weight"] = (hidden, hidden)
    if "norm" in features:
        shapes["normed"] = (hidden, hidden)
    if "one" in features:
        shapes["bias"] = (hidden,)
    return shapes


def operator_numbers(method: RepairMethod, hidden: int) -> int:
    """How many numbers these are."""
    return sum(map(math.prod, operator_shapes(method, hidden).values()))
