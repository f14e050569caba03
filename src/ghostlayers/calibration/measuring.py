"""Measuring all that a selection asks of one model: the dense one, or one with repaired gaps.

No model is built: each is the dense one with a `Cut`. Each candidate runs only the kept layers
behind what it changes, from the stream that the current model has at that boundary; for that, the
stream of one micro-batch is kept at every boundary. Beyond a micro-batch there are only sums, the
token samples of `scoring` (of the dense and of the current model, where repairs are ranked), and
the stream of the few search windows in `gradients`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostlayers.calibration import cuts, scoring
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import COPIES_IN_A_SWEEP, Fitting, layout_of
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.gathering import Gatherer
from ghostlayers.calibration.gradients import layer_gradients
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.modeling import norm_eps
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import Repair
from ghostlayers.runtime.progress import Advance, Silent
from ghostlayers.selection import Scattered, ScoreTable, SpanScore
from ghostlayers.selection.choices import (
    Selection,
    candidate_spans,
    eligible_layers,
    find_selection,
    shortlist,
)
from ghostlayers.selection.residual import TOKENS_PER_CHANNEL, TokenSample
from ghostlayers.selection.weights import counts, magnitude_importance, taylor_importance
from ghostlayers.spans import Span, merge_layers
from ghostlayers.statistics.race import Race
from ghostlayers.surgery.features import reader
from ghostlayers.surgery.folding import scaled_writes
from ghostlayers.surgery.removal import allowed_cuts, loses_any_layer
from ghostlayers.text.tokens import Windows

Repairs = dict[Span, Repair]


@dataclass(frozen=True)
class Selector:
    """A recipe's selection, and what it is measured on.

    Attributes:
        runner: of the dense model.
        windows: calibration windows, those that are scored, fitted and searched on.
        held_out: further windows, for losses after repair.
        recipe: what was asked for.
        fitting: how gaps are repaired.
    """

    runner: Runner
    windows: Windows
    held_out: Windows
    recipe: Recipe
    fitting: Fitting

    @property
    def model(self) -> DenseModel:
        """The dense model."""
        return self.runner.model

    @property
    def choice(self) -> Selection:
        """The selection."""
        return find_selection(self.recipe.select)

    @property
    def scored(self) -> Windows:
        """The calibration windows that scores of the stream are measured on."""
        return self.windows.first(self.recipe.windows)

    @property
    def few(self) -> Windows:
        """The calibration windows that searches measure losses and gradients on."""
        return self.windows.first(self.recipe.num_search_windows)

    @property
    def enough_to_fit(self) -> Windows:
        """The search windows, and as many more as give the tokens that a sampled fit wants."""
        wanted = TOKENS_PER_CHANNEL * self.model.hidden_size
        filled = -(-wanted // self.windows.sequence_length)
        return self.windows.first(max(self.recipe.num_search_windows, filled))

    @property
    def eligible(self) -> range:
        """The layers that may go one by one."""
        return eligible_layers(
            self.choice,
            self.model.num_layers,
            self.recipe.kept_edges,
            keep_first=self.fitting.method.reach > 0,
        )

    @property
    def candidates(self) -> list[Span]:
        """The spans that are scored: those that may go, where one run of layers goes."""
        recipe, contiguous = self.recipe, self.choice.contiguous
        length = recipe.layers or len(recipe.removed() or [])
        keep = recipe.kept_edges if contiguous else None
        spans = candidate_spans(self.model.num_layers, length, keep)
        if not contiguous:
            return spans
        if self.fitting.method.reach:  # the repair needs a kept layer before the gap
            spans = [span for span in spans if span.start] or spans
        return allowed_cuts(self.model, spans)

    def cut(self, repairs: Mapping[Span, Repair]) -> Cut:
        """The model with these gaps, as its checkpoint would be."""
        return Cut(self.model, repairs)

    @property
    def fit_windows(self) -> Windows:
        """The calibration windows that repairs are fitted on."""
        return self.windows.first(self.recipe.num_fit_windows)

    def refit(self, removed: Iterable[int]) -> Repairs:
        """The repairs of all gaps, fitted as those of the result will be."""
        return fit_gaps(self.runner, self.fit_windows, merge_layers(removed), self.fitting)

    def fit_across(self, layer: int, repairs: Mapping[Span, Repair]) -> Repair:
        """The repair of one kept layer that goes next, between its own input and its own output.

        Both are those of the model as it is now, with its other gaps repaired.
        """
        span, needs = Span(layer, layer + 1), self.fitting.method.needs
        layout = layout_of(self.model, self.fit_windows, needs, span)
        gatherer = Gatherer(needs, layout, token_weight=self.fitting.weighting)
        cut = self.cut(repairs)
        declared = Pass(
            f"across {layer}",
            f"Fitting across layer {layer}",
            len(self.fit_windows),
            copies=COPIES_IN_A_SWEEP,
        )
        for first, ids in self.runner.visit(declared, self.fit_windows, gatherer):
            batch, stream = self.model.begin(ids)
            before = stream
            for boundary, here in cut.walk(batch, stream):
                if boundary == span.stop:
                    read = reader(self.model, before, span, {})
                    found = {name: batch.tokens(read(name)) for name in gatherer.features}
                    gatherer.add(first, batch.tokens(before), batch.tokens(here), found)
                    break
                before = here
        evidence = gatherer.evidence(norm_eps(self.model.network.config))
        # Neighbours are multiplied before they are rounded.
        return dataclasses.replace(self.fitting, stored_dtype=torch.float64).fit(
            evidence, last=True
        )


# Measuring one model


def measure(
    selector: Selector,
    spans: Sequence[Span],
    *,
    residuals: bool = False,
    repairs: Mapping[Span, Repair] | None = None,
    dense: TokenSample | None = None,
) -> tuple[ScoreTable, TokenSample | None]:
    """All that a selection needs to know of the dense model, or of one with repaired gaps.

    Args:
        selector: what to measure on.
        spans: candidates, of kept layers.
        residuals: measure them even where the selection needs none.
        repairs: the gaps so far.
        dense: the dense model's sample, where there are gaps.

    Returns:
        The table, and the sample behind its residuals.
    """
    choice, recipe = selector.choice, selector.recipe
    cut = selector.cut(repairs or {})
    by_loss = "held-out losses" in choice.needs and len(selector.held_out) > 0
    table, sample = scoring.measure_scores(
        selector.runner,
        selector.scored if choice.scores_streams else selector.few,
        spans,
        cosine_axis=recipe.cosine_axis,
        residuals=residuals or "residuals" in choice.needs,
        cut=cut,
        seed=recipe.seed,
    )
    if not choice.scores_streams:
        table = dataclasses.replace(table, importance=measure_importance(selector, cut))
    if by_loss and sample is not None:
        candidates = {
            str(span): grown_repairs(selector, cut.repairs, span, dense or sample, sample)
            for span in shortlist(table)
        }
        apart = () if cut.repairs or len(spans[0]) == 1 else scattered_layers(selector, table)
        if apart:
            candidates[SCATTERED] = {
                gap: scoring.fit_sample(selector.model, sample, gap, selector.fitting)
                for gap in merge_layers(apart)
            }
        table = _add_losses(selector, table, candidates, cut.repairs, apart)
    return table, sample


SCATTERED = "scattered"


def scattered_layers(selector: Selector, table: ScoreTable) -> tuple[int, ...]:
    """What ShortGPT would remove, where that is no span and the model can lose any layer."""
    count = len(table.spans[0].span)
    influence = table.block_influence
    layers = sorted(selector.eligible, key=lambda layer: influence[layer])[:count]
    alone = len(merge_layers(layers)) == 1 or len(layers) < count
    return () if alone or not loses_any_layer(selector.model) else tuple(sorted(layers))


def measure_importance(selector: Selector, cut: Cut) -> tuple[float, ...]:
    """One number a layer, the lowest of which goes first; infinite for removed layers."""
    norms = "norms" in selector.choice.flags
    needs = selector.choice.needs
    if "weights" in needs:
        found = {layer: _magnitude(cut, layer, norms) for layer in _kept(cut)}
    elif "gradients" in needs:
        steps = layer_gradients(selector.runner, cut, selector.few)
        tokens = len(selector.few) * (selector.few.sequence_length - 1)
        found = {
            layer: taylor_importance(
                pair for name, pair in pairs.items() if counts(name, pair[0], norms=norms)
            )
            / tokens
            for layer, pairs in steps
        }
    else:
        layers = _kept(cut)
        total = len(layers) * len(selector.few)
        title = without_pass(selector.model, layers, len(selector.few)).title
        with selector.runner.progress.stage(title, total) as advance:
            found = losses_without(selector.runner, cut, selector.few, layers, advance)
    every = range(selector.model.num_layers)
    return tuple(found.get(layer, float("inf")) for layer in every)


def _kept(cut: Cut) -> list[int]:
    removed = {layer for span in cut.repairs for layer in span.layers}
    return [layer for layer in range(cut.model.num_layers) if layer not in removed]


def _magnitude(cut: Cut, layer: int, norms: bool) -> float:
    """Of the weights as folded.

    A scale is folded as Prune&Comp's code does, into what the layers *before* its gap write: our
    checkpoints divide what the later ones write instead, which is the same model with other
    weights, and the score is of the weights.
    """
    weights = dict(cut.model.layer(layer).named_parameters()) | cut.weights.get(layer, {})
    scale = math.prod(each.scale for span, each in cut.repairs.items() if span.start > layer)
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
        f"Loss without each of {len(layers)} layers",
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
    sums = _LayerSums(len(layers))
    units = len(layers) * len(windows)
    silent = replace(runner, progress=Silent())  # the caller draws one bar for all layers
    for _, ids in silent.visit(without_pass(model, layers, len(windows)), windows, sums):
        batch, first = model.begin(ids)
        streams = [stream for _, stream in cut.walk(batch, first)]
        for row, layer in enumerate(layers):
            end = cut.run(batch, streams[layer], layer + 1)
            sums.losses[row] += cuts.end_losses(model, batch, end).double().sum().cpu()
            advance(len(ids))
            units -= len(ids)
    advance(units)  # what another process measured, or a killed run had kept
    tokens = len(windows) * (windows.sequence_length - 1)
    return {layer: float(sums.losses[row]) / tokens for row, layer in enumerate(layers)}


class _LayerSums:
    """A sum of losses a layer."""

    def __init__(self, count: int) -> None:
        self.losses = torch.zeros(count, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        return {"losses": self.losses}


# Losses after repair


def grown_repairs(
    selector: Selector,
    repairs: Mapping[Span, Repair],
    span: Span,
    dense: TokenSample,
    current: TokenSample,
) -> Repairs:
    """The repairs once a span more goes: its gap, gaps beside it included, is fitted anew."""
    if selector.recipe.refit == "none":  # across the layer, in the model as it is now
        alone = scoring.fit_sample(selector.model, current, span, selector.fitting)
        return {**repairs, span: alone}
    gap, *_ = [each for each in merge_layers(removed_with(repairs, span)) if span.start in each]
    received = current if selector.fitting.repaired_inputs else dense
    quick = scoring.fit_sample(selector.model, dense, gap, selector.fitting, received)
    others = {each: repair for each, repair in repairs.items() if each.start not in gap}
    return {**others, gap: quick}


def removed_with(repairs: Iterable[Span], *more: Span) -> list[int]:
    """All layers of some gaps."""
    return [layer for span in (*repairs, *more) for layer in span.layers]


def _add_losses(
    selector: Selector,
    table: ScoreTable,
    candidates: Mapping[str, Repairs],
    base: Mapping[Span, Repair],
    apart: tuple[int, ...],
) -> ScoreTable:
    """The table with the loss after repair of every span on the shortlist, and of layers apart."""
    race, own = cuts.race_cuts(
        selector.runner,
        selector.held_out,
        candidates,
        base=base,
        title="Racing candidates after repair",
    )
    predictions = selector.held_out.sequence_length - 1
    lowest = float(race.losses[race.best].mean())
    if apart:
        behind, error = race.behind(SCATTERED)
        finished = SCATTERED not in race.left
        found = Scattered(apart, lowest + behind, behind, error, finished)
        table = dataclasses.replace(table, scattered=found)
    return dataclasses.replace(
        table,
        spans=tuple(_with_loss(each, race, predictions) for each in table.spans),
        dense_loss=float(own.mean()),
        num_loss_tokens=len(own) * predictions,
    )


def _with_loss(score: SpanScore, race: Race, predictions: int) -> SpanScore:
    name = str(score.span)
    if name not in race.losses:
        return score
    behind, error = race.behind(name)
    return dataclasses.replace(
        score,
        loss=float(race.losses[race.best].mean()) + behind,
        behind=behind,
        behind_error=error,
        finished=name not in race.left,
        loss_tokens=len(race.losses[name]) * predictions,
    )
