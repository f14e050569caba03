"""Running a comparison: the model is opened once, every part is measured once and kept at once."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ghostlayers.calibration import cuts
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.compare import cells
from ghostlayers.compare.bench import Bench, Say, header, prepare
from ghostlayers.compare.correlate import correlations
from ghostlayers.compare.plan import (
    Cell,
    choose,
    cut_key,
    expected_jobs,
    jobs_of,
    plan_comparison,
    plan_presets,
    say_estimate,
    wanted_repairs,
)
from ghostlayers.compare.request import Comparison
from ghostlayers.compare.tasks import run_tasks
from ghostlayers.compare.types import can_be_a_file
from ghostlayers.errors import InputError
from ghostlayers.evaluation import LossSums
from ghostlayers.model.loading import leaves_models_alone
from ghostlayers.plan.probe import probe
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import Documents
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Repair
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.places import check_apart
from ghostlayers.runtime.progress import Progress
from ghostlayers.spans import Span, format_layers, removed_layers
from ghostlayers.surgery import removal
from ghostlayers.surgery.features import check_method
from ghostlayers.text.tokens import Windows

DISTANCE_WINDOWS = 2
"""Windows on which the stream's distance from the dense one is measured."""


@leaves_models_alone
def compare(
    model: Any,
    request: Comparison,
    out: str | Path,
    *,
    tokenizer: Any = None,
    data: Documents | None = None,
    eval_data: Mapping[str, Documents] | None = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    show_text: Callable[[str], None] | None = None,
    show_plan: Callable[[Plan], bool] | None = None,
    command: str | None = None,
    trust_tasks: bool = False,
) -> dict[str, Any]:
    """Measure every selection and every repair at every number of layers.

    Scores are swept once, one sweep a cut gathers the evidence from which all its repairs are
    fitted, and nothing is written but results: no cell needs a checkpoint. Finished parts are kept
    in ``out``; the same call goes on where an interrupted one stopped.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a causal language model in memory.
        request: what to compare.
        out: folder for the finished parts; `report.write.write_report` puts the tables and the
            page beside them.
        tokenizer: for a model in memory.
        data: calibration text instead of the recipe's.
        eval_data: corpora by name, beside those that the request names.
        options: how to run.
        revision: of a model on the hub.
        overwrite: replace another comparison's results.
        progress: told of every window.
        say: told what is done and what comes next.
        show_text: told how the calibration text begins.
        show_plan: told before anything is computed what it will take; if it gives False, nothing
            is.
        command: as it should stand in the report.
        trust_tasks: let task files run code.

    Returns:
        The results, as ``results.json`` holds them; empty if nothing was computed.

    Raises:
        GhostlayersError: bad input or numbers; see `ghostlayers.errors`.
    """
    inputs = (model, data, request.calibration.data, *request.eval_data)
    given = [each for each in inputs if isinstance(each, (str, Path))]
    check_apart({"input": given}, {"output": Path(out)})
    with holding(Path(out)):
        bench = prepare(
            model, request, Path(out), tokenizer, data, eval_data, options, revision, overwrite,
            progress, say, trust_tasks,
        )  # fmt: skip
        if show_text is not None:
            show_text(bench.study.windows.preview)
        return _compare(bench, show_plan, command)


def _compare(
    bench: Bench, show_plan: Callable[[Plan], bool] | None, command: str | None
) -> dict[str, Any]:
    request = bench.request
    speed = probe(bench.dense, bench.study.windows)
    plan = plan_presets if request.presets else plan_comparison
    if show_plan is not None and not show_plan(plan(bench, speed)):
        bench.store.forget()
        return {}
    if request.presets:
        return _compare_presets(bench, command)
    say_estimate(bench, speed, expected_jobs(bench), chosen=False)
    dense_part = _dense(bench)
    chosen, tables = choose(bench)
    say_estimate(bench, speed, jobs_of(chosen), chosen=True)
    parts = []
    for index, (spans, members) in enumerate(chosen.items()):
        key = format_layers(removed_layers(spans))
        bench.say(f"Cut {index + 1} of {len(chosen)}: layers {key}")
        parts.append(_cut(bench, spans, members))
    results = cells.assemble(
        header(bench, command), dense_part, parts, list(chosen.values()), tables
    )
    return {**results, "correlations": correlations(results)}


def _compare_presets(bench: Bench, command: str | None) -> dict[str, Any]:
    """Each method by its own choices: a part for every number of layers and preset."""
    dense_part = _dense(bench)
    parts, members = [], []
    for layers in sorted(set(bench.request.layers)):
        for name in bench.request.presets:
            recipe = bench.request.preset_recipe(name, layers)
            part = _preset_part(bench, name, recipe)
            spans = tuple(Span(start, stop) for start, stop in part["spans"])
            parts.append(part)
            members.append([Cell(layers, name, spans, (recipe.repair,))])
    return cells.assemble(header(bench, command), dense_part, parts, members, {})


def _preset_part(bench: Bench, name: str, recipe: Recipe) -> dict[str, Any]:
    key = f"preset {name} {recipe.layers}"
    done = bench.store.get(key)
    if done is not None:
        return done
    bench.say(f"{recipe.layers} layers as {name}")
    with bench.keeping(key, dataclasses.replace(bench.presets[name], recipe=recipe)) as here:
        start = time.monotonic()
        cut = here.study.choose()
        repairs = here.study.fit(cut)
        seconds = time.monotonic() - start
        part = _measured(here, cut.spans, repairs, seconds, [], key)
    part["spans"] = [[span.start, span.stop] for span in cut.spans]
    return bench.store.put(key, part)


def _dense(bench: Bench) -> dict[str, Any]:
    """The untouched model: losses, speed, continuation, tasks, files."""
    part = bench.store.get("dense") or _measure_dense(bench)
    if bench.files is not None:
        part["types"] = bench.files.measure("dense", "dense", bench.dense.network)
    return part


def _measure_dense(bench: Bench) -> dict[str, Any]:
    bench.say("Measuring the dense model")
    losses = {
        name: cuts.measure_cuts(bench.runner, windows, {}, title=f"Dense on {name}")[cuts.DENSE]
        for name, windows in bench.corpora.items()
    }
    model = cells.describe_model(bench.dense.network, bench.dense.tokenizer, bench.request)
    tasks = _tasks(bench, "dense", "dense", bench.dense.network)
    return bench.store.put("dense", {"losses": _rows(losses), "model": model, "tasks": tasks})


def _tasks(bench: Bench, key: str, repair: str, model: Any) -> list[dict[str, Any]]:
    """A model's accuracies, kept as soon as they are known: they take longest."""
    request = bench.request
    if bench.tasks is None or not (repair == "dense" or bench.answers_tasks(repair)):
        return []
    name = f"tasks {key} {repair}"
    done = bench.store.get(name)
    if done is None:
        rows = run_tasks(
            model, bench.dense.tokenizer, bench.tasks, request.limit, bench.runner.progress
        )
        done = bench.store.put(name, {"rows": rows})
    found: list[dict[str, Any]] = done["rows"]
    return found


def _rows(losses: Mapping[str, LossSums]) -> dict[str, Any]:
    return {name: sums.to_dict() for name, sums in losses.items()}


def _cut(bench: Bench, spans: tuple[Span, ...], members: Sequence[Cell]) -> dict[str, Any]:
    """All repairs of one cut: fitted from one sweep, measured on every corpus, built once each."""
    wanted = wanted_repairs(members)
    key = cut_key(spans, wanted)
    done = bench.store.get(key)
    if done is not None:
        return done
    with bench.keeping(key) as here:
        part = _measure_cut(here, spans, wanted)
    return bench.store.put(key, part)


def _measure_cut(bench: Bench, spans: tuple[Span, ...], wanted: Sequence[str]) -> dict[str, Any]:
    names, skipped = _fitting_names(bench, spans, wanted)
    if not names:
        return {"fit_seconds": 0.0, "skipped": skipped, "repairs": {}}
    start = time.monotonic()
    fits = bench.study.fit(ChosenCut(bench.study.recipe, spans), names)
    seconds = time.monotonic() - start
    return _measured(bench, spans, fits, seconds, skipped, str(spans))


def _measured(
    bench: Bench,
    spans: tuple[Span, ...],
    fits: Mapping[str, Mapping[Span, Repair]],
    seconds: float,
    skipped: list[dict[str, Any]],
    key: str,
) -> dict[str, Any]:
    """All that is told of the repairs of one cut; ``key`` names what their models answer."""
    losses = _losses(bench, fits)
    held_out = _held_out(bench, fits)
    held = bench.study.held_out.first(DISTANCE_WINDOWS)
    distances: dict[str, dict[int, float]] = {name: {} for name in fits}
    if len(held):
        distances = cuts.stream_distances(bench.runner, held, fits)
    models = _models(bench, spans, fits, key)
    return {
        "fit_seconds": seconds,
        "skipped": skipped,
        "repairs": {
            name: {
                "losses": {corpus: each[name] for corpus, each in losses.items()},
                "held_out_loss_nats": held_out.get(name),
                "worse_than_none": _worse(held_out, name),
                "gaps": [cells.describe_gap(span, fits[name][span]) for span in spans],
                "boundary_residual": [[b, v] for b, v in sorted(distances[name].items())],
                "operators": cells.describe_operators(fits[name]),
                "tasks": models[name].pop("tasks"),
                "types": models[name].pop("types", {}),
                "model": models[name],
            }
            for name in fits
        },
    }


def _fitting_names(
    bench: Bench, spans: tuple[Span, ...], wanted: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Repairs that can act on this cut; a cut at layer 0 has no kept layer before it."""
    names, skipped = [], []
    for name in wanted:
        try:
            check_method(bench.dense, find_method(name), spans)
        except InputError as error:
            skipped.append({"repair": name, "reason": str(error)})
            continue
        names.append(name)
    return names, skipped


def _losses(bench: Bench, fits: Mapping[str, Mapping[Span, Repair]]) -> dict[str, dict[str, Any]]:
    """By corpus and repair."""
    return {name: _measure(bench, name, each, fits) for name, each in bench.corpora.items()}


def _measure(
    bench: Bench, corpus: str, windows: Windows, models: Mapping[str, Mapping[Span, Repair]]
) -> dict[str, Any]:
    title = f"{len(models)} repairs on {corpus}"
    losses = cuts.measure_cuts(bench.runner, windows, models, title=title)
    return _rows(losses)


def _held_out(bench: Bench, fits: Mapping[str, Mapping[Span, Repair]]) -> dict[str, float]:
    """Losses on windows that nothing was fitted on; warns of repairs that are worse than none."""
    if not len(bench.study.held_out):
        return {}
    spans = tuple(next(iter(fits.values())))
    models = {**fits, "none": cuts.unrepaired(spans)}
    rows = _measure(bench, "held-out calibration windows", bench.warning_windows, models)
    losses = {name: rows[name]["loss_nats"] for name in models}
    for name in fits:
        if _worse(losses, name):
            bench.say(
                f"Warning: {name} is worse than no repair on held-out text ({losses[name]:.3f} "
                f"against {losses['none']:.3f} nats)."
            )
    return losses


def _worse(held_out: Mapping[str, float], name: str) -> bool:
    return name != "none" and name in held_out and held_out[name] > held_out["none"]


def _models(
    bench: Bench, spans: tuple[Span, ...], fits: Mapping[str, Mapping[Span, Repair]], key: str
) -> dict[str, Any]:
    """Size, speed, continuation and tasks of every repaired model, built one at a time.

    Models whose repairs have the same shapes take the same time, so one of each is measured.
    """
    found: dict[str, Any] = {}
    timed: dict[Any, dict[str, Any]] = {}
    progress = bench.runner.progress
    with progress.stage("Timing and writing", len(fits)) as advance:
        for name, repairs in fits.items():
            model = removal.prune_layers(bench.dense, spans, repairs)
            shape = cells.runtime_shape(repairs.values())
            known = timed.get(shape)
            described = cells.describe_model(model, bench.dense.tokenizer, bench.request, known)
            timed.setdefault(shape, {key: described[key] for key in cells.SPEED_KEYS})
            described["checkpoint"] = cells.checkpoint_kind(find_method(name), repairs.values())
            described["tasks"] = _tasks(bench, key, name, model)
            if bench.files is not None and can_be_a_file(name, described["checkpoint"]):
                described["types"] = bench.files.measure(key, name, model)
            described["added_parameters"] = sum(each.num_parameters for each in repairs.values())
            found[name] = described
            advance(1)
    return found
