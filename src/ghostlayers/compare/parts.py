"""What is measured of the dense model and of every cut: the parts of a comparison."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostlayers.calibration import cuts
from ghostlayers.calibration.distances import stream_distances
from ghostlayers.calibration.gates import gate_shifts
from ghostlayers.compare import models
from ghostlayers.compare.auto import fit_named, is_auto
from ghostlayers.compare.choices import Spans, cut_key, span_rows
from ghostlayers.compare.experiment import Experiment
from ghostlayers.compare.heal import healed_model, heals
from ghostlayers.compare.tasks import run_tasks
from ghostlayers.compare.types import can_be_a_file
from ghostlayers.compare.writing import cut_writing, dense_writing
from ghostlayers.errors import InputError
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Repair
from ghostlayers.report.summary import HEALED
from ghostlayers.runtime import progress
from ghostlayers.spans import Span
from ghostlayers.study import Study
from ghostlayers.surgery import removal
from ghostlayers.surgery.features import check_method
from ghostlayers.text.tokens import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTANCE_WINDOWS = 2
"""Windows on which the stream's distance from the dense one, and the gates', is measured."""

WARNING_WINDOWS = 4
"""Held-out windows that tell whether a repair is worse than none."""

Part = dict[str, Any]
Fits = Mapping[str, Mapping[Span, Repair]]
"""A repair for every gap, by name."""


def dense_part(experiment: Experiment) -> Part:
    """The untouched model: losses, speed, continuations, tasks, files."""
    part = experiment.store.get("dense") or _measure_dense(experiment)
    written = dense_writing(experiment)
    part |= {"written": written.get("rows", []), "prefixes": written.get("prefixes", [])}
    if experiment.request.types:
        network = experiment.study.dense.network
        part["types"] = experiment.files.measure("dense", "dense", network)
    return part


def _measure_dense(experiment: Experiment) -> Part:
    experiment.say("Measuring the dense model")
    runner, dense = experiment.study.runner, experiment.study.dense
    losses = {
        name: cuts.measure_cuts(runner, windows, {}, title=f"Dense on {name}")[cuts.DENSE].to_dict()
        for name, windows in experiment.texts.items()
    }
    model = models.describe_model(dense.network, dense.tokenizer, experiment.request)
    tasks = _tasks(experiment, "dense", "dense", dense.network)
    return experiment.store.put("dense", {"losses": losses, "model": model, "tasks": tasks})


def preset_part(experiment: Experiment, name: str, recipe: Recipe) -> Part:
    """A cut and its repair as a method's own choices have them."""
    key = f"preset {name} {recipe.layers}"
    part = experiment.store.get(key)
    if part is not None:
        return part
    experiment.say(f"{recipe.layers} layers as {name}")
    study = dataclasses.replace(experiment.studies[name], recipe=recipe)
    with experiment.keeping(key, study) as keeping:
        start = time.monotonic()
        cut = keeping.choose()
        fits = keeping.fit(cut)
        seconds = time.monotonic() - start
        part = _part(seconds, [], _repaired(experiment, keeping, fits, key))
    return experiment.store.put(key, {**part, "spans": span_rows(cut.spans)})


def cut_part(experiment: Experiment, spans: Spans, wanted: Sequence[str]) -> Part:
    """All repairs of one cut: fitted from one sweep, measured on every corpus, built once each."""
    key = cut_key(spans, wanted)
    part = experiment.store.get(key)
    if part is not None:
        return part
    with experiment.keeping(key, experiment.study) as keeping:
        part = _measure_cut(experiment, keeping, spans, wanted)
    return experiment.store.put(key, part)


def _measure_cut(experiment: Experiment, study: Study, spans: Spans, wanted: Sequence[str]) -> Part:
    names, skipped = _fitting_names(study.dense, spans, wanted)
    if not names:
        return _part(0.0, skipped, {})
    start = time.monotonic()
    fits = fit_named(study, spans, names)
    seconds = time.monotonic() - start
    return _part(seconds, skipped, _repaired(experiment, study, fits, str(spans)))


def _part(seconds: float, skipped: list[Part], repairs: Part) -> Part:
    return {"fit_seconds": seconds, "skipped": skipped, "repairs": repairs}


def _fitting_names(
    dense: DenseModel, spans: Spans, wanted: Sequence[str]
) -> tuple[list[str], list[Part]]:
    """Repairs that can act on this cut; a cut at layer 0 has no kept layer before it."""
    names, skipped = [], []
    for name in wanted:
        try:
            if not is_auto(name):  # of those that it chooses from, some can
                check_method(dense, find_method(name), spans)
        except InputError as error:
            skipped.append({"repair": name, "reason": str(error)})
            continue
        names.append(name)
    return names, skipped


def _repaired(experiment: Experiment, study: Study, fits: Fits, key: str) -> Part:
    """All that is said of the repairs of one cut; ``key`` names what their models answer."""
    losses = {
        name: _losses(study, name, windows, fits) for name, windows in experiment.texts.items()
    }
    held_out = _held_out(experiment, study, fits)
    distances: dict[str, dict[int, float]] = {name: {} for name in fits}
    windows = study.held_out.first(DISTANCE_WINDOWS)
    if len(windows):
        distances = stream_distances(study.runner, windows, fits)
    gates = gate_shifts(study.runner, windows, fits) if len(windows) else {}
    built = _models(experiment, fits, key)
    rows: Part = {
        name: {
            "losses": {corpus: by_name[name] for corpus, by_name in losses.items()},
            "held_out_loss_nats": held_out.get(name),
            "worse_than_none": _worse(held_out, name),
            "gaps": [models.describe_gap(span, repair) for span, repair in repairs.items()],
            "boundary_residual": [[b, v] for b, v in sorted(distances[name].items())],
            "gates": [vars(shift) for shift in gates.get(name, ())],
            "operators": models.describe_operators(repairs),
            "tasks": built[name].pop("tasks"),
            "types": built[name].pop("types", {}),
            "written": built[name].pop("written"),
            "model": built[name],
        }
        for name, repairs in fits.items()
    }
    for name in [repair for repair in fits if heals(experiment, repair)]:
        rows[f"{name}{HEALED}"] = _healed(experiment, study, fits[name], key, name, rows[name])
    return rows


def _healed(
    experiment: Experiment,
    study: Study,
    repairs: Mapping[Span, Repair],
    key: str,
    name: str,
    before: Part,
) -> Part:
    """What is said of the model of one repair once it is trained."""
    experiment.say(f"Training {name} for {experiment.request.heal}")
    network, row = healed_model(experiment, study, repairs, key, name)
    label = f"{name}{HEALED}"
    tokenizer, plain = study.dense.tokenizer, before["model"]
    speed = {field: plain[field] for field in models.SPEED_KEYS}  # it has the same shape
    model = models.describe_model(network, tokenizer, experiment.request, speed)
    same = {field: plain[field] for field in ("checkpoint", "added_parameters")}
    return {
        **before,
        "losses": row["losses"],
        "held_out_loss_nats": None,
        "worse_than_none": False,
        "boundary_residual": [],
        "gates": [],
        "operators": [],
        "tasks": _tasks(experiment, key, label, network),
        "types": {},
        "written": cut_writing(experiment, key, label, network),
        "model": {**model, **same, "healing": row["healing"]},
    }


def _losses(study: Study, corpus: str, windows: Windows, fits: Fits) -> Part:
    """By repair."""
    title = f"{len(fits)} repairs on {corpus}"
    losses = cuts.measure_cuts(study.runner, windows, fits, title=title)
    return {name: sums.to_dict() for name, sums in losses.items()}


def _held_out(experiment: Experiment, study: Study, fits: Fits) -> dict[str, float]:
    """Losses on windows that nothing was fitted on; warns of repairs that are worse than none."""
    windows = study.held_out.first(WARNING_WINDOWS)
    if not len(windows):
        return {}
    spans = tuple(next(iter(fits.values())))
    both = {**fits, "none": cuts.unrepaired(spans)}
    rows = _losses(study, "held-out calibration windows", windows, both)
    losses = {name: rows[name]["loss_nats"] for name in both}
    for name in fits:
        if _worse(losses, name):
            experiment.say(
                f"Warning: {name} is worse than no repair on held-out text ({losses[name]:.3f} "
                f"against {losses['none']:.3f} nats)."
            )
    return losses


TELLS = 5e-4
"""Nats that a difference must have to be seen in the figures that are shown."""


def _worse(held_out: Mapping[str, float], name: str) -> bool:
    return name != "none" and name in held_out and held_out[name] > held_out["none"] + TELLS


def _models(experiment: Experiment, fits: Fits, key: str) -> dict[str, Part]:
    """Size, speed, continuations and tasks of every repaired model, built one at a time.

    Models whose repairs have the same shapes take the same time, so one of each is measured.
    """
    described: dict[str, Part] = {}
    speeds: dict[Any, Part] = {}
    dense, request = experiment.study.dense, experiment.request
    with progress.stage("Timing and writing", len(fits)) as advance:
        for name, repairs in fits.items():
            model = removal.prune_layers(dense, tuple(repairs), repairs)
            shape, gaps = models.runtime_shape(repairs.values()), repairs.values()
            row = models.describe_model(model, dense.tokenizer, request, speeds.get(shape))
            speeds.setdefault(shape, {field: row[field] for field in models.SPEED_KEYS})
            method = find_method(next(iter(gaps)).method)
            row["checkpoint"] = models.checkpoint_kind(method, gaps)
            row["written"] = cut_writing(experiment, key, name, model)
            row["tasks"] = _tasks(experiment, key, name, model)
            if request.types and can_be_a_file(name, row["checkpoint"]):
                row["types"] = experiment.files.measure(key, name, model)
            row["added_parameters"] = sum(repair.num_parameters for repair in gaps)
            described[name] = row
            advance(1)
    return described


def _tasks(experiment: Experiment, key: str, repair: str, model: "PreTrainedModel") -> list[Part]:
    """A model's accuracies, kept as soon as they are known: they take longest."""
    tasks, study = experiment.tasks, experiment.study
    if tasks is None or not (repair == "dense" or experiment.answers_tasks(repair)):
        return []
    name = f"tasks {key} {repair}"
    part = experiment.store.get(name)
    if part is None:
        limit = experiment.request.limit
        rows = run_tasks(model, study.dense.tokenizer, tasks, limit)
        part = experiment.store.put(name, {"rows": rows})
    answers: list[Part] = part["rows"]
    return answers
