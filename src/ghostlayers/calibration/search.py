"""Selections that walk models: remove a layer, measure what is left, and again.

What is held in memory: see `measuring`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ghostlayers.calibration import cuts, scoring
from ghostlayers.calibration.contest import Contest
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import make_fitting
from ghostlayers.calibration.measuring import (
    Repairs,
    StudyLike,
    candidates,
    eligible,
    enough_to_fit,
    fit_across,
    grown_repairs,
    losses_without,
    measure,
    of_every_layer,
    refit,
    searched,
)
from ghostlayers.errors import counted
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.decision import Decision
from ghostlayers.repairs.stack import stack
from ghostlayers.runtime import progress
from ghostlayers.selection import ScoreTable, Step
from ghostlayers.selection.choices import Selection, check_eligible, find_selection, select
from ghostlayers.selection.residual import TokenSample
from ghostlayers.spans import Span, check_layers, format_layers, merge_layers, removed_layers

GREEDY_SHORTLIST = 4
"""Layers of lowest Block Influence that ``recoverable:greedy`` tries at each step, besides those
beside a gap."""


@dataclass(frozen=True)
class ChosenCut:
    """The layers to remove, and what chose them.

    Attributes:
        recipe: that was asked for.
        spans: the layers, a span a gap.
        table: the dense model's scores, with the steps of a search; None where nothing was scored.
        repairs: one a gap, where the choice has settled them.
        decision: how a budget came to their number, where there was one.
        contest: what chose the repair, where it was left to held-out windows.
    """

    recipe: Recipe
    spans: tuple[Span, ...]
    table: ScoreTable | None = None
    repairs: Repairs | None = None
    decision: Decision | None = None
    contest: Contest | None = None

    def __repr__(self) -> str:
        layers = format_layers(removed_layers(self.spans))
        return f"ChosenCut(layers {layers}, by {self.recipe.select!r})"

    def with_instead(self, instead: tuple[str, float] | None) -> "ChosenCut":
        """The same, with a type of weights that would do instead; see `Decision`."""
        assert self.decision is not None
        return dataclasses.replace(
            self, decision=dataclasses.replace(self.decision, instead=instead)
        )


def choose(study: StudyLike) -> ChosenCut:
    """The layers to remove: those that the recipe names, or those that its selection takes."""
    recipe, model = study.recipe, study.runner.model
    removed = recipe.removed()
    if removed is not None:
        return ChosenCut(recipe, check_layers(removed, model.num_layers))
    assert recipe.layers is not None
    choice, keep = find_selection(recipe.select), recipe.kept_edges
    if not choice.contiguous or recipe.iterative:
        check_eligible(choice, eligible(study), recipe.layers, model.num_layers, keep)
    if choice.searches:
        return SEARCHES[choice.name](study, recipe.layers)
    if recipe.iterative:
        return iterate(study, recipe.layers)
    table, _ = measure(study, candidates(study))
    keep_first = make_fitting(model, recipe).method.reach > 0
    spans = select(recipe.select, table, recipe.layers, keep, keep_first=keep_first)
    return ChosenCut(recipe, spans, table)


def iterate(study: StudyLike, count: int) -> ChosenCut:
    """Remove one layer, repair, score again on the repaired model, and so on, with any score.

    Span selections rank spans of one layer. A layer's score is between the stream that it receives
    in the current model and the stream that it makes of it, before a repair that follows it acts.

    With ``refit="none"`` the loop is Prune&Comp's (arXiv:2507.18212, algorithm 1): the repair is
    fitted once, across the layer that goes, in the current model, and left alone; two neighbours
    that go stand one behind the other. With ``all``, which is ours, every gap is fitted anew after
    each step as for the result, to the dense model's stream.
    """
    choice, frozen = find_selection(study.recipe.select), study.recipe.refit == "none"
    removed: list[int] = []
    steps: list[Step] = []
    repairs: Repairs = {}
    first: ScoreTable | None = None
    dense: TokenSample | None = None
    while len(removed) < count:
        spans = [Span(layer, layer + 1) for layer in eligible(study) if layer not in removed]
        table, sample = measure(study, spans, repairs=repairs, dense=dense)
        first, dense = first or table, dense or sample
        steps.append(_next_step(choice, table))
        layer = steps[-1].layer
        removed.append(layer)
        if frozen:
            repairs = {**repairs, Span(layer, layer + 1): fit_across(study, layer, repairs)}
        elif len(removed) < count:
            repairs = refit(study, removed)
    assert first is not None
    table = dataclasses.replace(first, steps=tuple(steps))
    stored = study.runner.model.stored_dtype
    settled = {span: repair.rounded(stored) for span, repair in stack(repairs).items()}
    return ChosenCut(study.recipe, merge_layers(removed), table, settled if frozen else None)


def _next_step(choice: Selection, table: ScoreTable) -> Step:
    """The layer that a selection removes first, of those in the table's spans."""
    (span,) = choice.take(table, [score.span.start for score in table.spans], 1)
    if choice.name == "perplexity":
        return Step(span.start, table.importance[span.start])
    return Step(span.start, next(score.loss for score in table.spans if score.span == span))


def search_perplexity(study: StudyLike, count: int) -> ChosenCut:
    """Again and again the layer without which the calibration loss is lowest, nothing repaired.

    SLEB (arXiv:2402.09025, algorithm 1). Its released code never takes the first and the last
    layer: ``keep_layers="first:1,last:1"``. Losses are on the search windows.
    """
    model, windows, layers = study.runner.model, searched(study), eligible(study)
    tried = sum(len(layers) - step for step in range(count))
    steps: list[Step] = []
    importance: tuple[float, ...] = ()
    with progress.stage(
        f"Removing {counted(count, 'layer')} by loss", tried * len(windows)
    ) as advance:
        for _ in range(count):
            removed = [step.layer for step in steps]
            cut = Cut(model, cuts.unrepaired(merge_layers(removed)))
            left = [layer for layer in layers if layer not in removed]
            losses = losses_without(study.runner, cut, windows, left, advance)
            importance = importance or of_every_layer(model, losses)  # of the first step
            best = min(left, key=lambda layer: losses[layer])
            steps.append(Step(best, losses[best]))
    table, _ = scoring.measure_scores(
        study.runner,
        windows,
        [Span(layer, layer + 1) for layer in layers],
        cosine_axis=study.recipe.cosine_axis,
        residuals=False,
    )
    return _finish(study, table, steps, importance)


def search_recoverable(study: StudyLike, count: int) -> ChosenCut:
    """Again and again the layer whose removal, once repaired, loses least on held-out windows.

    At each step, of the current repaired model: the few layers of lowest Block Influence, and all
    that lie beside a gap. The gap that each would make (or lengthen) is fitted from sampled tokens
    of the stream that it would receive; a race on the held-out windows decides; then all gaps are
    fitted anew, as for the result. Block Influence and the sample come from the search windows, or
    from more where those hold too few tokens for a fit.
    (Where a repair folds into kept layers, the sampled stream still has the fold that the new gap's
    repair replaces; the race has not.)
    """
    steps: list[Step] = []
    repairs: Repairs = {}
    first: ScoreTable | None = None
    dense: TokenSample | None = None
    while len(steps) < count:
        removed = {step.layer for step in steps}
        left = [layer for layer in eligible(study) if layer not in removed]
        table, sample = scoring.measure_scores(
            study.runner,
            enough_to_fit(study),
            [Span(layer, layer + 1) for layer in left],
            cosine_axis=study.recipe.cosine_axis,
            residuals=False,
            keep_sample=True,
            cut=Cut(study.runner.model, repairs),
            seed=study.recipe.seed,
            title=f"Scoring layers (step {len(steps) + 1} of {count})",
        )
        assert sample is not None
        first, dense = first or table, dense or sample
        tried = greedy_candidates(table.block_influence, left, repairs)
        race, _ = cuts.race_cuts(
            study.runner,
            study.held_out,
            {
                str(layer): grown_repairs(study, repairs, Span(layer, layer + 1), dense, sample)
                for layer in tried
            },
            base=repairs,
            title=f"Racing {counted(len(tried), 'layer')} (step {len(steps) + 1} of {count})",
        )
        steps.append(Step(int(race.best), float(race.losses[race.best].mean())))
        if len(steps) < count:
            repairs = refit(study, (step.layer for step in steps))
    assert first is not None
    return _finish(study, first, steps)


def greedy_candidates(
    influence: Sequence[float], left: Sequence[int], gaps: Iterable[Span]
) -> list[int]:
    """The layers that ``recoverable:greedy`` tries next, in order."""
    lowest = sorted(left, key=lambda layer: influence[layer])[:GREEDY_SHORTLIST]
    beside = {place for gap in gaps for place in (gap.start - 1, gap.stop)}
    return sorted({*lowest, *(beside & set(left))})


def _finish(
    study: StudyLike, table: ScoreTable, steps: Sequence[Step], importance: tuple[float, ...] = ()
) -> ChosenCut:
    spans = merge_layers(step.layer for step in steps)
    table = dataclasses.replace(table, steps=tuple(steps), importance=importance)
    return ChosenCut(study.recipe, spans, table)


SEARCHES: dict[str, Callable[[StudyLike, int], ChosenCut]] = {
    "perplexity": search_perplexity,
    "recoverable": search_recoverable,
}
"""Selections that search by themselves."""
