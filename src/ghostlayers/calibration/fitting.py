"""Fitting repairs: what is gathered at each gap, on which stream, and in which order.

With one gap, or on the dense model's own stream, one sweep gathers everything and no activation
outlives its micro-batch. Where a later gap must be fitted on the stream that the earlier repairs
leave, or a method refits several layers one after another, the stream of all windows is kept at the
boundaries that matter, in the model's own type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostlayers.calibration.fits import (
    COPIES_IN_A_SWEEP,
    Fitting,
    evidence_at,
    features_at,
    layout_of,
    needs_by_weight,
    one_sweep,
    stacks,
    sums_bytes,
    tokens_bytes,
)
from ghostlayers.calibration.gap_walk import GapWalk
from ghostlayers.calibration.gathering import Gatherer
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import check_finite
from ghostlayers.repairs.base import Repair
from ghostlayers.repairs.stack import stack
from ghostlayers.spans import Span, removed_layers
from ghostlayers.statistics.moments import TokenWeight
from ghostlayers.surgery.features import caught, tap_places
from ghostlayers.text.tokens import Windows


def fit_gaps(
    runner: Runner, windows: Windows, spans: Sequence[Span], fitting: Fitting
) -> dict[Span, Repair]:
    """Fit one repair a gap.

    Args:
        runner: of the dense model.
        windows: what to fit on.
        spans: the gaps, in order.
        fitting: how.

    Raises:
        NumericalError: the fit is impossible.
    """
    return fit_many(runner, windows, spans, {"": fitting})[""]


def fit_many(
    runner: Runner, windows: Windows, spans: Sequence[Span], fittings: Mapping[str, Fitting]
) -> dict[str, dict[Span, Repair]]:
    """Fit several repairs of the same cut, sharing all that they can; arguments as `fit_gaps`.

    Evidence that several methods want of the same stream is gathered once. A method that cannot be
    fitted stops them all: check it beforehand with `features.check_method`.
    """
    model, num_tokens = runner.model, windows.input_ids.numel()
    size = sum(
        sums_bytes(model, fitting, spans) + tokens_bytes(model, fitting, num_tokens, spans)
        for fitting in fittings.values()
    )
    with model.residency.memory.taking(size):
        return _fit_many(runner, windows, spans, fittings)


def _fit_many(
    runner: Runner, windows: Windows, spans: Sequence[Span], fittings: Mapping[str, Fitting]
) -> dict[str, dict[Span, Repair]]:
    stacked = {name: how for name, how in fittings.items() if stacks(how.method, spans)}
    others = {name: how for name, how in fittings.items() if name not in stacked}
    fitted = _fit_together(runner, windows, spans, others)
    # Neighbours are multiplied before they are rounded.
    exact = {name: replace(how, stored_dtype=torch.float64) for name, how in stacked.items()}
    parts = [Span(layer, layer + 1) for layer in removed_layers(spans)]
    for name, repairs in _fit_together(runner, windows, parts, exact).items():
        dtype = stacked[name].stored_dtype
        fitted[name] = {gap: repair.rounded(dtype) for gap, repair in stack(repairs).items()}
    return {name: _named(fitted[name], name) for name in fittings}


def _named(repairs: dict[Span, Repair], name: str) -> dict[Span, Repair]:
    """Repairs by the name that they were asked for: it may bring an object of a script along."""
    return {
        gap: replace(repair, method=name) if repair.method == name else repair
        for gap, repair in repairs.items()
    }


def _fit_together(
    runner: Runner, windows: Windows, spans: Sequence[Span], fittings: Mapping[str, Fitting]
) -> dict[str, dict[Span, Repair]]:
    if not fittings:
        return {}
    if all(one_sweep(runner.model, fitting, len(spans)) for fitting in fittings.values()):
        return _fit_in_one_sweep(runner, windows, spans, fittings)
    return GapWalk(runner, windows, spans, fittings).fit()


def _fit_in_one_sweep(
    runner: Runner, windows: Windows, spans: Sequence[Span], fittings: Mapping[str, Fitting]
) -> dict[str, dict[Span, Repair]]:
    model = runner.model
    gathered = _Gathered(
        {
            kind: {
                span: Gatherer(needs, layout_of(model, windows, needs, span), token_weight=kind)
                for span in spans
            }
            for kind, needs in needs_by_weight(list(fittings.values())).items()
        }
    )
    declared = Pass("moments", "Gathering moments", len(windows), copies=COPIES_IN_A_SWEEP)
    for first, ids in runner.visit(declared, windows, gathered):
        _gather_dense(model, first, ids, spans, gathered.by_weight)
    gatherers = gathered.by_weight
    evidence = {
        kind: {span: evidence_at(model, gatherer, span) for span, gatherer in by_span.items()}
        for kind, by_span in gatherers.items()
    }
    return {
        name: {
            span: fitting.fit(evidence[fitting.weighting][span], last=len(fittings) == 1)
            for span in spans
        }
        for name, fitting in fittings.items()
    }


@dataclass(frozen=True)
class _Gathered:
    """The evidence of several gaps, as one pass makes it."""

    by_weight: dict[TokenWeight, dict[Span, Gatherer]]

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        return {
            f"{kind}.{span}.{name}": tensor
            for kind, by_span in sorted(self.by_weight.items())
            for span, gatherer in by_span.items()
            for name, tensor in gatherer.tensors().items()
        }


@torch.no_grad()
def _gather_dense(
    model: DenseModel,
    first: int,
    ids: Tensor,
    spans: Sequence[Span],
    gatherers: Mapping[TokenWeight, Mapping[Span, Gatherer]],
) -> None:
    """Add the dense stream of some windows to the evidence of every gap."""
    batch, hidden = model.begin(ids)
    names = tuple(
        {name for by_span in gatherers.values() for g in by_span.values() for name in g.features}
    )
    before: dict[Span, tuple[Tensor, dict[str, Tensor]]] = {}
    stop = max(span.stop for span in spans)
    taps = tap_places(model, names)
    caught_now: dict[str, Tensor] = {}
    for boundary in range(stop + 1):
        for span in spans:
            if boundary == span.stop:
                x, features = before.pop(span)
                for by_span in gatherers.values():
                    by_span[span].add(first, x, batch.tokens(hidden), features)
            if boundary == span.start:
                read = features_at(model, names, batch, hidden, caught_now, span)
                before[span] = (batch.tokens(hidden), read)
        if boundary < stop:
            wanted = taps if any(span.start == boundary + 1 for span in spans) else {}
            hidden = model.run_layer(boundary, batch, hidden, taps=tuple(wanted.values()))
            check_finite(hidden, boundary)
            caught_now = caught(wanted, hidden)
