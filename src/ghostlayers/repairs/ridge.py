"""The ``ridge`` argument that every least-squares repair takes."""

from dataclasses import replace

from ghostlayers.repairs.base import Fit, Method, Needs


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

    def damped(inner: Fit) -> Fit:
        return lambda evidence, options: inner(evidence, replace(options, ridge=own))

    def needing(needs: Needs) -> Needs:
        return replace(needs, held_out=own is None)

    before = tuple(
        replace(stage, fit=damped(stage.fit), needs=needing(stage.needs)) for stage in method.before
    )
    return replace(method, fit=damped(method.fit), needs=needing(method.needs), before=before)
