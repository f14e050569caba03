"""How gaps are fitted, what is gathered for it, and what that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from ghostlayers.calibration.gathering import Gatherer, Layout, gathered_features
from ghostlayers.calibration.passes import Pass
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream
from ghostlayers.modeling import norm_eps
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Evidence, FitOptions, Needs, Repair
from ghostlayers.repairs.method import Fit, RepairMethod
from ghostlayers.repairs.through_norm import SOLVES
from ghostlayers.runtime.parallel import by_first
from ghostlayers.spans import Span, removed_layers
from ghostlayers.statistics import moments
from ghostlayers.statistics.moments import TokenWeight
from ghostlayers.surgery.features import (
    feature_widths,
    mlp_output_of,
    reader,
    refits_through_norm,
)
from ghostlayers.text.tokens import Windows

MATRICES_OF_A_FIT = 2
"""Square matrices of all features that solving takes beside the sums: the equilibrated and damped
Gram matrix, which is factored in its place, and a copy of it for its eigenvalues, or the solution.
The last fit of an evidence does without the first (`regress`)."""


COPIES_IN_A_SWEEP = 6
"""Of the stream, while it is gathered: before and behind a gap, and features as wide or wider."""


KEPT_OF_A_TOKEN = 3
"""Vectors of every token that a descent keeps: the stream before and after, the MLP's output."""


@dataclass(frozen=True)
class Fitting:
    """How gaps are fitted.

    Attributes:
        method: the repair.
        options: its damping.
        token_weight: how much each token counts; None for what suits the method.
        repaired_inputs: fit each gap on the stream repaired so far, not on the dense one.
        stored_dtype: repairs are rounded to it once, as the checkpoint will hold them.
    """

    method: RepairMethod
    options: FitOptions = field(default_factory=FitOptions)
    token_weight: TokenWeight | None = None
    repaired_inputs: bool = True
    stored_dtype: torch.dtype = torch.float32

    @property
    def weighting(self) -> TokenWeight:
        """How much each token counts."""
        return self.method.named_weight or self.token_weight or self.method.token_weight

    def fit(self, evidence: Evidence, by: Fit | None = None, *, last: bool = False) -> Repair:
        """Solve, and round the operator as it will be stored; every process gets the first's.

        A stage is fitted ``by`` its own fit. The ``last`` fit of an evidence may use it up.
        """
        evidence = replace(evidence, expendable=last)
        fit = by or self.method.fit
        return by_first(lambda: fit(evidence, self.options).rounded(self.stored_dtype))


def sums_bytes(model: DenseModel, fitting: Fitting, spans: Sequence[Span]) -> int:
    """Memory that a fit takes beside weights and streams: see `MATRICES_OF_A_FIT`."""
    method = fitting.method
    spans = parts_of(method, spans)
    gaps = len(spans) if one_sweep(model, fitting, len(spans)) else 1
    width = 0
    for needs in (method.needs, *(stage.needs for stage in method.before)):
        names = {"x", *gathered_features(needs)}
        width = max(width, sum(feature_widths(model, names).values()))
    hidden = int(model.hidden_size)
    gathered = (2 if method.needs.held_out else 1) * (1 + sum(method.needs.pieces) * gaps)
    solving = MATRICES_OF_A_FIT * width * width
    return moments.ACCUMULATOR.itemsize * (
        gaps * gathered * (width * width + width * hidden) + solving
    )


def tokens_bytes(
    model: DenseModel, fitting: Fitting, num_tokens: int, spans: Sequence[Span]
) -> int:
    """Memory that a fit by descent takes, which sees all tokens again and again."""
    if not fitting.method.needs.tokens:
        return 0
    hidden = int(model.hidden_size)
    gaps = len(spans) if one_sweep(model, fitting, len(spans)) else 1
    return gaps * KEPT_OF_A_TOKEN * num_tokens * hidden * int(model.dtype.itemsize)


SOLUTIONS_OF_A_FIT = 5.0
"""Solving with its condition number, in Cholesky factorisations of the same width.

Measured: ``benchmarks/plan.py`` compares planned with real seconds.
"""


def fit_pass(
    model: DenseModel, spans: Sequence[Span], fitting: Fitting, windows: int, length: int
) -> Pass:
    """What `fit_many` does for one fitting: layers, moments, solving, and what it holds.

    Args:
        model: the dense model.
        spans: the gaps.
        fitting: how.
        windows: that it is fitted on.
        length: tokens of each.
    """
    method = fitting.method
    spans = parts_of(method, spans)
    gathered = tuple(feature_widths(model, gathered_features(method.needs)).items())
    width, pieces = sum(size for _, size in gathered), sum(method.needs.pieces)
    products = moments.products_of_a_token(gathered, model.hidden_size)
    if pieces:  # every token is in the moments of one piece, too
        products += moments.products_of_a_token((("x", model.hidden_size),), model.hidden_size)
    staged, stages = in_stages(model, method), 1 + len(method.before)
    solves = stages * (SOLVES if refits_through_norm(model, method) else 1)
    walked = len(spans) > 1 and fitting.repaired_inputs
    streams = 3 if walked or pieces or staged else 0
    stream = length * model.hidden_size * model.dtype.itemsize
    return Pass(
        "moments",
        "Fitting the repairs",
        windows,
        layers=windows * _layers_of_a_fit(model, spans, fitting),
        products=windows * length * products * len(spans) * solves,
        solutions=len(spans) * (solves + pieces) * SOLUTIONS_OF_A_FIT * width**3 / 3,
        copies=COPIES_IN_A_SWEEP,
        held=sums_bytes(model, fitting, spans)
        + tokens_bytes(model, fitting, windows * length, spans)
        + windows * streams * stream,
    )


def _layers_of_a_fit(model: DenseModel, spans: Sequence[Span], fitting: Fitting) -> int:
    """Decoder layers that a window passes: up to the last gap, and again from gap to gap."""
    method = fitting.method
    between = spans[-1].start - spans[0].stop if len(spans) > 1 and fitting.repaired_inputs else 0
    # A stage is a pass over the kept layers that the method reads or changes.
    passes = (1 + len(method.before)) * (SOLVES + 1 if refits_through_norm(model, method) else 1)
    again = len(spans) * passes * method.reach if in_stages(model, method) else 0
    return spans[-1].stop + between + again


def stacks(method: RepairMethod, spans: Sequence[Span]) -> bool:
    """Whether every removed layer gets an operator of its own: where they lie apart, if at all."""
    return method.per_layer and len(spans) > 1


def parts_of(method: RepairMethod, spans: Sequence[Span]) -> Sequence[Span]:
    """What gets an operator of its own: every gap, or every removed layer."""
    if not stacks(method, spans):
        return spans
    return [Span(layer, layer + 1) for layer in removed_layers(spans)]


def one_sweep(model: DenseModel, fitting: Fitting, gaps: int) -> bool:
    """Whether a single sweep over the dense stream gathers all that a method needs."""
    method = fitting.method
    if method.name == "none":
        return True
    alone = gaps == 1 or not fitting.repaired_inputs
    return alone and not in_stages(model, method) and not method.needs.pieces


def in_stages(model: DenseModel, method: RepairMethod) -> bool:
    """Whether a fit goes over the kept layers before a gap several times."""
    return bool(method.before) or refits_through_norm(model, method)


def layout_of(
    model: DenseModel, windows: Windows, needs: Needs, span: Span, back: int = 1
) -> Layout:
    """What will come to a gap; ``z``, ``m`` and ``o`` from the layer so many before it."""
    names = {"x", *gathered_features(needs)}
    from_removed = names & {"phi"}
    widths = feature_widths(model, names - from_removed, max(0, span.start - back))
    return Layout(
        widths | feature_widths(model, from_removed, span.start),
        len(windows),
        windows.sequence_length,
        model.dtype,
        model.device,
    )


def needs_by_weight(fittings: Sequence[Fitting]) -> dict[TokenWeight, Needs]:
    """What fittings of one token weight want together."""
    return {
        kind: reduce(
            or_, (fitting.method.needs for fitting in fittings if fitting.weighting == kind)
        )
        for kind in {fitting.weighting for fitting in fittings}
    }


def evidence_at(model: DenseModel, gatherer: Gatherer, span: Span, back: int = 1) -> Evidence:
    """What was gathered at a gap, with the projection that a fold behind it would change."""
    output = None
    if {"z", "m"} & set(gatherer.features):
        output = mlp_output_of(model, model.layer(span.start - back))
    return gatherer.evidence(norm_eps(model.network.config), output)


def features_at(
    model: DenseModel,
    names: Sequence[str],
    batch: MicroBatch,
    stream: Stream,
    tapped: Mapping[str, Tensor],
    span: Span,
) -> dict[str, Tensor]:
    """Features by name, [tokens, width], padding left out."""
    read = reader(model, stream, span, tapped)
    return {name: batch.tokens(read(name)) for name in names}


def make_fitting(
    loaded: DenseModel, recipe: Recipe, repair: str | RepairMethod | None = None
) -> Fitting:
    """How the recipe wants gaps fitted, with another repair than its own if one is named."""
    return Fitting(
        method=recipe.method if repair is None else find_method(repair),
        options=FitOptions(ridge=recipe.ridge, absolute_ridge=recipe.absolute_ridge),
        token_weight=None if recipe.token_weight == "auto" else recipe.token_weight,
        repaired_inputs=recipe.inputs == "repaired",
        stored_dtype=loaded.stored_dtype,
    )
