"""The ``ridge`` argument that every least-squares repair takes."""

from dataclasses import replace

from ghostlayers.repairs.base import Evidence, FitOptions, Method, Repair


def with_ridge(method: Method, ridge: float | str | None) -> Method:
    """The method with its own ridge instead of the recipe's; ``auto`` lets held-out windows choose.

    Args:
        method: a least-squares method.
        ridge: a number, ``auto``, or None for the recipe's.
    """
    method = replace(method, solves=True)
    if ridge is None:
        return method
    own = None if ridge == "auto" else float(ridge)
    inner = method.fit

    def fit(evidence: Evidence, options: FitOptions) -> Repair:
        return inner(evidence, replace(options, ridge=own))

    return replace(method, fit=fit, needs=replace(method.needs, held_out=own is None))
