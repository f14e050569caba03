"""What a run will take, pass by pass, before it is started: time, memory, disk, arithmetic.

The passes are those that the run declares; a probe (`probe.probe`) says what each unit takes on
this machine. Nothing here looks at the data, so what only the data decides is counted for its
expected case: a removed run of layers lies in the last third of the model, separate layers are
spread from the middle on, and candidates lie anywhere.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psutil

from ghostlayers.calibration.cuts import loss_pass
from ghostlayers.calibration.fits import (
    SOLUTIONS_OF_A_FIT,
    Fitting,
    fit_pass,
    in_stages,
    make_fitting,
)
from ghostlayers.calibration.gradients import backward_pass
from ghostlayers.calibration.measuring import without_pass
from ghostlayers.calibration.passes import Pass
from ghostlayers.calibration.scoring import NORMS, residual_pass, sweep_pass
from ghostlayers.checkpoint.output import Output
from ghostlayers.errors import counted
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan.probe import Speed
from ghostlayers.plan.saving import CHECKPOINT, saving_passes
from ghostlayers.plan.units import Plan, prices
from ghostlayers.recipe import Recipe
from ghostlayers.selection.births import NORM_WINDOWS
from ghostlayers.selection.choices import (
    SHORTLIST,
    candidate_spans,
    eligible_layers,
)
from ghostlayers.selection.residual import TOKENS_PER_CHANNEL
from ghostlayers.spans import Span, merge_layers
from ghostlayers.statistics.moments import products_of_a_token
from ghostlayers.statistics.race import FIRST_WINDOWS
from ghostlayers.surgery.eligible import contestants

CANDIDATES = 2 + SHORTLIST * 5 / 3
"""Of a race: the best by two rankings, some of which agree, by angle, and layers apart."""

STAYING = 2.5
"""Of them that are measured beyond the first windows: the mean of the races that
docs/results/selection.md is about."""

GREEDY_CANDIDATES = 5.5
"""Of a step of the greedy search, those beside gaps included."""


def expected_spans(recipe: Recipe, depth: int) -> tuple[Span, ...]:
    """The layers that will go, as far as one can know."""
    removed = recipe.removed()
    if removed is not None:
        return merge_layers(removed)
    assert recipe.layers is not None
    choice = recipe.selection
    if choice.contiguous and not recipe.iterative:
        stop = min(depth - 1, max(recipe.layers + 1, int(0.75 * depth)))
        return (Span(stop - recipe.layers, stop),)
    places = range(depth - 2, 0, -1)
    every = max(1, min(2, len(places) // max(1, recipe.layers)))
    chosen = [*places[::every]][: recipe.layers]
    return merge_layers(sorted(chosen))


@dataclass(frozen=True)
class Expected:
    """The passes of a request, for a model."""

    model: DenseModel
    recipe: Recipe
    fitting: Fitting

    @classmethod
    def of(cls, model: DenseModel, recipe: Recipe) -> "Expected":
        """What a recipe asks of a model."""
        return cls(model, recipe, make_fitting(model, recipe))

    def fit(self, spans: Sequence[Span]) -> Pass:
        """Fitting the recipe's repair."""
        recipe = self.recipe
        return fit_pass(
            self.model, spans, self.fitting, recipe.num_fit_windows, recipe.sequence_length
        )

    def losses(self, spans: Sequence[Span]) -> Pass:
        """Losses of the dense, the cut and the repaired model on held-out windows."""
        behind = self.model.num_layers - spans[0].start - sum(map(len, spans))
        models = 1 if self.fitting.method.name == "none" else 2
        windows = self.recipe.num_held_out_windows
        return loss_pass(self.model, windows, [behind] * models, True, "Measuring what it costs")

    def sweep(self, windows: int, *, sampled: bool) -> Pass:
        """Scores of the stream."""
        return sweep_pass(self.model, windows, self.recipe.sequence_length, sampled=sampled)

    def race(self, candidates: float, removed: int, title: str) -> Iterator[Pass]:
        """Most candidates leave after the first windows, a few stay for as many as may be."""
        model, hidden = self.model, self.model.hidden_size
        # Spans that may lie anywhere have as many layers behind them as before, on average.
        behind = (model.num_layers - removed) / 2
        fits = TOKENS_PER_CHANNEL * hidden * products_of_a_token((("x", hidden),), hidden)
        for lap, racing in zip(
            laps(model, self.recipe, candidates, behind, title), (candidates, 0), strict=True
        ):
            yield replace(
                lap,
                # Each is fitted once, from the sample, before it starts.
                products=racing * fits,
                solutions=racing * SOLUTIONS_OF_A_FIT * hidden**3 / 3,
            )

    def selection(self) -> list[tuple[str, list[Pass]]]:
        """What choosing layers takes: lines of a plan, and the passes of each."""
        recipe, choice = self.recipe, self.recipe.selection
        if recipe.removed() is not None or recipe.layers is None:
            return []
        count = recipe.layers
        if choice.searches or recipe.iterative:
            if choice.name == "perplexity" and not recipe.iterative:
                return self._by_perplexity(count)
            return [(f"Choosing {counted(count, 'layer')} one by one", [*self._one_by_one(count)])]
        return [(measured.title, [measured]) for measured in self._measured(count)]

    def _by_perplexity(self, count: int) -> list[tuple[str, list[Pass]]]:
        layers, few = [*self._eligible], self.recipe.num_search_windows
        steps = [
            without_pass(self.model, layers[: len(layers) - step], few) for step in range(count)
        ]
        swept = self.sweep(few, sampled=False)
        return [("Loss without each layer", steps), (swept.title, [swept])]

    @property
    def _eligible(self) -> range:
        recipe = self.recipe
        choice = recipe.selection
        return eligible_layers(choice, self.model.num_layers, recipe.kept_edges, keep_first=False)

    def _measured(self, count: int) -> list[Pass]:
        recipe, choice, model = self.recipe, self.recipe.selection, self.model
        few, length = recipe.num_search_windows, recipe.sequence_length
        windows = recipe.windows if choice.scores_streams else few
        sampled = "residuals" in choice.needs
        passes = [self.sweep(windows, sampled=sampled)]
        if choice.name == "taylor":
            passes.append(backward_pass(model, few, length))
        if choice.name == "perplexity":
            passes.append(without_pass(model, self._eligible, few))
        if sampled:
            spans = len(candidate_spans(model.num_layers, count, recipe.kept_edges))
            tokens = min(TOKENS_PER_CHANNEL * model.hidden_size, windows * length)
            passes.append(residual_pass(model, tokens, spans))
            passes += self.race(CANDIDATES, count, "Racing the shortlist")
        return passes

    def _one_by_one(self, count: int) -> Iterator[Pass]:
        """Passes of a search that removes a layer, fits, and looks again."""
        greedy = self.recipe.selection.searches
        for step in range(count):
            if greedy:
                yield from self._greedy_step(step)
            else:
                yield from self._measured(1)
            if self.recipe.refit == "none":
                middle = self.model.num_layers // 2
                yield self.fit((Span(middle, middle + 1),))
            elif step + 1 < count:
                some = replace(self.recipe, layers=step + 1)
                yield self.fit(expected_spans(some, self.model.num_layers))

    def _greedy_step(self, step: int) -> Iterator[Pass]:
        recipe = self.recipe
        filled = -(-TOKENS_PER_CHANNEL * self.model.hidden_size // recipe.sequence_length)
        windows = min(recipe.windows, max(recipe.num_search_windows, filled))
        yield self.sweep(windows, sampled=True)
        yield from self.race(GREEDY_CANDIDATES, step + 1, "")


def contest_passes(model: DenseModel, recipe: Recipe, spans: Sequence[Span]) -> Iterator[Pass]:
    """Fitting all repairs that may be chosen, and racing them.

    Those that are fitted in one go share the sweep and what is gathered for the widest of them;
    stages of the others come on top.
    """
    names, _ = contestants(model, recipe, spans)
    fittings = [make_fitting(model, recipe, name) for name in names]
    length, windows = recipe.sequence_length, recipe.num_fit_windows
    fits = [fit_pass(model, spans, fitting, windows, length) for fitting in fittings]
    sweep = min(fit.layers for fit in fits)
    shared = [
        fit for fit, how in zip(fits, fittings, strict=True) if not in_stages(model, how.method)
    ]
    staged = [fit for fit in fits if fit not in shared]
    yield replace(
        fits[0],
        title=f"Fitting {len(fits)} repairs",
        layers=sweep + sum(fit.layers - sweep for fit in fits),
        products=max(fit.products for fit in shared) + sum(fit.products for fit in staged),
        solutions=sum(fit.solutions for fit in fits),
        held=max(fit.held for fit in fits),
    )
    behind = model.num_layers - spans[0].start - sum(map(len, spans))
    yield from laps(model, recipe, len(names), behind, f"Racing {len(names)} repairs")


def laps(
    model: DenseModel, recipe: Recipe, candidates: float, behind: float, title: str
) -> Iterator[Pass]:
    """The passes of a race: all candidates on the first windows, a few on all that may be.

    Args:
        model: the dense model.
        recipe: says on how many windows.
        candidates: at the start.
        behind: layers that run for each.
        title: on the screen.
    """
    budget = recipe.num_race_windows
    first = min(FIRST_WINDOWS, budget)
    for racing, windows in ((candidates, first), (STAYING, budget - first)):
        yield replace(
            loss_pass(model, windows, [behind], False, title),
            layers=windows * (model.num_layers + racing * behind),
            heads=windows * (1 + racing),
            copies=2 + int(racing),
        )


def plan_prune(
    model: DenseModel,
    recipe: Recipe,
    speed: Speed,
    *,
    started: float,
    output: Output | None = CHECKPOINT,
    processes: int = 1,
) -> Plan:
    """What `pipeline.prune` and saving its result will take.

    Args:
        model: the dense model.
        recipe: the request.
        speed: as probed on this machine.
        started: seconds that this process took to start and load the model, as one that loads the
            result to prove it will.
        output: what is written of the result and proved; None for nothing.
        processes: that share the windows.
    """
    expected = Expected.of(model, recipe)
    spans = expected_spans(recipe, model.num_layers)
    here = prices(model, speed, recipe.sequence_length, processes)
    passes: list[Pass] = []
    lines = expected.selection()
    if recipe.contested:
        lines += [(one.title, [one]) for one in contest_passes(model, recipe, spans)]
    elif recipe.refit == "all":  # what is fitted once was fitted while layers were chosen
        passes.append(expected.fit(spans))
    passes.append(expected.losses(spans))
    if recipe.removed() is not None:
        length = recipe.sequence_length
        passes.append(sweep_pass(model, NORM_WINDOWS, length, sampled=False, title=NORMS))
    if output is not None:
        method = expected.fitting.method
        passes += saving_passes(model, recipe, method, spans, output, started)
    chosen = (here.together(*line) for line in _merged(lines))
    return here.plan([*chosen, *map(here.of, passes)])


def _merged(lines: Sequence[tuple[str, list[Pass]]]) -> list[tuple[str, list[Pass]]]:
    """Passes of one title in one line."""
    merged: dict[str, list[Pass]] = {}
    for title, passes in lines:
        merged.setdefault(title, []).extend(passes)
    return list(merged.items())


def seconds_since_start() -> float:
    """How long this process has run: what importing and loading took, if asked behind these."""
    return float(time.time() - psutil.Process().create_time())
