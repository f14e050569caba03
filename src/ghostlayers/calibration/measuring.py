"""Measuring all that a selection asks of one model: the dense one, or one with repaired gaps.

No model is built: each is the dense one with a `Cut`. Each candidate runs only the kept layers
behind what it changes, from the stream that the current model has at that boundary; for that, the
stream of one micro-batch is kept at every boundary. Beyond a micro-batch there are only sums, the
token samples of `scoring` (of the dense and of the current model, where repairs are ranked), and
the stream of the few search windows in `gradients`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ghostlayers.calibration import cuts, scoring
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import COPIES_IN_A_SWEEP, layout_of, make_fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.gathering import Gatherer
from ghostlayers.calibration.gradients import layer_gradients
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.errors import counted
from ghostlayers.model.dense import DenseModel
from ghostlayers.modeling import norm_eps
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import Repair
from ghostlayers.runtime import progress
from ghostlayers.runtime.progress import Advance
from ghostlayers.selection import Scattered, ScoreTable, SpanScore
from ghostlayers.selection.choices import (
    candidate_spans,
    eligible_layers,
    find_selection,
    shortlist,
)
from ghostlayers.selection.residual import TOKENS_PER_CHANNEL, TokenSample
from ghostlayers.selection.weights import counts, magnitude_importance, taylor_importance
from ghostlayers.spans import Span, kept_layers, merge_layers, removed_layers
from ghostlayers.statistics.race import Race
from ghostlayers.surgery.features import reader
from ghostlayers.surgery.folding import scaled_writes
from ghostlayers.surgery.removal import allowed_cuts, loses_any_layer
from ghostlayers.text.tokens import Windows

Repairs = dict[Span, Repair]


class StudyLike(Protocol):
    """All that a selection knows of a `Study`, which stands on a floor above."""

    @property
    def runner(self) -> Runner:
        """Of the dense model."""

    @property
    def recipe(self) -> Recipe:
        """What was asked for: the selection, and how gaps are repaired."""

    @property
    def windows(self) -> Windows:
        """Calibration windows, those that are scored, fitted and searched on."""

    @property
    def held_out(self) -> Windows:
        """Further windows, for losses after repair."""


def searched(study: StudyLike) -> Windows:
    """The calibration windows that searches measure losses and gradients on."""
    return study.windows.first(study.recipe.num_search_windows)


def enough_to_fit(study: StudyLike) -> Windows:
    """The search windows, and as many more as give the tokens that a sampled fit wants."""
    wanted = TOKENS_PER_CHANNEL * study.runner.model.hidden_size
    filled = -(-wanted // study.windows.sequence_length)
    return study.windows.first(max(study.recipe.num_search_windows, filled))


def eligible(study: StudyLike) -> range:
    """The layers that may go one by one."""
    recipe, model = study.recipe, study.runner.model
    keep_first = make_fitting(model, recipe).method.reach > 0
    choice = find_selection(recipe.select)
    return eligible_layers(choice, model.num_layers, recipe.kept_edges, keep_first=keep_first)


def candidates(study: StudyLike) -> list[Span]:
    """The spans that are scored: those that may go, where one run of layers goes."""
    recipe, model = study.recipe, study.runner.model
    contiguous = find_selection(recipe.select).contiguous
    length = recipe.layers or len(recipe.removed() or [])
    keep = recipe.kept_edges if contiguous else None
    spans = candidate_spans(model.num_layers, length, keep)
    if not contiguous:
        return spans
    if make_fitting(model, recipe).method.reach:  # the repair needs a kept layer before the gap
        spans = [span for span in spans if span.start] or spans
    return allowed_cuts(model, spans)


def refit(study: StudyLike, removed: Iterable[int]) -> Repairs:
    """The repairs of all gaps, fitted as those of the result will be."""
    windows = study.windows.first(study.recipe.num_fit_windows)
    fitting = make_fitting(study.runner.model, study.recipe)
    return fit_gaps(study.runner, windows, merge_layers(removed), fitting)


def fit_across(study: StudyLike, layer: int, repairs: Mapping[Span, Repair]) -> Repair:
    """The repair of one kept layer that goes next, between its own input and its own output.

    Both are those of the model as it is now, with its other gaps repaired.
    """
    model, windows = study.runner.model, study.windows.first(study.recipe.num_fit_windows)
    fitting = make_fitting(model, study.recipe)
    span, needs = Span(layer, layer + 1), fitting.method.needs
    layout = layout_of(model, windows, needs, span)
    gatherer = Gatherer(needs, layout, token_weight=fitting.weighting)
    cut = Cut(model, repairs)
    declared = Pass(
        f"across {layer}",
        f"Fitting across layer {layer}",
        len(windows),
        copies=COPIES_IN_A_SWEEP,
    )
    for first, ids in study.runner.visit(declared, windows, gatherer):
        batch, stream = model.begin(ids)
        before = stream
        for boundary, here in cut.walk(batch, stream):
            if boundary == span.stop:
                read = reader(model, before, span, {})
                features = {name: batch.tokens(read(name)) for name in gatherer.features}
                gatherer.add(first, batch.tokens(before), batch.tokens(here), features)
                break
            before = here
    evidence = gatherer.evidence(norm_eps(model.network.config))
    # Neighbours are multiplied before they are rounded.
    return replace(fitting, stored_dtype=torch.float64).fit(evidence, last=True)


# Measuring one model


def measure(
    study: StudyLike,
    spans: Sequence[Span],
    *,
    residuals: bool = False,
    repairs: Mapping[Span, Repair] | None = None,
    dense: TokenSample | None = None,
) -> tuple[ScoreTable, TokenSample | None]:
    """All that a selection needs to know of the dense model, or of one with repaired gaps.

    Args:
        study: what to measure on.
        spans: candidates, of kept layers.
        residuals: measure them even where the selection needs none.
        repairs: the gaps so far.
        dense: the dense model's sample, where there are gaps.

    Returns:
        The table, and the sample behind its residuals.
    """
    recipe, model = study.recipe, study.runner.model
    choice, cut = find_selection(recipe.select), Cut(model, repairs or {})
    by_loss = "held-out losses" in choice.needs and len(study.held_out) > 0
    scored = study.windows.first(recipe.windows)
    table, sample = scoring.measure_scores(
        study.runner,
        scored if choice.scores_streams else searched(study),
        spans,
        cosine_axis=recipe.cosine_axis,
        residuals=residuals or "residuals" in choice.needs,
        cut=cut,
        seed=recipe.seed,
    )
    if not choice.scores_streams:
        table = replace(table, importance=measure_importance(study, cut))
    if by_loss and sample is not None:
        raced = {
            str(span): grown_repairs(study, cut.repairs, span, dense or sample, sample)
            for span in shortlist(table)
        }
        apart = () if cut.repairs or len(spans[0]) == 1 else scattered_layers(study, table)
        if apart:
            fitting = make_fitting(model, recipe)
            raced[SCATTERED] = {
                gap: scoring.fit_sample(model, sample, gap, fitting) for gap in merge_layers(apart)
            }
        table = _add_losses(study, table, raced, cut.repairs, apart)
    return table, sample


SCATTERED = "scattered"


def scattered_layers(study: StudyLike, table: ScoreTable) -> tuple[int, ...]:
    """What ShortGPT would remove, where that is no span and the model can lose any layer."""
    count = len(table.spans[0].span)
    influence = table.block_influence
    layers = sorted(eligible(study), key=lambda layer: influence[layer])[:count]
    alone = len(merge_layers(layers)) == 1 or len(layers) < count
    return () if alone or not loses_any_layer(study.runner.model) else tuple(sorted(layers))


def measure_importance(study: StudyLike, cut: Cut) -> tuple[float, ...]:
    """One number a layer, the lowest of which goes first; infinite for removed layers."""
    choice, windows = find_selection(study.recipe.select), searched(study)
    layers = kept_layers(cut.repairs, cut.model.num_layers)
    norms = "norms" in choice.flags
    if "weights" in choice.needs:
        importance = {layer: _magnitude(cut, layer, norms) for layer in layers}
    elif "gradients" in choice.needs:
        tokens = len(windows) * (windows.sequence_length - 1)
        importance = {
            layer: taylor_importance(
                pair for name, pair in pairs.items() if counts(name, pair[0], norms=norms)
            )
            / tokens
            for layer, pairs in layer_gradients(study.runner, cut, windows)
        }
    else:
        title = without_pass(cut.model, layers, len(windows)).title
        with progress.stage(title, len(layers) * len(windows)) as advance:
            importance = losses_without(study.runner, cut, windows, layers, advance)
    return of_every_layer(cut.model, importance)


def of_every_layer(model: DenseModel, importance: Mapping[int, float]) -> tuple[float, ...]:
    """One number a layer, infinite where there is none."""
    return tuple(importance.get(layer, math.inf) for layer in range(model.num_layers))


def _magnitude(cut: Cut, layer: int, norms: bool) -> float:
    """Of the weights as folded.

    A scale is folded as Prune&Comp's code does, into what the layers *before* its gap write: our
    checkpoints divide what the later ones write instead, which is the same model with other
    weights, and the score is of the weights.
    """
    weights = dict(cut.model.layer(layer).named_parameters()) | cut.weights.get(layer, {})
    scale = math.prod(repair.scale for span, repair in cut.repairs.items() if span.start > layer)
    if scale != 1.0:
        model = cut.model
        weights |= scaled_writes(model.anatomy, model.layer(layer), 1.0 / scale)
    return magnitude_importance(
        weight.detach() for name, weight in weights.items() if counts(name, weight, norms=norms)
    )


def without_pass(model: DenseModel, layers: Sequence[int], windows: int) -> Pass:
    """The pass of `losses_without` for some kept layers."""
    depth = model.num_layers
    return Pass(
        "without each",
        f"Loss without each of {counted(len(layers), 'layer')}",
        windows,
        layers=windows * (depth + sum(depth - layer - 1 for layer in layers)),
        heads=windows * len(layers),
        copies=depth + 2,
    )


def losses_without(
    runner: Runner, cut: Cut, windows: Windows, layers: Sequence[int], advance: Advance
) -> dict[int, float]:
    """Mean loss in nats with one more layer skipped, for each of some kept layers.

    The layer behind receives what the skipped one would have: nothing is repaired.
    """
    model = cut.model
    sums = cuts.LossRows(layers)
    units = len(layers) * len(windows)
    for _, ids in runner.visit(without_pass(model, layers, len(windows)), windows, sums):
        batch, first = model.begin(ids)
        streams = [stream for _, stream in cut.walk(batch, first)]
        for layer in layers:
            end = cut.run(batch, streams[layer], layer + 1)
            sums.rows[layer] += cuts.end_losses(model, batch, end).double().sum().cpu()
            advance(len(ids))
            units -= len(ids)
    advance(units)  # what another process measured, or a killed run had kept
    tokens = len(windows) * (windows.sequence_length - 1)
    return {layer: float(total) / tokens for layer, total in sums.rows.items()}


# Losses after repair


def grown_repairs(
    study: StudyLike,
    repairs: Mapping[Span, Repair],
    span: Span,
    dense: TokenSample,
    current: TokenSample,
) -> Repairs:
    """The repairs once a span more goes: its gap, gaps beside it included, is fitted anew."""
    model, fitting = study.runner.model, make_fitting(study.runner.model, study.recipe)
    if study.recipe.refit == "none":  # across the layer, in the model as it is now
        return {**repairs, span: scoring.fit_sample(model, current, span, fitting)}
    gaps = merge_layers(removed_layers((*repairs, span)))
    gap = next(gap for gap in gaps if span.start in gap)
    received = current if fitting.repaired_inputs else dense
    quick = scoring.fit_sample(model, dense, gap, fitting, received)
    others = {other: repair for other, repair in repairs.items() if other.start not in gap}
    return {**others, gap: quick}


def _add_losses(
    study: StudyLike,
    table: ScoreTable,
    raced: Mapping[str, Repairs],
    base: Mapping[Span, Repair],
    apart: tuple[int, ...],
) -> ScoreTable:
    """The table with the loss after repair of every span on the shortlist, and of layers apart."""
    race, own = cuts.race_cuts(
        study.runner,
        study.held_out,
        raced,
        base=base,
        title="Racing candidates after repair",
    )
    predictions = study.held_out.sequence_length - 1
    lowest = float(race.losses[race.best].mean())
    if apart:
        behind, error = race.behind(SCATTERED)
        finished = SCATTERED not in race.left
        scattered = Scattered(apart, lowest + behind, behind, error, finished)
        table = replace(table, scattered=scattered)
    return replace(
        table,
        spans=tuple(_with_loss(score, race, predictions) for score in table.spans),
        dense_loss=float(own.mean()),
        num_loss_tokens=len(own) * predictions,
    )


def _with_loss(score: SpanScore, race: Race, predictions: int) -> SpanScore:
    name = str(score.span)
    if name not in race.losses:
        return score
    behind, error = race.behind(name)
    return replace(
        score,
        loss=float(race.losses[race.best].mean()) + behind,
        behind=behind,
        behind_error=error,
        finished=name not in race.left,
        loss_tokens=len(race.losses[name]) * predictions,
    )
