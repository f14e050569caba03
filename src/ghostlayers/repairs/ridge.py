"""The ``ridge`` and ``weight`` arguments that every least-squares repair takes."""

from dataclasses import replace

from ghostlayers.repairs.arguments import Tuning
from ghostlayers.repairs.base import Fit, Method, Needs


def with_ridge(method: Method, tuning: Tuning) -> Method:
    """The method with its own ridge and token weights instead of the recipe's.

    Args:
        method: a least-squares method.
        tuning: what its name says; a ridge of ``auto`` lets held-out windows choose.
    """
    method = replace(method, solves=True, named_weight=tuning.weight)
    ridge = tuning.ridge
    if ridge is None:
        return method
    own = None if ridge == "auto" else float(ridge)

    def damped(inner: Fit) -> Fit:
        return lambda evidence, options: inner(evidence, replace(options, ridge=own))

    def needing(needs: Needs) -> Needs:
        return replace(needs, held_out=needs.held_out or own is None)

    before = tuple(
        replace(stage, fit=damped(stage.fit), needs=needing(stage.needs)) for stage in method.before
    )
    return replace(method, fit=damped(method.fit), needs=needing(method.needs), before=before)
