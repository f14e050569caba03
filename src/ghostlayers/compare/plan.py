"""How long a comparison will take: the passes of all its parts, priced."""

import dataclasses
from collections.abc import Iterator, Sequence

from ghostlayers.calibration.cuts import loss_pass
from ghostlayers.calibration.fits import in_stages
from ghostlayers.calibration.passes import Pass
from ghostlayers.calibration.scoring import SWEEP
from ghostlayers.compare.auto import contested, is_auto
from ghostlayers.compare.choices import Jobs, Spans, cut_key, expected_jobs
from ghostlayers.compare.experiment import Experiment
from ghostlayers.compare.heal import healing_recipe, heals
from ghostlayers.compare.parts import WARNING_WINDOWS
from ghostlayers.compare.request import EVERY
from ghostlayers.evaluation.written import tokens_to_write
from ghostlayers.plan.expected import Expected, contest_passes, expected_spans
from ghostlayers.plan.probe import Speed
from ghostlayers.plan.units import Plan, Predicted, prices
from ghostlayers.repairs import find_method

TIMED_PASSES = 5.0
TIMED_SHARE = 0.4
"""Prefills that time a model, and their length beside a window's."""

TOKENS_A_PASS = 20
"""New tokens of a continuation that take as long as a window's forward pass."""

TOKEN_BY_TOKEN = 1.6
"""Many texts written side by side a token at a time, in passes over as many tokens at once.

Measured on SmolLM2-135M: 56 texts of 64 tokens behind 64, on one core.
"""


def plan_comparison(experiment: Experiment, speed: Speed) -> Plan:
    """What a comparison takes in all, before anything is chosen."""
    plan = _plan_presets if experiment.request.presets else _plan_choices
    return plan(experiment, speed)


def _plan_choices(experiment: Experiment, speed: Speed) -> Plan:
    """A line for each kind of work."""
    dense, request = experiment.study.dense, experiment.request
    jobs = expected_jobs(request, dense.num_layers, experiment.repairs.names)
    here = prices(dense, speed, request.calibration.sequence_length)
    lines: list[tuple[str, list[Pass]]] = [
        ("Scores and searches", _choosing(experiment)),
        ("Measuring the dense model", [_dense_pass(experiment)]),
        ("Fitting the repairs", [fit for job in jobs for fit in _fits(experiment, *job)]),
        ("Losses of every repair on every text", [_losses(experiment, *job) for job in jobs]),
        ("Speed and continuations", [_timing(experiment, *job) for job in jobs]),
    ]
    if experiment.writes:
        texts = [_writing(experiment, 0, 1)]
        texts += [_writing(experiment, _removed(spans), len(names)) for spans, names in jobs]
        lines.append(("What they write", texts))
    if request.heal is not None:
        lines.append(("Training", [_healing(experiment, *job) for job in jobs]))
    if experiment.tasks:
        answers = [_dense_answers(experiment)]
        lines.append(("Tasks", answers + [_answers(experiment, *job) for job in jobs]))
    if request.types:
        files = [_files(experiment, 0, 1)]
        files += [_files(experiment, _removed(spans), len(names)) for spans, names in jobs]
        lines.append(("GGUF files in llama.cpp", files))
    return here.plan(here.together(title, passes) for title, passes in lines)


def _plan_presets(experiment: Experiment, speed: Speed) -> Plan:
    """A line for each method, all numbers of layers together."""
    request = experiment.request
    here = prices(experiment.study.dense, speed, request.window_length)
    lines = (_preset_line(experiment, name, speed) for name in request.presets)
    dense = [_dense_pass(experiment), _writing(experiment, 0, 1)]
    return here.plan([here.together(dense[0].title, dense), *lines])


def _preset_line(experiment: Experiment, name: str, speed: Speed) -> Predicted:
    request, dense = experiment.request, experiment.study.dense
    passes: list[Pass] = []
    for layers in request.layers:
        recipe = request.preset_recipe(name, layers)
        expected, spans = Expected.of(dense, recipe), expected_spans(recipe, dense.num_layers)
        passes += [chosen for _, choosing in expected.selection() for chosen in choosing]
        passes += [expected.fit(spans)] if recipe.refit == "all" else []
        # Evaluation windows have a length of their own.
        share = _windows(experiment) * request.window_length / recipe.sequence_length
        behind = dense.num_layers - layers - spans[0].start
        passes.append(loss_pass(dense, share, [behind], True, name))
        passes.append(_writing(experiment, layers, 1))
    return prices(dense, speed, recipe.sequence_length).together(name, passes)


def _windows(experiment: Experiment) -> int:
    """Windows of all evaluation texts."""
    return sum(map(len, experiment.texts.values()))


def _removed(spans: Spans) -> int:
    return sum(map(len, spans))


def _writing(experiment: Experiment, removed: int, models: int) -> Pass:
    """Models without some layers write, and the dense one scores what they wrote."""
    request, depth = experiment.request, experiment.study.dense.num_layers
    tokens = tokens_to_write(request.continuations) if experiment.writes else 0
    windows = models * tokens / request.window_length
    layers = windows * (TOKEN_BY_TOKEN * (depth - removed) + depth)
    return Pass("written", "What they write", windows, layers=layers, heads=2 * windows)


def _healing(experiment: Experiment, spans: Spans, names: Sequence[str]) -> Pass:
    """Every repair's model is trained for the budget."""
    count = sum(heals(experiment, name) for name in names)
    recipe = healing_recipe(experiment, experiment.study)
    if recipe.num_tokens is None:
        return Pass("heal", "Training", fixed=count * (recipe.seconds or 0.0))
    depth = experiment.study.dense.num_layers
    behind = depth - spans[0].start - _removed(spans)
    windows = count * recipe.num_tokens / experiment.request.window_length
    return Pass("heal", "Training", windows, layers=windows * (depth + 3 * behind), heads=windows)


def _answering(experiment: Experiment, depth: int, models: int) -> Pass:
    """Models of some decoder layers on the tasks, whose tokens cost what those of windows do."""
    windows = models * experiment.task_tokens / experiment.request.window_length
    return Pass("tasks", "Tasks", windows, layers=windows * depth, heads=windows)


def _expected(experiment: Experiment, layers: int, select: str, repair: str = "ghost") -> Expected:
    # Every span is no selection; what a cut costs does not depend on who chose it.
    recipe = experiment.request.recipe_for(layers, "streamline" if select == EVERY else select)
    return Expected.of(experiment.study.dense, dataclasses.replace(recipe, repair=repair))


def _choosing(experiment: Experiment) -> list[Pass]:
    """Every selection at every number of layers; sweeps on the same windows are shared."""
    passes: dict[Pass | int, Pass] = {}
    for choosing in _selecting(experiment):
        passes[choosing if choosing.title == SWEEP else len(passes)] = choosing
    return list(passes.values())


def _selecting(experiment: Experiment) -> Iterator[Pass]:
    request = experiment.request
    for select in request.selections:
        for layers in (*request.layers, *request.yardsticks):
            for _, passes in _expected(experiment, layers, select).selection():
                yield from passes


def _dense_pass(experiment: Experiment) -> Pass:
    dense, windows = experiment.study.dense, _windows(experiment)
    return loss_pass(dense, windows, [], True, "Measuring the dense model")


def _losses(experiment: Experiment, spans: Spans, names: Sequence[str]) -> Pass:
    """Every repair of a cut, and the bare cut on a few windows, on every text."""
    behind = experiment.study.dense.num_layers - _removed(spans) - spans[0].start + 1
    windows = _windows(experiment) + len(experiment.study.held_out.first(WARNING_WINDOWS))
    return loss_pass(experiment.study.dense, windows, [behind] * (len(names) + 1), True, "Losses")


def _timing(experiment: Experiment, spans: Spans, names: Sequence[str]) -> Pass:
    """Whole forward passes of one window that every repair's speed and continuation take."""
    request = experiment.request
    forwards = TIMED_PASSES * TIMED_SHARE if request.speed else 0.0
    forwards += request.new_tokens / TOKENS_A_PASS if request.prompt else 0.0
    forwards *= len(names)
    depth = experiment.study.dense.num_layers - _removed(spans)
    return Pass("timing", "Timing and writing", forwards, layers=forwards * depth)


def _files(experiment: Experiment, removed: int, models: int) -> Pass:
    """Each type of models reads every window, and the dense one beside it, as fast as here."""
    windows = _windows(experiment) * models * len(experiment.request.types)
    layers = windows * (2 * experiment.study.dense.num_layers - removed)
    return Pass("types", "GGUF files", windows, layers=layers, heads=2 * windows)


def _dense_answers(experiment: Experiment) -> Pass:
    return _answering(experiment, experiment.study.dense.num_layers, 1)


def _answers(experiment: Experiment, spans: Spans, names: Sequence[str]) -> Pass:
    depth = experiment.study.dense.num_layers - _removed(spans)
    return _answering(experiment, depth, sum(map(experiment.answers_tasks, names)))


def _fits(experiment: Experiment, spans: Spans, names: Sequence[str]) -> list[Pass]:
    """One sweep gathers what most want; a repair with stages changes the stream, and sums alone."""
    removed, select = _removed(spans), experiment.request.select[0]
    bare = _expected(experiment, removed, select).fit(spans)
    shared = dataclasses.replace(bare, products=0.0, solutions=0.0)
    alone: list[Pass] = []
    for name in names:
        if is_auto(name):
            recipe = contested(experiment.request.calibration, name)
            alone += contest_passes(experiment.study.dense, recipe, spans)
            continue
        fit = _expected(experiment, removed, select, name).fit(spans)
        if in_stages(experiment.study.dense, find_method(name)):
            alone.append(dataclasses.replace(fit, layers=fit.layers - bare.layers))
            continue
        solutions = shared.solutions + fit.solutions
        shared = dataclasses.replace(max(shared, fit, key=_products), solutions=solutions)
    return [shared, *alone]


def _products(declared: Pass) -> float:
    return declared.products


def say_estimate(experiment: Experiment, speed: Speed) -> None:
    """Predicted minutes, before anything is chosen."""
    request, depth = experiment.request, experiment.study.dense.num_layers
    jobs = expected_jobs(request, depth, experiment.repairs.names)
    dense = [_dense_pass(experiment), _writing(experiment, 0, 1), _dense_answers(experiment)]
    first = [*_choosing(experiment), *dense]
    _say(experiment, speed, [*first, *_all_of(experiment, jobs)], "At most")


def say_what_is_left(experiment: Experiment, speed: Speed, jobs: Jobs) -> None:
    """Predicted minutes of the cuts that are not done yet."""
    left = [job for job in jobs if experiment.store.get(cut_key(*job)) is None]
    _say(experiment, speed, [*_all_of(experiment, left)], "About")


def _all_of(experiment: Experiment, jobs: Jobs) -> Iterator[Pass]:
    for job in jobs:
        yield from _fits(experiment, *job)
        yield from (work(experiment, *job) for work in (_losses, _timing, _answers))
        yield _writing(experiment, _removed(job[0]), len(job[1]))
        if experiment.request.heal is not None:
            yield _healing(experiment, *job)


def _say(experiment: Experiment, speed: Speed, passes: Sequence[Pass], bound: str) -> None:
    length = experiment.request.calibration.sequence_length
    seconds = prices(experiment.study.dense, speed, length).together("", passes).seconds
    minutes = max(1, round(seconds / 60))
    unit = "minute" if minutes == 1 else "minutes"
    experiment.say(f"{bound} {minutes} {unit} to go on this machine.")
