"""The steps of a run between the calibration windows and the surgery.

Each is one call into `scoring`, `fitting`, `cuts` or `selection`, with the recipe filled in.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ghostlayers import cuts, scoring
from ghostlayers import fitting as fits
from ghostlayers.cuts import Race
from ghostlayers.evaluation.losses import LossSums
from ghostlayers.fitting import Fitting
from ghostlayers.progress import Progress
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import Repair
from ghostlayers.scores import ScoreTable, SpanScore
from ghostlayers.scores.births import born_inside
from ghostlayers.scores.residual import TokenSample
from ghostlayers.selection import candidate_spans, select, shortlist
from ghostlayers.spans import Span, check_layers
from ghostlayers.stream import LayerwiseModel
from ghostlayers.tokens import Windows

NORM_WINDOWS = 4
"""Windows on which massive activations are looked for when nothing else is scored."""


@dataclass(frozen=True)
class Run:
    """How a run is carried out, and who is told."""

    options: RunOptions
    progress: Progress


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
    length = recipe.layers or len(recipe.removed() or [])
    by_loss = recipe.select == "recoverable"
    table, sample = scoring.measure_scores(
        model,
        windows,
        candidate_spans(model.num_layers, length, recipe.edges),
        cosine_axis=recipe.cosine_axis,
        residuals=residuals or by_loss,
        seed=recipe.seed,
        batch_size=run.options.batch_size,
        progress=run.progress,
    )
    if not by_loss or sample is None or len(held_out) == 0:
        return table
    return add_losses(run, model, held_out, table, sample, fitting)


def add_losses(
    run: Run,
    model: LayerwiseModel,
    held_out: Windows,
    table: ScoreTable,
    sample: TokenSample,
    fitting: Fitting,
) -> ScoreTable:
    """Measure the loss after repair of every span on the shortlist."""
    spans = {str(span): span for span in shortlist(table)}
    candidates = {
        name: {span: scoring.fit_sample(model, sample, span, fitting)}
        for name, span in spans.items()
    }
    race = cuts.race_cuts(
        model,
        held_out,
        candidates,
        batch_size=run.options.batch_size,
        progress=run.progress,
        description=f"Measuring {len(candidates)} candidates after repair",
    )
    return dataclasses.replace(
        table,
        spans=tuple(_with_loss(each, race) for each in table.spans),
        dense_loss=float(race.dense.mean()),
        num_loss_tokens=len(race.dense),
    )


def _with_loss(score: SpanScore, race: Race) -> SpanScore:
    name = str(score.span)
    if name not in race.cuts:
        return score
    behind, error = race.behind(name)
    return dataclasses.replace(
        score,
        loss=float(race.cuts[race.best].mean()) + behind,
        behind=behind,
        behind_error=error,
        loss_tokens=len(race.cuts[name]),
    )


def choose_spans(
    run: Run,
    model: LayerwiseModel,
    windows: Windows,
    held_out: Windows,
    recipe: Recipe,
    fitting: Fitting,
) -> tuple[tuple[Span, ...], ScoreTable | None]:
    """The spans to remove: those that the caller named, or those that the selection takes."""
    removed = recipe.removed()
    if removed is not None:
        return check_layers(removed, model.num_layers), None
    table = measure_table(run, model, windows, held_out, recipe, fitting, residuals=False)
    assert recipe.layers is not None
    return select(recipe.select, table, recipe.layers, recipe.edges), table


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
