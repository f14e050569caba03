"""Selections that walk models: remove a layer, measure what is left, and again.

What is held in memory: see `measuring`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ghostlayers.calibration import cuts, scoring
from ghostlayers.calibration.measuring import (
    Repairs,
    Selector,
    grown_repairs,
    losses_without,
    measure,
)
from ghostlayers.recipe import Recipe
from ghostlayers.repairs.stack import stack
from ghostlayers.selection import ScoreTable, Step
from ghostlayers.selection.choices import Selection, check_eligible, select
from ghostlayers.selection.residual import TokenSample
from ghostlayers.spans import Span, check_layers, merge_layers

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
    """

    recipe: Recipe
    spans: tuple[Span, ...]
    table: ScoreTable | None = None
    repairs: Repairs | None = None


def choose(selector: Selector) -> ChosenCut:
    """The layers to remove: those that the recipe names, or those that its selection takes."""
    recipe, num_layers = selector.recipe, selector.model.num_layers
    removed = recipe.removed()
    if removed is not None:
        return ChosenCut(recipe, check_layers(removed, num_layers))
    assert recipe.layers is not None
    choice = selector.choice
    if not choice.contiguous or recipe.iterative:
        check_eligible(choice, selector.eligible, recipe.layers, num_layers, recipe.kept_edges)
    if choice.searches:
        return SEARCHES[choice.name](selector, recipe.layers)
    if recipe.iterative:
        return iterate(selector, recipe.layers)
    table, _ = measure(selector, selector.candidates)
    keep_first = selector.fitting.method.reach > 0
    spans = select(recipe.select, table, recipe.layers, recipe.kept_edges, keep_first=keep_first)
    return ChosenCut(recipe, spans, table)


def iterate(selector: Selector, count: int) -> ChosenCut:
    """Remove one layer, repair, score again on the repaired model, and so on, with any score.

    Span selections rank spans of one layer. A layer's score is between the stream that it receives
    in the current model and the stream that it makes of it, before a repair that follows it acts.

    With ``refit="none"`` the loop is Prune&Comp's (arXiv:2507.18212, algorithm 1): the repair is
    fitted once, across the layer that goes, in the current model, and left alone; two neighbours
    that go stand one behind the other. With ``all``, which is ours, every gap is fitted anew after
    each step as for the result, to the dense model's stream.
    """
    frozen = selector.recipe.refit == "none"
    removed: list[int] = []
    steps: list[Step] = []
    repairs: Repairs = {}
    first: ScoreTable | None = None
    dense: TokenSample | None = None
    while len(removed) < count:
        spans = [Span(layer, layer + 1) for layer in selector.eligible if layer not in removed]
        table, sample = measure(selector, spans, repairs=repairs, dense=dense)
        first, dense = first or table, dense or sample
        steps.append(_next_step(selector.choice, table))
        layer = steps[-1].layer
        removed.append(layer)
        if frozen:
            repairs = {**repairs, Span(layer, layer + 1): selector.fit_across(layer, repairs)}
        elif len(removed) < count:
            repairs = selector.refit(removed)
    assert first is not None
    table = dataclasses.replace(first, steps=tuple(steps))
    stored = selector.model.stored_dtype
    settled = {span: each.rounded(stored) for span, each in stack(repairs).items()}
    return ChosenCut(selector.recipe, merge_layers(removed), table, settled if frozen else None)


def _next_step(choice: Selection, table: ScoreTable) -> Step:
    """The layer that a selection removes first, of those in the table's spans."""
    (span,) = choice.choose(table, [each.span.start for each in table.spans], 1)
    if choice.name == "perplexity":
        return Step(span.start, table.importance[span.start])
    return Step(span.start, next(each.loss for each in table.spans if each.span == span))


def search_perplexity(selector: Selector, count: int) -> ChosenCut:
    """Again and again the layer without which the calibration loss is lowest, nothing repaired.

    SLEB (arXiv:2402.09025, algorithm 1). Its released code never takes the first and the last
    layer: ``keep_layers="first:1,last:1"``. Losses are on the search windows.
    """
    windows, layers = selector.few, selector.eligible
    tried = sum(len(layers) - step for step in range(count))
    steps: list[Step] = []
    importance: tuple[float, ...] = ()
    with selector.runner.progress.stage(
        f"Removing {count} layers by loss", tried * len(windows)
    ) as advance:
        for _ in range(count):
            removed = [step.layer for step in steps]
            cut = selector.cut(cuts.unrepaired(merge_layers(removed)))
            left = [layer for layer in layers if layer not in removed]
            losses = losses_without(selector.runner, cut, windows, left, advance)
            if not steps:
                every = range(selector.model.num_layers)
                importance = tuple(losses.get(layer, float("inf")) for layer in every)
            best = min(left, key=lambda layer: losses[layer])
            steps.append(Step(best, losses[best]))
    table, _ = scoring.measure_scores(
        selector.runner,
        windows,
        [Span(layer, layer + 1) for layer in layers],
        cosine_axis=selector.recipe.cosine_axis,
        residuals=False,
    )
    return _finish(selector, table, steps, importance)


def search_recoverable(selector: Selector, count: int) -> ChosenCut:
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
        left = [layer for layer in selector.eligible if layer not in removed]
        table, sample = scoring.measure_scores(
            selector.runner,
            selector.enough_to_fit,
            [Span(layer, layer + 1) for layer in left],
            cosine_axis=selector.recipe.cosine_axis,
            residuals=False,
            keep_sample=True,
            cut=selector.cut(repairs),
            seed=selector.recipe.seed,
            title=f"Scoring layers (step {len(steps) + 1} of {count})",
        )
        assert sample is not None
        first, dense = first or table, dense or sample
        tried = greedy_candidates(table.block_influence, left, repairs)
        race, _ = cuts.race_cuts(
            selector.runner,
            selector.held_out,
            {
                str(layer): grown_repairs(selector, repairs, Span(layer, layer + 1), dense, sample)
                for layer in tried
            },
            base=repairs,
            title=f"Racing {len(tried)} layers (step {len(steps) + 1} of {count})",
        )
        steps.append(Step(int(race.best), float(race.losses[race.best].mean())))
        if len(steps) < count:
            repairs = selector.refit(step.layer for step in steps)
    assert first is not None
    return _finish(selector, first, steps)


def greedy_candidates(
    influence: Sequence[float], left: Sequence[int], gaps: Iterable[Span]
) -> list[int]:
    """The layers that ``recoverable:greedy`` tries next, in order."""
    lowest = sorted(left, key=lambda layer: influence[layer])[:GREEDY_SHORTLIST]
    beside = {place for gap in gaps for place in (gap.start - 1, gap.stop)}
    return sorted({*lowest, *(beside & set(left))})


def _finish(
    selector: Selector, table: ScoreTable, steps: Sequence[Step], importance: tuple[float, ...] = ()
) -> ChosenCut:
    spans = merge_layers(step.layer for step in steps)
    table = dataclasses.replace(table, steps=tuple(steps), importance=importance)
    return ChosenCut(selector.recipe, spans, table)


SEARCHES: dict[str, Callable[[Selector, int], ChosenCut]] = {
    "perplexity": search_perplexity,
    "recoverable": search_recoverable,
}
"""Selections that search by themselves."""
