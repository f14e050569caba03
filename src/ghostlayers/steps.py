"""The steps of a run between the calibration windows and the surgery.

Each is one call into `measuring`, `search`, `fitting`, `cuts` or `selection`, with the recipe
filled in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ghostlayers import cuts, scoring, search, surgery
from ghostlayers import fitting as fits
from ghostlayers.evaluation.losses import LossSums
from ghostlayers.fitting import Fitting
from ghostlayers.measuring import Ground, measure
from ghostlayers.progress import Progress
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import Repair
from ghostlayers.scores import ScoreTable
from ghostlayers.scores.births import born_inside
from ghostlayers.selection import candidate_spans, check_eligible, select
from ghostlayers.spans import Span, check_layers
from ghostlayers.stock_layer import check_same, with_stock_layers
from ghostlayers.stream import LayerwiseModel
from ghostlayers.tokens import Windows

NORM_WINDOWS = 4
"""Windows on which massive activations are looked for when nothing else is scored."""


@dataclass(frozen=True)
class Run:
    """How a run is carried out, and who is told.

    Attributes:
        options: how.
        progress: told of every stage.
        memo: where sweeps are kept for a later choice on the same windows.
    """

    options: RunOptions
    progress: Progress
    memo: scoring.Memo | None = None


def measure_table(
    run: Run,
    model: LayerwiseModel,
    windows: Windows,
    held_out: Windows,
    recipe: Recipe,
    fitting: Fitting,
    *,
    residuals: bool,
) -> ScoreTable:
    """Scores of all candidate spans; losses of the shortlist if the selection decides by them."""
    ground = _ground(run, model, windows, held_out, recipe, fitting)
    return _measure(ground, residuals=residuals)


def _ground(
    run: Run,
    model: LayerwiseModel,
    windows: Windows,
    held_out: Windows,
    recipe: Recipe,
    fitting: Fitting,
) -> Ground:
    batch_size, progress = run.options.batch_size, run.progress
    return Ground(model, windows, held_out, recipe, fitting, batch_size, progress, run.memo)


def _measure(ground: Ground, *, residuals: bool) -> ScoreTable:
    recipe, contiguous = ground.recipe, ground.choice.contiguous
    length = recipe.layers or len(recipe.removed() or [])
    keep = recipe.kept_edges if contiguous else None
    spans = candidate_spans(ground.model.num_layers, length, keep)
    if ground.fitting.method.reach and contiguous:
        # The repair needs a kept layer before the gap.
        spans = [span for span in spans if span.start] or spans
    if contiguous:
        spans = surgery.allowed_cuts(ground.model.model, spans)
    return measure(ground, spans, residuals=residuals)[0]


def choose_spans(
    run: Run,
    model: LayerwiseModel,
    windows: Windows,
    held_out: Windows,
    recipe: Recipe,
    fitting: Fitting,
) -> search.Found:
    """The spans to remove: those that the caller named, or those that the selection takes."""
    removed = recipe.removed()
    if removed is not None:
        return search.Found(check_layers(removed, model.num_layers))
    assert recipe.layers is not None
    ground = _ground(run, model, windows, held_out, recipe, fitting)
    choice = ground.choice
    if not choice.contiguous or recipe.iterative:
        check_eligible(choice, ground.eligible, recipe.layers, model.num_layers, recipe.kept_edges)
    if choice.searches:
        return search.SEARCHES[choice.name](ground, recipe.layers)
    if recipe.iterative:
        return search.iterate(ground, recipe.layers)
    table = _measure(ground, residuals=False)
    keep_first = fitting.method.reach > 0
    spans = select(recipe.select, table, recipe.layers, recipe.kept_edges, keep_first=keep_first)
    return search.Found(spans, table)


def fit_repairs(
    run: Run,
    model: LayerwiseModel,
    windows: Windows,
    spans: tuple[Span, ...],
    fitting: Fitting,
) -> dict[Span, Repair]:
    """One repair a gap."""
    return fits.fit_gaps(
        model,
        windows,
        spans,
        fitting,
        batch_size=run.options.batch_size,
        progress=run.progress,
    )


def measure_evidence(
    run: Run,
    model: LayerwiseModel,
    held_out: Windows,
    repairs: Mapping[Span, Repair],
    stored_dtype: torch.dtype | None = None,
) -> dict[str, LossSums]:
    """Losses of the dense, the cut and the repaired model on windows that nothing was fitted on."""
    if len(held_out) == 0:
        return {}
    models = {"cut": cuts.unrepaired(list(repairs))}
    if any(repair.changes_something for repair in repairs.values()):
        models["repaired"] = dict(repairs)
    return cuts.measure_cuts(
        model,
        held_out,
        models,
        stored_dtype=stored_dtype,
        batch_size=run.options.batch_size,
        progress=run.progress,
        description="Measuring what it costs",
    )


def find_births(
    run: Run,
    model: LayerwiseModel,
    windows: Windows,
    spans: tuple[Span, ...],
    table: ScoreTable | None,
) -> tuple[Span, ...]:
    """The removed spans in which a massive activation is born."""
    if table is not None:
        norms = table.norms
    else:
        few = windows.first(NORM_WINDOWS)
        norms = scoring.measure_norms(model, few, batch_size=run.options.batch_size)
    return tuple(span for span in spans if born_inside(norms, span))


def as_stock_layers(
    dense: Any,
    operator_model: Any,
    spans: tuple[Span, ...],
    repairs: Mapping[Span, Repair],
    stored_dtype: torch.dtype,
) -> Any:
    """The repaired model with its operators written as ordinary decoder layers, and compared."""
    bare = surgery.prune_layers(dense, spans)
    model = with_stock_layers(bare, spans, repairs, stored_dtype)
    check_same(model, operator_model)
    return model
