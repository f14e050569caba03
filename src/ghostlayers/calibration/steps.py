"""The steps of a run between the calibration windows and the surgery.

Each is one call into `measuring`, `search`, `fitting`, `cuts` or `selection`, with the recipe
filled in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ghostlayers.calibration import cuts, scoring, search
from ghostlayers.calibration import fitting as fits
from ghostlayers.calibration.fitting import Fitting
from ghostlayers.calibration.measuring import Ground, measure
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import Repair
from ghostlayers.runtime.progress import Progress
from ghostlayers.selection import ScoreTable
from ghostlayers.selection.births import NORM_WINDOWS, born_inside
from ghostlayers.selection.choices import candidate_spans, check_eligible, select
from ghostlayers.spans import Span, check_layers
from ghostlayers.statistics.losses import LossSums
from ghostlayers.surgery import removal
from ghostlayers.text.tokens import Windows


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
    model: DenseModel,
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
    model: DenseModel,
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
        spans = removal.allowed_cuts(ground.model, spans)
    return measure(ground, spans, residuals=residuals)[0]


def choose_spans(
    run: Run,
    model: DenseModel,
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
    model: DenseModel,
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
    model: DenseModel,
    held_out: Windows,
    repairs: Mapping[Span, Repair],
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
        batch_size=run.options.batch_size,
        progress=run.progress,
        description="Measuring what it costs",
    )


def find_births(
    run: Run,
    model: DenseModel,
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
