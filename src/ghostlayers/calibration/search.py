"""Selections that walk models: remove a layer, measure what is left, and again.

What is held in memory: see `measuring`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ghostlayers.calibration import cuts, scoring
from ghostlayers.calibration.measuring import (
    Ground,
    Repairs,
    grown_repairs,
    losses_without,
    measure,
)
from ghostlayers.repairs.stack import stack
from ghostlayers.selection import ScoreTable, Step
from ghostlayers.selection.choices import Selection
from ghostlayers.selection.residual import TokenSample
from ghostlayers.spans import Span, merge_layers

GREEDY_SHORTLIST = 4
"""Layers of lowest Block Influence that ``recoverable:greedy`` tries at each step, besides those
beside a gap."""


@dataclass(frozen=True)
class Found:
    """What was chosen.

    Attributes:
        spans: the layers to remove.
        table: the dense model's scores, with the steps of a search; None where nothing was scored.
        repairs: one a gap, where the choice has settled them.
    """

    spans: tuple[Span, ...]
    table: ScoreTable | None = None
    repairs: Repairs | None = None


def iterate(ground: Ground, count: int) -> Found:
    """Remove one layer, repair, score again on the repaired model, and so on, with any score.

    Span selections rank spans of one layer. A layer's score is between the stream that it receives
    in the current model and the stream that it makes of it, before a repair that follows it acts.

    With ``refit="none"`` the loop is Prune&Comp's (arXiv:2507.18212, algorithm 1): the repair is
    fitted once, across the layer that goes, in the current model, and left alone; two neighbours
    that go stand one behind the other. With ``all``, which is ours, every gap is fitted anew after
    each step as for the result, to the dense model's stream.
    """
    frozen = ground.recipe.refit == "none"
    removed: list[int] = []
    steps: list[Step] = []
    repairs: Repairs = {}
    first: ScoreTable | None = None
    dense: TokenSample | None = None
    while len(removed) < count:
        spans = [Span(layer, layer + 1) for layer in ground.eligible if layer not in removed]
        table, sample = measure(ground, spans, repairs=repairs, dense=dense)
        first, dense = first or table, dense or sample
        steps.append(_next_step(ground.choice, table))
        layer = steps[-1].layer
        removed.append(layer)
        if frozen:
            repairs = {**repairs, Span(layer, layer + 1): ground.fit_across(layer, repairs)}
        elif len(removed) < count:
            repairs = ground.refit(removed)
    assert first is not None
    table = dataclasses.replace(first, steps=tuple(steps))
    stored = ground.fitting.stored_dtype
    settled = {span: each.rounded(stored) for span, each in stack(repairs).items()}
    return Found(merge_layers(removed), table, settled if frozen else None)


def _next_step(choice: Selection, table: ScoreTable) -> Step:
    """The layer that a selection removes first, of those in the table's spans."""
    (span,) = choice.choose(table, [each.span.start for each in table.spans], 1)
    if choice.name == "perplexity":
        return Step(span.start, table.importance[span.start])
    return Step(span.start, next(each.loss for each in table.spans if each.span == span))


def search_perplexity(ground: Ground, count: int) -> Found:
    """Again and again the layer without which the calibration loss is lowest, nothing repaired.

    SLEB (arXiv:2402.09025, algorithm 1). Its released code never takes the first and the last
    layer: ``keep_layers="first:1,last:1"``. Losses are on the search windows.
    """
    windows, layers = ground.few, ground.eligible
    tried = sum(len(layers) - step for step in range(count))
    steps: list[Step] = []
    importance: tuple[float, ...] = ()
    with ground.progress.stage(f"Removing {count} layers by loss", tried * len(windows)) as advance:
        for _ in range(count):
            removed = [step.layer for step in steps]
            cut = ground.cut(cuts.unrepaired(merge_layers(removed)))
            left = [layer for layer in layers if layer not in removed]
            losses = losses_without(cut, windows, left, ground.batch_size, advance)
            if not steps:
                every = range(ground.model.num_layers)
                importance = tuple(losses.get(layer, float("inf")) for layer in every)
            best = min(left, key=lambda layer: losses[layer])
            steps.append(Step(best, losses[best]))
    table, _ = scoring.measure_scores(
        ground.model,
        windows,
        [Span(layer, layer + 1) for layer in layers],
        cosine_axis=ground.recipe.cosine_axis,
        residuals=False,
        batch_size=ground.batch_size,
        progress=ground.progress,
    )
    return _finish(table, steps, importance)


def search_recoverable(ground: Ground, count: int) -> Found:
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
        left = [layer for layer in ground.eligible if layer not in removed]
        table, sample = scoring.measure_scores(
            ground.model,
            ground.enough_to_fit,
            [Span(layer, layer + 1) for layer in left],
            cosine_axis=ground.recipe.cosine_axis,
            residuals=False,
            keep_sample=True,
            cut=ground.cut(repairs),
            seed=ground.recipe.seed,
            batch_size=ground.batch_size,
            progress=ground.progress,
            description=f"Scoring layers (step {len(steps) + 1} of {count})",
        )
        assert sample is not None
        first, dense = first or table, dense or sample
        tried = greedy_candidates(table.block_influence, left, repairs)
        race, _ = cuts.race_cuts(
            ground.model,
            ground.held_out,
            {
                str(layer): grown_repairs(ground, repairs, Span(layer, layer + 1), dense, sample)
                for layer in tried
            },
            base=repairs,
            stored_dtype=ground.fitting.stored_dtype,
            batch_size=ground.batch_size,
            progress=ground.progress,
            description=f"Racing {len(tried)} layers (step {len(steps) + 1} of {count})",
        )
        steps.append(Step(int(race.best), float(race.losses[race.best].mean())))
        if len(steps) < count:
            repairs = ground.refit(step.layer for step in steps)
    assert first is not None
    return _finish(first, steps)


def greedy_candidates(
    influence: Sequence[float], left: Sequence[int], gaps: Iterable[Span]
) -> list[int]:
    """The layers that ``recoverable:greedy`` tries next, in order."""
    lowest = sorted(left, key=lambda layer: influence[layer])[:GREEDY_SHORTLIST]
    beside = {place for gap in gaps for place in (gap.start - 1, gap.stop)}
    return sorted({*lowest, *(beside & set(left))})


def _finish(table: ScoreTable, steps: Sequence[Step], importance: tuple[float, ...] = ()) -> Found:
    spans = merge_layers(step.layer for step in steps)
    return Found(spans, dataclasses.replace(table, steps=tuple(steps), importance=importance))


SEARCHES: dict[str, Callable[[Ground, int], Found]] = {
    "perplexity": search_perplexity,
    "recoverable": search_recoverable,
}
"""Selections that search by themselves."""
