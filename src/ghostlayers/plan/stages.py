"""What a run will take, stage by stage, before it is started: time, memory, disk, arithmetic.

Counts come from the request alone; a probe (`estimate.probe`) says what each unit takes on this
machine. Nothing here looks at the data, so what only the data decides is counted for its expected
case: a removed run of layers lies in the last third of the model, and separate layers are spread
from the middle on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from ghostlayers.calibration.fitting import (
    COPIES_IN_A_SWEEP,
    Fitting,
    in_stages,
    make_fitting,
    parts_of,
    sums_bytes,
    tokens_bytes,
)
from ghostlayers.calibration.gathering import gathered_features
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan.probe import Speed
from ghostlayers.plan.saving import CHECKPOINT, Output, saving_stages
from ghostlayers.plan.units import Plan, Stage, prices
from ghostlayers.recipe import Recipe
from ghostlayers.repairs.through_norm import SOLVES
from ghostlayers.runtime.machine import room_for_streams
from ghostlayers.selection.births import NORM_WINDOWS
from ghostlayers.selection.choices import (
    SHORTLIST,
    candidate_spans,
    eligible_layers,
    find_selection,
)
from ghostlayers.selection.residual import TOKENS_PER_CHANNEL
from ghostlayers.spans import Span, merge_layers
from ghostlayers.statistics.moments import ACCUMULATOR
from ghostlayers.statistics.race import FIRST_WINDOWS
from ghostlayers.surgery.features import feature_widths, refits_through_norm

BACKWARD = 3.0
"""A layer's forward pass again and its backward pass, in forward passes."""

CANDIDATES = 2 + SHORTLIST * 5 / 3
"""Of a race: the best by two rankings, some of which agree, by angle, and layers apart."""

STAYING = 2.5
"""Of them that are measured beyond the first windows."""

GREEDY_CANDIDATES = 5.5
"""Of a step of the greedy search, those beside gaps included."""

DIVERGENCE = 1.6
"""A head whose predictions are compared with the dense model's, in plain heads."""

PAIR_COST = 0.35
"""A float32 multiply-add of the cosines, in float64 ones of the Gram product."""

SWEEP = "Scoring layers"
NORMS = "Looking for massive activations"

SOLUTIONS_OF_A_FIT = 5.0
"""Solving with its condition number, in Cholesky factorisations of the same width."""


@dataclass(frozen=True)
class Counter:
    """Counts the units of stages for one model and recipe."""

    model: DenseModel
    recipe: Recipe
    fitting: Fitting

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.model.num_layers

    @property
    def hidden(self) -> int:
        """Channels of the stream."""
        return int(self.model.hidden_size)

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.recipe.sequence_length

    def brought(self, windows: float, layers: float, copies: int = 1, elsewhere: int = 0) -> float:
        """Layers that a pass over so many windows brings in."""
        if not self.model.residency.offloaded:
            return 0.0
        return layers * max(1.0, -(-windows // self.at_once(windows, copies, elsewhere)))

    def at_once(self, windows: float, copies: int = 1, elsewhere: int = 0) -> float:
        """Windows that pass a layer of an offloaded model together: see `windows_at_once`."""
        left = self.model.residency.memory.left
        most = windows or 1.0
        if left is not None:
            most = min(most, left // ((copies + 1) * self.stream(1)))
        if elsewhere:
            most = min(
                most,
                room_for_streams(on_disk=self.model.residency.on_disk)
                // (elsewhere * self.stream(1)),
            )
        return max(1.0, most)

    def stream(self, windows: float) -> int:
        """Bytes of the residual stream of windows at one boundary."""
        return int(windows * self.tokens * self.hidden * self.model.dtype.itemsize)

    # Stages

    def sweep(self, windows: int, *, sampled: bool, name: str = SWEEP) -> Stage:
        """Cosines of every pair of boundaries, and a sample of the stream."""
        pairs = (self.depth + 1) ** 2 * self.hidden * self.tokens * windows * PAIR_COST
        sample = self.sampled_tokens(windows) * self.hidden * (self.depth + 1) if sampled else 0
        bytes_of_sample = sample * self.model.dtype.itemsize
        in_file = self.model.residency.on_disk
        boundaries = self.depth + 1
        file = (
            self.stream(boundaries * self.at_once(windows, elsewhere=boundaries)) if in_file else 0
        )
        return Stage(
            name,
            layers=windows * self.depth,
            products=pairs,
            brought=self.brought(windows, self.depth, elsewhere=boundaries),
            held=(0 if in_file else bytes_of_sample) + self.stream(boundaries),
            disk=bytes_of_sample + file if in_file else 0,
        )

    def sampled_tokens(self, windows: int) -> int:
        """Of every boundary."""
        return min(TOKENS_PER_CHANNEL * self.hidden, windows * self.tokens)

    def residuals(self, spans: int, windows: int) -> Stage:
        """A map across every span, from sampled tokens."""
        tokens = self.sampled_tokens(windows)
        return Stage(
            f"Fitting a map across {spans} spans",
            products=spans * tokens * self.hidden**2 * 2.2,
            solutions=spans * 2 * self.hidden**3 / 3,
            held=4 * self.hidden**2 * ACCUMULATOR.itemsize,
        )

    def race(self, candidates: float, removed: int, windows: int, name: str) -> Stage:
        """Losses of candidates on the same windows, each fitted from the sample first."""
        behind = max(0.0, 0.55 * self.depth - removed)
        sampled = TOKENS_PER_CHANNEL * self.hidden
        return Stage(
            name,
            layers=windows * (self.depth + candidates * behind),
            heads=windows * (1 + candidates),
            products=candidates * sampled * self.hidden**2 * 1.6,
            solutions=candidates * SOLUTIONS_OF_A_FIT * self.hidden**3 / 3,
            brought=self.brought(windows, self.depth + candidates * behind, 2 + int(candidates)),
            held=self.stream(2 + candidates),
        )

    def whole_race(self, candidates: float, removed: int, name: str) -> Stage:
        """Most candidates leave after the first windows, a few stay for as many as there may be."""
        budget = self.recipe.num_race_windows
        first = min(FIRST_WINDOWS, budget)
        rest = self.race(STAYING, removed, budget - first, name)
        # Their maps are fitted once.
        return replace(
            self.race(candidates, removed, first, name)
            + replace(rest, products=0.0, solutions=0.0),
            name=name,
        )

    def without_each(self, candidates: int, windows: int) -> Stage:
        """Losses without each of some layers."""
        behind = (self.depth - 1) / 2
        return Stage(
            "",
            layers=windows * (self.depth + candidates * behind),
            heads=windows * candidates,
            brought=self.brought(windows, self.depth + candidates * behind, self.depth + 2),
            held=self.stream(self.depth + 2),
        )

    def backward(self, windows: int) -> Stage:
        """One backward pass, layer by layer."""
        return Stage(
            "One backward pass",
            layers=windows * self.depth * (1 + BACKWARD),
            heads=windows * BACKWARD,
            brought=self.brought(windows, 2 * self.depth, self.depth + 2),
            held=self.stream(windows * (self.depth + 2)),
        )

    def fit(self, spans: Sequence[Span], name: str = "Fitting the repairs") -> Stage:
        """Moments of every gap, and solving."""
        method, windows = self.fitting.method, self.recipe.num_fit_windows
        spans = parts_of(method, spans)
        tokens, stop = windows * self.tokens, spans[-1].stop
        width = sum(feature_widths(self.model, gathered_features(method.needs)).values())
        pieces = sum(method.needs.pieces)
        products = tokens * (width * (width + 1) / 2 * 1.15 + width * self.hidden)
        products += tokens * self.hidden**2 * 1.6 if pieces else 0
        walked = len(spans) > 1 and self.fitting.repaired_inputs
        between = spans[-1].start - spans[0].stop if walked else 0
        staged, through_norm = (
            in_stages(self.model, method),
            refits_through_norm(self.model, method),
        )
        stages = 1 + len(method.before)
        # A stage is a pass over the kept layers that the method reads or changes.
        passes = stages * (SOLVES + 1 if through_norm else 1)
        solves = stages * (SOLVES if through_norm else 1)
        again = len(spans) * passes * method.reach if staged else 0
        kept = walked or pieces or staged
        held = sums_bytes(self.model, self.fitting, spans)
        held += tokens_bytes(self.model, self.fitting, int(tokens), spans)
        held += self.stream(windows * (3 if kept else 0)) + self.stream(COPIES_IN_A_SWEEP)
        return Stage(
            name,
            layers=windows * (stop + between + again),
            products=products * len(spans) * solves,
            solutions=len(spans) * (solves + pieces) * SOLUTIONS_OF_A_FIT * width**3 / 3,
            brought=self.brought(windows, stop + between + again, COPIES_IN_A_SWEEP),
            held=held,
        )

    def evidence(self, spans: Sequence[Span]) -> Stage:
        """Losses of the dense, the cut and the repaired model on held-out windows."""
        windows = self.recipe.num_held_out_windows
        removed = sum(map(len, spans))
        behind = self.depth - spans[0].start - removed
        models = 1 if self.fitting.method.name == "none" else 2
        layers = self.depth + models * behind
        return Stage(
            "Measuring what it costs",
            layers=windows * layers,
            heads=windows * (1 + DIVERGENCE * models),
            brought=self.brought(windows, layers, 2 + models),
            held=self.stream(2 + models),
        )


def expected_spans(recipe: Recipe, depth: int) -> tuple[Span, ...]:
    """The layers that will go, as far as one can know."""
    removed = recipe.removed()
    if removed is not None:
        return merge_layers(removed)
    assert recipe.layers is not None
    choice = find_selection(recipe.select)
    if choice.contiguous and not recipe.iterative:
        stop = min(depth - 1, max(recipe.layers + 1, int(0.75 * depth)))
        return (Span(stop - recipe.layers, stop),)
    places = range(depth - 2, 0, -1)
    every = max(1, min(2, len(places) // max(1, recipe.layers)))
    chosen = [*places[::every]][: recipe.layers]
    return merge_layers(sorted(chosen))


def selection_stages(counter: Counter) -> list[Stage]:
    """What choosing layers takes."""
    recipe, choice, depth = counter.recipe, find_selection(counter.recipe.select), counter.depth
    if recipe.removed() is not None or recipe.layers is None:
        return []
    count, few = recipe.layers, recipe.num_search_windows
    layers = len(eligible_layers(choice, depth, recipe.kept_edges, keep_first=False))
    if choice.name == "recoverable" and choice.searches:
        return [_greedy(counter, count, few)]
    if recipe.iterative:
        return [_iterative(counter, count)]
    if choice.name == "perplexity":
        tried = [layers - step for step in range(count if choice.searches else 1)]
        stages = [counter.without_each(each, few) for each in tried]
        total = sum(stages[1:], stages[0])
        return [replace(total, name="Loss without each layer"), counter.sweep(few, sampled=False)]
    return _measured(counter, count)


def _measured(counter: Counter, count: int) -> list[Stage]:
    recipe, choice = counter.recipe, find_selection(counter.recipe.select)
    windows = recipe.windows if choice.scores_streams else recipe.num_search_windows
    sampled = "residuals" in choice.selection.needs
    stages = [counter.sweep(windows, sampled=sampled)]
    if choice.name == "taylor":
        stages.append(counter.backward(recipe.num_search_windows))
    if choice.name == "perplexity":
        layers = len(eligible_layers(choice, counter.depth, recipe.kept_edges, keep_first=False))
        stages.append(counter.without_each(layers, recipe.num_search_windows))
    if sampled:
        spans = len(candidate_spans(counter.depth, count, recipe.kept_edges))
        stages.append(counter.residuals(spans, windows))
        stages.append(counter.whole_race(CANDIDATES, count, "Racing the shortlist"))
    return stages


def _greedy(counter: Counter, count: int, few: int) -> Stage:
    filled = -(-TOKENS_PER_CHANNEL * counter.hidden // counter.tokens)
    windows = min(counter.recipe.windows, max(few, filled))
    total = Stage(f"Choosing {count} layers one by one")
    for step in range(count):
        total += counter.sweep(windows, sampled=True)
        total += counter.whole_race(GREEDY_CANDIDATES, step + 1, "")
        if step + 1 < count:
            some = replace(counter.recipe, layers=step + 1)
            total += counter.fit(expected_spans(some, counter.depth))
    return total


def _iterative(counter: Counter, count: int) -> Stage:
    total = Stage(f"Choosing {count} layers one by one")
    for step in range(count):
        for stage in _measured(counter, 1):
            total += stage
        if counter.recipe.refit == "none":
            total += counter.fit((Span(counter.depth // 2, counter.depth // 2 + 1),))
        elif step + 1 < count:
            some = replace(counter.recipe, layers=step + 1)
            total += counter.fit(expected_spans(some, counter.depth))
    return total


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
    counter = Counter(model, recipe, make_fitting(model, recipe))
    spans = expected_spans(recipe, model.num_layers)
    stages = [*selection_stages(counter)]
    if recipe.refit == "all":  # what is fitted once was fitted while layers were chosen
        stages.append(counter.fit(spans))
    stages.append(counter.evidence(spans))
    if recipe.removed() is not None:
        stages.append(counter.sweep(NORM_WINDOWS, sampled=False, name=NORMS))
    if output is not None:
        method = counter.fitting.method
        stages += saving_stages(model, recipe, method, spans, output, started)
    here = prices(model, speed, recipe.sequence_length, processes)
    return Plan(tuple(here.of(stage) for stage in stages))


def seconds_since_start() -> float:
    """How long this process has run: what importing and loading took, if asked behind these."""
    return float(time.time() - psutil.Process().create_time())
