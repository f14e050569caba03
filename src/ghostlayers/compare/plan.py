"""Which cuts a comparison makes, and how long they will take."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghostlayers.calibration.cuts import loss_pass
from ghostlayers.calibration.fits import in_stages
from ghostlayers.calibration.passes import Pass
from ghostlayers.calibration.scoring import SWEEP
from ghostlayers.checkpoint.record import table_to_dict
from ghostlayers.compare.bench import Bench
from ghostlayers.compare.request import EVERY, Comparison
from ghostlayers.plan.probe import Speed
from ghostlayers.plan.stages import Expected, expected_spans
from ghostlayers.plan.units import Plan, prices
from ghostlayers.repairs import find_method
from ghostlayers.selection.choices import find_selection
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
        # A sweep that keeps a sample of the stream serves those that need none, too.
        selects = [select for select in bench.request.select if select != EVERY]
        for select in sorted(selects, key=lambda each: _needs_no_sample(bench, layers, each)):
            _choose_one(bench, layers, select)
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


def _needs_no_sample(bench: Bench, layers: int, select: str) -> bool:
    choice = find_selection(bench.request.cell_recipe(layers, select).select)
    return "residuals" not in choice.needs


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
    request = bench.request
    jobs = expected_jobs(bench)
    here = prices(bench.dense, speed, request.calibration.sequence_length)
    lines: list[tuple[str, list[Pass]]] = [
        ("Scores and searches", _choosing(bench)),
        ("Measuring the dense model", [_dense_pass(bench)]),
        ("Fitting the repairs", [each for job in jobs for each in _fits(bench, *job)]),
        ("Losses of every repair on every text", [_losses(bench, *job) for job in jobs]),
        ("Speed and continuations", [_timing(bench, *job) for job in jobs]),
    ]
    if bench.tasks:
        answers = [_answering(bench, bench.dense.num_layers, 1)]
        lines.append(("Tasks", answers + [_answers(bench, *job) for job in jobs]))
    if request.types:
        files = [_files(bench, 0, 1), *(_files(bench, sum(map(len, s)), len(n)) for s, n in jobs)]
        lines.append(("GGUF files in llama.cpp", files))
    return Plan(tuple(here.together(title, passes) for title, passes in lines))


def plan_presets(bench: Bench, speed: Speed) -> Plan:
    """What methods by their own choices take: a stage a method, all numbers of layers together."""
    request, depth = bench.request, bench.dense.num_layers
    lines = []
    for name in request.presets:
        passes: list[Pass] = []
        for layers in request.layers:
            recipe = request.preset_recipe(name, layers)
            expected, spans = Expected.of(bench.dense, recipe), expected_spans(recipe, depth)
            passes += [each for _, some in expected.selection() for each in some]
            passes += [expected.fit(spans)] if recipe.refit == "all" else []
            # Evaluation windows have a length of their own.
            share = _windows(bench) * request.window_length / recipe.sequence_length
            behind = depth - layers - spans[0].start
            passes.append(loss_pass(bench.dense, share, [behind], True, name))
        here = prices(bench.dense, speed, recipe.sequence_length)
        lines.append(here.together(name, passes))
    dense = prices(bench.dense, speed, request.window_length)
    return Plan((dense.of(_dense_pass(bench)), *lines))


def _windows(bench: Bench) -> int:
    """Windows of all evaluation texts."""
    return sum(map(len, bench.corpora.values()))


def _answering(bench: Bench, depth: int, models: int) -> Pass:
    """Models of some decoder layers on the tasks, whose tokens cost what those of windows do."""
    windows = models * bench.task_tokens / bench.request.window_length
    return Pass("tasks", "Tasks", windows, layers=windows * depth, heads=windows)


def _expected(bench: Bench, layers: int, select: str, repair: str = "ghost") -> Expected:
    # Every span is no selection; what a cut costs does not depend on who chose it.
    recipe = bench.request.cell_recipe(layers, "streamline" if select == EVERY else select)
    return Expected.of(bench.dense, dataclasses.replace(recipe, repair=repair))


def _choosing(bench: Bench) -> list[Pass]:
    """Every selection at every number of layers; sweeps on the same windows are shared."""
    request = bench.request
    passes: dict[Pass | int, Pass] = {}
    for select in [each for each in request.select if each != EVERY]:
        for layers in (*request.layers, *request.yardsticks):
            for _, some in _expected(bench, layers, select).selection():
                for each in some:
                    passes[each if each.title == SWEEP else len(passes)] = each
    return list(passes.values())


def _dense_pass(bench: Bench) -> Pass:
    return loss_pass(bench.dense, _windows(bench), [], True, "Measuring the dense model")


def _losses(bench: Bench, spans: tuple[Span, ...], names: Sequence[str]) -> Pass:
    """Every repair of a cut, and the bare cut on a few windows, on every text."""
    behind = bench.dense.num_layers - sum(map(len, spans)) - spans[0].start + 1
    windows = _windows(bench) + len(bench.warning_windows)
    return loss_pass(bench.dense, windows, [behind] * (len(names) + 1), True, "Losses")


def _timing(bench: Bench, spans: tuple[Span, ...], names: Sequence[str]) -> Pass:
    """Whole forward passes of one window that every repair's speed and continuation take."""
    request = bench.request
    forwards = TIMED_PASSES * TIMED_SHARE if request.speed else 0.0
    forwards += request.new_tokens / TOKENS_A_PASS if request.prompt else 0.0
    forwards *= len(names)
    kept = bench.dense.num_layers - sum(map(len, spans))
    return Pass("timing", "Timing and writing", forwards, layers=forwards * kept)


def _files(bench: Bench, removed: int, models: int) -> Pass:
    """Each type of models reads every window, and the dense one beside it, as fast as here."""
    windows = _windows(bench) * models * len(bench.request.types)
    layers = windows * (2 * bench.dense.num_layers - removed)
    return Pass("types", "GGUF files", windows, layers=layers, heads=2 * windows)


def _answers(bench: Bench, spans: tuple[Span, ...], names: Sequence[str]) -> Pass:
    kept = bench.dense.num_layers - sum(map(len, spans))
    return _answering(bench, kept, sum(map(bench.answers_tasks, names)))


def _fits(bench: Bench, spans: tuple[Span, ...], names: Sequence[str]) -> list[Pass]:
    """One sweep gathers what most want; a repair with stages changes the stream, and sums alone."""
    removed, select = sum(map(len, spans)), bench.request.select[0]
    bare = _expected(bench, removed, select).fit(spans)
    shared = dataclasses.replace(bare, products=0.0, solutions=0.0)
    alone: list[Pass] = []
    for name in names:
        fit = _expected(bench, removed, select, name).fit(spans)
        if in_stages(bench.dense, find_method(name)):
            alone.append(dataclasses.replace(fit, layers=fit.layers - bare.layers))
            continue
        solutions = shared.solutions + fit.solutions
        shared = dataclasses.replace(max(shared, fit, key=_products), solutions=solutions)
    return [shared, *alone]


def _products(declared: Pass) -> float:
    return declared.products


def say_estimate(bench: Bench, speed: Speed, jobs: Jobs, *, chosen: bool) -> None:
    """Predicted minutes of what is not done yet."""
    passes: list[Pass] = []
    if not chosen:
        passes = [*_choosing(bench), _dense_pass(bench)]
        passes.append(_answering(bench, bench.dense.num_layers, 1))
    for job in jobs:
        if not chosen or bench.store.get(cut_key(*job)) is None:
            passes += [*_fits(bench, *job), _losses(bench, *job), _timing(bench, *job)]
            passes.append(_answers(bench, *job))
    here = prices(bench.dense, speed, bench.request.calibration.sequence_length)
    total = here.together("", passes).seconds
    bound = "" if chosen else "at most "
    bench.say(f"About {bound}{max(1, round(total / 60))} minutes to go on this machine.")
