"""Which cuts a comparison makes, and how long they will take."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ghostlayers.calibration.fitting import in_stages, make_fitting
from ghostlayers.checkpoint.record import table_to_dict
from ghostlayers.compare.bench import Bench
from ghostlayers.compare.request import EVERY, Comparison
from ghostlayers.plan.probe import Speed
from ghostlayers.plan.stages import DIVERGENCE, SWEEP, Counter, expected_spans, selection_stages
from ghostlayers.plan.units import Plan, Stage, prices
from ghostlayers.repairs import find_method
from ghostlayers.spans import Span, format_layers, removed_layers

TIMED_PASSES = 5.0
TIMED_SHARE = 0.4
"""Prefills that time a model, and their length beside a window's."""

TOKENS_A_PASS = 20
"""New tokens of a continuation that take as long as a window's forward pass."""


@dataclass(frozen=True)
class Cell:
    """Layers chosen one way, to be repaired in several."""

    layers: int
    select: str
    spans: tuple[Span, ...]
    repairs: tuple[str, ...]


def choose(bench: Bench) -> tuple[dict[tuple[Span, ...], list[Cell]], dict[str, Any]]:
    """Which layers go, for every selection and number; equal choices share their work."""
    chosen: dict[tuple[Span, ...], list[Cell]] = {}
    tables: dict[str, Any] = {}
    for layers in sorted(set(bench.request.layers)):
        for select in bench.request.select:
            if select == EVERY:
                for span in bench.request.every_span(bench.dense.num_layers, layers):
                    name = f"{EVERY}:{format_layers(span.layers)}"
                    _add(chosen, Cell(layers, name, (span,), bench.repairs))
                continue
            spans, table = _choose_one(bench, layers, select)
            _add(chosen, Cell(layers, select, spans, bench.repairs))
            known = tables.get(str(layers))
            if table is not None and (known is None or _measured(table) > _measured(known)):
                tables[str(layers)] = table
    if "ghost" in bench.repairs:
        for layers in bench.request.yardsticks:
            for select in [each for each in bench.request.select if each != EVERY]:
                spans, _ = _choose_one(bench, layers, select)
                _add(chosen, Cell(layers, select, spans, ("ghost",)))
    return chosen, tables


def _measured(table: Mapping[str, Any]) -> int:
    """How many residuals and losses a score table holds."""
    values = (span[key] for span in table["spans"] for key in ("residual", "loss_nats"))
    return sum(value is not None for value in values)


def _add(chosen: dict[tuple[Span, ...], list[Cell]], cell: Cell) -> None:
    chosen.setdefault(cell.spans, []).append(cell)


def _choose_one(
    bench: Bench, layers: int, select: str
) -> tuple[tuple[Span, ...], dict[str, Any] | None]:
    key = f"choice {layers} {select}"
    done = bench.store.get(key)
    if done is None:
        bench.say(f"Choosing {layers} layers by {select}")
        recipe = bench.request.cell_recipe(layers, select)
        with bench.keeping(key, dataclasses.replace(bench.study, recipe=recipe)) as here:
            cut = here.study.choose()
        done = bench.store.put(
            key,
            {
                "spans": [[span.start, span.stop] for span in cut.spans],
                "table": None if cut.table is None else table_to_dict(cut.table),
            },
        )
    return tuple(Span(start, stop) for start, stop in done["spans"]), done["table"]


Jobs = list[tuple[tuple[Span, ...], tuple[str, ...]]]
"""Cuts, and the repairs of each."""


def jobs_of(chosen: Mapping[tuple[Span, ...], Sequence[Cell]]) -> Jobs:
    """The cuts that were chosen."""
    return [(spans, wanted_repairs(members)) for spans, members in chosen.items()]


def wanted_repairs(members: Sequence[Cell]) -> tuple[str, ...]:
    """The repairs that any of the cells of a cut asks for, each once."""
    return tuple(dict.fromkeys(name for member in members for name in member.repairs))


def expected_jobs(bench: Bench) -> Jobs:
    """Before anything is chosen: every choice a cut of its own, in the middle of the model."""
    request, depth = bench.request, bench.dense.num_layers
    wanted = [
        (count, select, bench.repairs) for count in request.layers for select in request.select
    ]
    if "ghost" in bench.repairs:
        scored = [select for select in request.select if select != EVERY]
        wanted += [(count, select, ("ghost",)) for count in request.yardsticks for select in scored]
    return [
        ((span,), repairs)
        for count, select, repairs in wanted
        for span in _expected_spans(request, select, count, depth)
    ]


def _expected_spans(request: Comparison, select: str, count: int, depth: int) -> Sequence[Span]:
    if select == EVERY:
        return request.every_span(depth, count)
    return (Span((depth - count) // 2, (depth + count) // 2),)


def cut_key(spans: Sequence[Span], names: Sequence[str]) -> str:
    """Under which a finished cut is kept."""
    return f"cut {format_layers(removed_layers(spans))} {' '.join(names)}"


def plan_comparison(bench: Bench, speed: Speed) -> Plan:
    """What a comparison takes in all, before anything is chosen: a stage a line."""
    request, depth = bench.request, bench.dense.num_layers
    recipe = request.calibration
    stages = [_choosing(bench), _dense_stage(bench)]
    windows = sum(map(len, bench.corpora.values())) + len(bench.warning_windows)
    fitted = Stage("Fitting the repairs")
    measured = Stage("Losses of every repair on every text")
    timed = Stage("Speed and continuations")
    answered = Stage("Tasks") + _answering(bench, depth, 1)
    for spans, names in expected_jobs(bench):
        one_fit, losses, forwards, answers = _cut_stages(bench, spans, names, windows, depth)
        fitted, measured, timed = fitted + one_fit, measured + losses, timed + forwards
        answered += answers
    here = prices(bench.dense, speed, recipe.sequence_length, 1)
    shown = [*stages, fitted, measured, timed, *([answered] if bench.tasks else [])]
    return Plan(tuple(here.of(stage) for stage in shown))


def plan_presets(bench: Bench, speed: Speed) -> Plan:
    """What methods by their own choices take: a stage a method, all numbers of layers together."""
    request, depth = bench.request, bench.dense.num_layers
    windows = sum(map(len, bench.corpora.values()))
    told = []
    for name in request.presets:
        total = Stage(name)
        for layers in request.layers:
            recipe = request.preset_recipe(name, layers)
            counter = Counter(bench.dense, recipe, make_fitting(bench.dense, recipe))
            spans = expected_spans(recipe, depth)
            fits = [counter.fit(spans)] if recipe.refit == "all" else []
            for stage in (*selection_stages(counter), *fits):
                total += stage
            # Evaluation windows have a length of their own.
            share = windows * request.window_length / recipe.sequence_length
            behind = depth - layers - spans[0].start
            total += Stage("", share * (depth + behind), share * (1 + DIVERGENCE))
        here = prices(bench.dense, speed, recipe.sequence_length, 1)
        told.append(here.of(total))
    dense = prices(bench.dense, speed, request.window_length, 1)
    return Plan((dense.of(_dense_stage(bench)), *told))


def _answering(bench: Bench, depth: int, models: int) -> Stage:
    """Models of some decoder layers on the tasks, whose tokens cost what those of windows do."""
    windows = models * bench.task_tokens / bench.request.window_length
    return Stage("", windows * depth, windows)


def _counter(bench: Bench, layers: int, select: str, repair: str = "ghost") -> Counter:
    # Every span is no selection; what a cut costs does not depend on who chose it.
    recipe = bench.request.cell_recipe(layers, "streamline" if select == EVERY else select)
    return Counter(bench.dense, recipe, make_fitting(bench.dense, replace(recipe, repair=repair)))


def _choosing(bench: Bench) -> Stage:
    """Every selection at every number of layers; sweeps on the same windows are shared."""
    request = bench.request
    counts = [*request.layers, *request.yardsticks]
    total = Stage("Scores and searches")
    swept: set[Stage] = set()
    for select in [each for each in request.select if each != EVERY]:
        for layers in counts:
            for stage in selection_stages(_counter(bench, layers, select)):
                if stage in swept:
                    continue
                if stage.name == SWEEP:
                    swept.add(stage)
                total += stage
    return total


def _dense_stage(bench: Bench) -> Stage:
    windows = sum(map(len, bench.corpora.values()))
    return Stage("Measuring the dense model", windows * bench.dense.num_layers, windows)


def _cut_stages(
    bench: Bench, spans: tuple[Span, ...], names: Sequence[str], windows: int, depth: int
) -> tuple[Stage, Stage, Stage, Stage]:
    removed = sum(map(len, spans))
    start = spans[0].start
    one_fit = _fits(bench, spans, names)
    repairs, behind = len(names) + 1, depth - removed - start + 1
    losses = Stage("", windows * (depth + repairs * behind), windows * (1 + DIVERGENCE * repairs))
    forwards = _forwards_beside(bench) * len(names)
    timed = Stage("", forwards * (depth - removed), forwards * 0.1)
    answering = sum(map(bench.answers_tasks, names))
    return one_fit, losses, timed, _answering(bench, depth - removed, answering)


def _fits(bench: Bench, spans: tuple[Span, ...], names: Sequence[str]) -> Stage:
    """One sweep gathers what most want; a repair with stages changes the stream, and sums alone."""
    removed = sum(map(len, spans))
    shared, alone, solutions, again = Stage(""), 0.0, 0.0, 0.0
    unstaged = _counter(bench, removed, bench.request.select[0]).fit(spans).layers
    for name in names:
        fit = _counter(bench, removed, bench.request.select[0], name).fit(spans)
        solutions += fit.solutions
        if in_stages(bench.dense, find_method(name)):
            alone += fit.products
            again += fit.layers - unstaged
        elif fit.products >= shared.products:
            shared = fit
    if not shared.layers:  # the cut is swept once for those with stages, too
        shared = replace(_counter(bench, removed, bench.request.select[0]).fit(spans), products=0.0)
    return replace(
        shared,
        solutions=solutions,
        products=shared.products + alone,
        layers=shared.layers + again,
    )


def say_estimate(bench: Bench, speed: Speed, jobs: Jobs, *, chosen: bool) -> None:
    """Predicted minutes of what is not done yet."""
    depth = bench.dense.num_layers
    windows = sum(map(len, bench.corpora.values())) + len(bench.warning_windows)
    stages = [] if chosen else [_choosing(bench), _dense_stage(bench), _answering(bench, depth, 1)]
    for spans, names in jobs:
        if not chosen or bench.store.get(cut_key(spans, names)) is None:
            stages.extend(_cut_stages(bench, spans, names, windows, depth))
    here = prices(bench.dense, speed, bench.request.calibration.sequence_length, 1)
    total = sum(here.of(stage).seconds for stage in stages)
    bound = "" if chosen else "at most "
    bench.say(f"About {bound}{max(1, round(total / 60))} minutes to go on this machine.")


def _forwards_beside(bench: Bench) -> float:
    """Whole forward passes of one window that a repair's speed and continuation take."""
    forwards = TIMED_PASSES * TIMED_SHARE if bench.request.speed else 0.0
    return forwards + (bench.request.new_tokens / TOKENS_A_PASS if bench.request.prompt else 0.0)
