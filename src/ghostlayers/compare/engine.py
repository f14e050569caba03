"""Running a comparison: the model is opened once, every part is measured once and kept at once."""

import dataclasses
import datetime
import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghostlayers import checkpoint, cuts, steps, surgery, text, tokens
from ghostlayers.compare import cells
from ghostlayers.compare.correlate import correlations
from ghostlayers.compare.estimate import Speed, Workload, cut_seconds, probe
from ghostlayers.compare.request import EVERY, Comparison
from ghostlayers.compare.store import Store
from ghostlayers.compare.tasks import run_tasks
from ghostlayers.errors import InputError
from ghostlayers.evaluation import LoadedTasks, LossSums, open_tasks
from ghostlayers.features import check_method
from ghostlayers.fitting import Fitting, fit_many, gathered_features
from ghostlayers.loading import LoadedModel
from ghostlayers.preparation import (
    Documents,
    check_request,
    make_fitting,
    open_model,
    read_calibration,
)
from ghostlayers.progress import Progress, Silent
from ghostlayers.recipe import RunOptions
from ghostlayers.record import table_to_dict
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Needs, Repair
from ghostlayers.selection import candidate_spans
from ghostlayers.spans import Span, format_layers, removed_layers
from ghostlayers.steps import Run
from ghostlayers.stream import LayerwiseModel
from ghostlayers.tokens import Windows

SCHEMA = 1
SWEEP_COST = 1.4
"""A scoring sweep, its candidates' losses included, in bare forward passes."""

DISTANCE_WINDOWS = 2
"""Windows on which the stream's distance from the dense one is measured."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """Everything that all cells share.

    Attributes:
        request: what is compared.
        dense: the model.
        layerwise: the model, a layer at a time.
        run: how, and who is told.
        scored: calibration windows.
        held_out: further ones, that choose and that warn.
        corpora: evaluation windows by name.
        repairs: names that the model has what they need for.
        skipped: the others, with the reason.
        tasks: opened once; None if none are asked for.
        store: finished parts.
        say: told what is done and what comes next.
    """

    request: Comparison
    dense: LoadedModel
    layerwise: LayerwiseModel
    run: Run
    scored: Windows
    held_out: Windows
    corpora: dict[str, Windows]
    repairs: tuple[str, ...]
    skipped: tuple[dict[str, Any], ...]
    tasks: LoadedTasks | None
    store: Store
    say: Say

    @property
    def fit_windows(self) -> Windows:
        """Windows that repairs are fitted on."""
        return self.scored.first(self.request.calibration.num_fit_windows)


@dataclass(frozen=True)
class Cell:
    """Layers chosen one way, to be repaired in several."""

    layers: int
    select: str
    spans: tuple[Span, ...]
    repairs: tuple[str, ...]


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
    command: str | None = None,
) -> dict[str, Any]:
    """Measure every selection and every repair at every number of layers.

    Scores are swept once, one sweep a cut gathers the evidence from which all its repairs are
    fitted, and nothing is written but results: no cell needs a checkpoint. Finished parts are kept
    in ``out``; the same call goes on where an interrupted one stopped.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a causal language model in memory.
        request: what to compare.
        out: folder for ``results.json`` and the parts.
        tokenizer: for a model in memory.
        data: calibration text instead of the recipe's.
        eval_data: corpora by name, beside those that the request names.
        options: how to run.
        revision: of a model on the hub.
        overwrite: replace another comparison's results.
        progress: told of every window.
        say: told what is done and what comes next.
        command: as it should stand in the report.

    Returns:
        The results, as in ``results.json``.

    Raises:
        GhostlayersError: bad input or numbers; see `ghostlayers.errors`.
    """
    bench = _prepare(
        model, request, Path(out), tokenizer, data, eval_data, options, revision, overwrite,
        progress, say,
    )  # fmt: skip
    speed = probe(bench.layerwise, bench.scored)
    _say_estimate(bench, speed, _expected_jobs(bench), chosen=False)
    dense_part = _dense(bench)
    chosen, tables = _choose(bench)
    _say_estimate(bench, speed, _jobs(chosen), chosen=True)
    parts = [dense_part]
    for index, (spans, members) in enumerate(chosen.items()):
        key = format_layers(removed_layers(spans))
        bench.say(f"Cut {index + 1} of {len(chosen)}: layers {key}")
        parts.append(_cut(bench, spans, members))
    results = cells.assemble(
        _header(bench, command), dense_part, parts[1:], list(chosen.values()), tables
    )
    results["correlations"] = correlations(results)
    return bench.store.put("results", results)


def _prepare(
    model: Any,
    request: Comparison,
    out: Path,
    tokenizer: Any,
    data: Documents | None,
    eval_data: Mapping[str, Documents] | None,
    options: RunOptions | None,
    revision: str | None,
    overwrite: bool,
    progress: Progress | None,
    say: Say | None,
) -> Bench:
    run = Run(options or RunOptions(), progress or Silent(), memo={})
    opened = open_tasks(request.tasks, tasks_path=request.tasks_path) if request.tasks else None
    dense = open_model(model, tokenizer, run.options, revision, surgery_follows=True)
    recipe = dataclasses.replace(
        request.calibration, layers=max(request.layers), remove=None, repair="ghost"
    )
    layerwise = check_request(dense, recipe)
    kept, skipped = _possible_repairs(dense, request)
    corpus, windows = read_calibration(dense, recipe, data)
    scored, held_out = windows.split_at(recipe.windows)
    corpora = _read_corpora(dense, request, eval_data or {})
    identity = {
        "request": request.to_dict(),
        "model": _fingerprint(dense),
        "calibration": corpus.sha256(),
        "evaluation": {name: _hash_windows(each) for name, each in corpora.items()},
    }
    store = Store(out, identity, overwrite=overwrite)
    return Bench(
        request, dense, layerwise, run, scored, held_out, corpora, kept, skipped, opened, store,
        say or _ignore,
    )  # fmt: skip


def _ignore(text: str) -> None:
    del text


def _possible_repairs(
    dense: LoadedModel, request: Comparison
) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """Repairs whose features the model has; one that was asked for by name must be among them."""
    kept, skipped = [], []
    for name in request.repair_names():
        try:
            check_method(dense.model, find_method(name))
        except InputError as error:
            if request.named(name):
                raise
            skipped.append({"repair": name, "reason": str(error)})
            continue
        kept.append(name)
    return tuple(kept), tuple(skipped)


def _read_corpora(
    dense: LoadedModel, request: Comparison, extra: Mapping[str, Documents]
) -> dict[str, Windows]:
    recipe = request.calibration
    separators = list(request.eval_separators)
    if len(separators) == 1:
        separators *= len(request.eval_data)
    sources: list[tuple[Documents, str]] = list(zip(request.eval_data, separators, strict=True))
    named = {str(source): (source, joined) for source, joined in sources}
    named.update({name: (source, text.BLANK_LINE) for name, source in extra.items()})
    found = {}
    for name, (source, separator) in named.items():
        corpus = text.load_corpus(
            source, use="evaluation", text_column=recipe.text_column, separator=separator,
            max_characters=text.characters_for(
                source, request.max_windows, recipe.sequence_length
            ),
        )  # fmt: skip
        found[name] = tokens.make_windows(
            corpus, dense.tokenizer, sequence_length=recipe.sequence_length, bos=recipe.bos,
            count=request.max_windows,
        )  # fmt: skip
    return found


def _fingerprint(dense: LoadedModel) -> str:
    """A hash of the config and of some weights of every parameter."""
    digest = hashlib.sha256(dense.model.config.to_json_string().encode())
    for name, parameter in dense.model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _hash_windows(windows: Windows) -> str:
    return hashlib.sha256(windows.input_ids.numpy().tobytes()).hexdigest()


def _dense(bench: Bench) -> dict[str, Any]:
    """The untouched model: losses, speed, continuation, tasks."""
    done = bench.store.get("dense")
    if done is not None:
        return done
    bench.say("Measuring the dense model")
    losses = {
        name: cuts.measure_cuts(
            bench.layerwise, windows, {}, batch_size=bench.run.options.batch_size,
            divergence=True, progress=bench.run.progress, description=f"Dense on {Path(name).name}",
        )[cuts.DENSE]
        for name, windows in bench.corpora.items()
    }  # fmt: skip
    model = cells.describe_model(bench.dense.model, bench.dense.tokenizer, bench.request)
    tasks = _tasks(bench, "dense", "dense", bench.dense.model)
    return bench.store.put("dense", {"losses": _rows(losses), "model": model, "tasks": tasks})


def _tasks(bench: Bench, key: str, repair: str, model: Any) -> list[dict[str, Any]]:
    """A model's accuracies, kept as soon as they are known: they take longest."""
    request = bench.request
    wanted = request.task_repair or (repair,)
    if bench.tasks is None or repair not in {"dense", *wanted}:
        return []
    name = f"tasks {key} {repair}"
    done = bench.store.get(name)
    if done is None:
        rows = run_tasks(
            model, bench.dense.tokenizer, bench.tasks, request.limit, bench.run.progress
        )
        done = bench.store.put(name, {"rows": rows})
    found: list[dict[str, Any]] = done["rows"]
    return found


def _rows(losses: Mapping[str, LossSums]) -> dict[str, Any]:
    return {
        name: {
            "num_tokens": sums.num_tokens,
            "loss_nats": sums.loss_nats,
            "kl_nats": sums.kl_nats,
            "greedy_agreement": sums.agreement,
        }
        for name, sums in losses.items()
    }


def _choose(bench: Bench) -> tuple[dict[tuple[Span, ...], list[Cell]], dict[str, Any]]:
    """Which layers go, for every selection and number; equal choices share their work."""
    chosen: dict[tuple[Span, ...], list[Cell]] = {}
    tables: dict[str, Any] = {}
    for layers in sorted(set(bench.request.layers)):
        for select in bench.request.select:
            if select == EVERY:
                for span in candidate_spans(bench.layerwise.num_layers, layers):
                    name = f"{EVERY}:{format_layers(span.layers)}"
                    _add(chosen, Cell(layers, name, (span,), bench.repairs))
                continue
            spans, table = _choose_one(bench, layers, select)
            _add(chosen, Cell(layers, select, spans, bench.repairs))
            known = tables.get(str(layers))
            if table is not None and (known is None or _measured(table) > _measured(known)):
                tables[str(layers)] = table
    if bench.request.yardstick and "ghost" in bench.repairs:
        for layers in _yardsticks(bench.request.layers):
            for select in [each for each in bench.request.select if each != EVERY]:
                spans, _ = _choose_one(bench, layers, select)
                _add(chosen, Cell(layers, select, spans, ("ghost",)))
    return chosen, tables


def _yardsticks(layers: Sequence[int]) -> list[int]:
    """One layer less than asked for, where that is not asked for itself."""
    return sorted({count - 1 for count in layers if count > 1} - set(layers))


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
        spans, table = steps.choose_spans(
            bench.run, bench.layerwise, bench.scored, bench.held_out, recipe,
            make_fitting(bench.dense, recipe),
        )  # fmt: skip
        done = bench.store.put(
            key,
            {
                "spans": [[span.start, span.stop] for span in spans],
                "table": None if table is None else table_to_dict(table),
            },
        )
    return tuple(Span(start, stop) for start, stop in done["spans"]), done["table"]


def _cut(bench: Bench, spans: tuple[Span, ...], members: Sequence[Cell]) -> dict[str, Any]:
    """All repairs of one cut: fitted from one sweep, measured on every corpus, built once each."""
    wanted = _wanted(members)
    key = _cut_key(spans, wanted)
    done = bench.store.get(key)
    if done is not None:
        return done
    names, skipped = _fitting_names(bench, spans, wanted)
    start = time.monotonic()
    fittings = {name: _fitting(bench, name) for name in names}
    fits = fit_many(
        bench.layerwise, bench.fit_windows, spans, fittings,
        batch_size=bench.run.options.batch_size, progress=bench.run.progress,
    )  # fmt: skip
    seconds = time.monotonic() - start
    losses = _losses(bench, fits)
    held_out = _held_out(bench, fits)
    distances = cuts.stream_distances(
        bench.layerwise, bench.held_out.first(DISTANCE_WINDOWS), fits,
        stored_dtype=bench.dense.stored_dtype, batch_size=bench.run.options.batch_size,
    ) if len(bench.held_out) else {name: {} for name in names}  # fmt: skip
    models = _models(bench, spans, fits)
    part = {
        "fit_seconds": seconds,
        "skipped": skipped,
        "repairs": {
            name: {
                "losses": {corpus: each[name] for corpus, each in losses.items()},
                "held_out_loss_nats": held_out.get(name),
                "worse_than_none": _worse(held_out, name),
                "gaps": [cells.describe_gap(span, fits[name][span]) for span in spans],
                "boundary_residual": [[b, v] for b, v in sorted(distances[name].items())],
                "operators": [
                    each
                    for span in spans
                    if (each := cells.describe_operator(span, fits[name][span]))
                ],
                "tasks": models[name].pop("tasks"),
                "model": models[name],
            }
            for name in names
        },
    }
    return bench.store.put(key, part)


def _operators(repairs: Mapping[Span, Repair]) -> list[dict[str, Any]]:
    found = (cells.describe_operator(span, repair) for span, repair in repairs.items())
    return [each for each in found if each is not None]


def _fitting_names(
    bench: Bench, spans: tuple[Span, ...], wanted: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Repairs that can act on this cut; a cut at layer 0 has no kept layer before it."""
    names, skipped = [], []
    for name in wanted:
        try:
            check_method(bench.dense.model, find_method(name), spans)
        except InputError as error:
            skipped.append({"repair": name, "reason": str(error)})
            continue
        names.append(name)
    return names, skipped


def _fitting(bench: Bench, name: str) -> Fitting:
    recipe = dataclasses.replace(bench.request.calibration, layers=1, remove=None, repair=name)
    return make_fitting(bench.dense, recipe)


def _losses(bench: Bench, fits: Mapping[str, Mapping[Span, Repair]]) -> dict[str, dict[str, Any]]:
    """By corpus and repair."""
    return {name: _measure(bench, name, each, fits) for name, each in bench.corpora.items()}


def _measure(
    bench: Bench, corpus: str, windows: Windows, models: Mapping[str, Mapping[Span, Repair]]
) -> dict[str, Any]:
    losses = cuts.measure_cuts(
        bench.layerwise,
        windows,
        models,
        stored_dtype=bench.dense.stored_dtype,
        batch_size=bench.run.options.batch_size,
        progress=bench.run.progress,
        description=f"{len(models)} repairs on {Path(corpus).name}",
    )
    return _rows(losses)


def _held_out(bench: Bench, fits: Mapping[str, Mapping[Span, Repair]]) -> dict[str, float]:
    """Losses on windows that nothing was fitted on; warns of repairs that are worse than none."""
    if not len(bench.held_out):
        return {}
    spans = tuple(next(iter(fits.values())))
    models = {**fits, "none": cuts.unrepaired(spans)}
    rows = _measure(bench, "held-out calibration windows", bench.held_out, models)
    losses = {name: rows[name]["loss_nats"] for name in models}
    for name in fits:
        if _worse(losses, name):
            bench.say(
                f"Warning: {name} is worse than no repair on held-out text ({losses[name]:.3f} "
                f"against {losses['none']:.3f} nats)."
            )
    return losses


def _worse(held_out: Mapping[str, float], name: str) -> bool:
    return name != "none" and name in held_out and held_out[name] >= held_out["none"]


def _models(
    bench: Bench, spans: tuple[Span, ...], fits: Mapping[str, Mapping[Span, Repair]]
) -> dict[str, Any]:
    """Size, speed, continuation and tasks of every repaired model, built one at a time.

    Models whose repairs have the same shapes take the same time, so one of each is measured.
    """
    found: dict[str, Any] = {}
    timed: dict[Any, dict[str, Any]] = {}
    progress = bench.run.progress
    with progress.stage("Timing and writing", len(fits)) as advance:
        for name, repairs in fits.items():
            model = surgery.prune_layers(
                bench.dense.model, spans, repairs, stored_dtype=bench.dense.stored_dtype
            )
            shape = cells.runtime_shape(repairs.values())
            known = timed.get(shape)
            described = cells.describe_model(model, bench.dense.tokenizer, bench.request, known)
            timed.setdefault(shape, {key: described[key] for key in cells.SPEED_KEYS})
            described["checkpoint"] = cells.checkpoint_kind(find_method(name), repairs.values())
            described["tasks"] = _tasks(bench, str(spans), name, model)
            described["added_parameters"] = sum(each.num_parameters for each in repairs.values())
            found[name] = described
            advance(1)
    return found


Jobs = list[tuple[tuple[Span, ...], tuple[str, ...]]]
"""Cuts, and the repairs of each."""


def _jobs(chosen: Mapping[tuple[Span, ...], Sequence[Cell]]) -> Jobs:
    return [(spans, _wanted(members)) for spans, members in chosen.items()]


def _wanted(members: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for member in members for name in member.repairs))


def _expected_jobs(bench: Bench) -> Jobs:
    """Before anything is chosen: every choice a cut of its own, in the middle of the model."""
    request, depth = bench.request, bench.layerwise.num_layers
    counts = dict.fromkeys(request.layers, bench.repairs)
    if request.yardstick:
        counts.update(dict.fromkeys(_yardsticks(request.layers), ("ghost",)))
    return [
        ((Span((depth - count) // 2, (depth + count) // 2),), repairs)
        for count, repairs in counts.items()
        for _ in request.select
    ]


def _cut_key(spans: Sequence[Span], names: Sequence[str]) -> str:
    return f"cut {format_layers(removed_layers(spans))} {' '.join(names)}"


def _say_estimate(bench: Bench, speed: Speed, jobs: Jobs, *, chosen: bool) -> None:
    """Predicted minutes of what is not done yet."""
    depth = bench.layerwise.num_layers
    windows = sum(map(len, bench.corpora.values())) + len(bench.held_out)
    total = 0.0
    if not chosen:
        counts = {(len(spans[0]), index) for index, (spans, _) in enumerate(jobs)}
        total += SWEEP_COST * len(counts) * len(bench.scored) * speed.layer * depth
        total += windows * (speed.layer * depth + speed.head)
    for spans, names in jobs:
        if not chosen or bench.store.get(_cut_key(spans, names)) is None:
            total += cut_seconds(speed, _workload(bench, names, windows), spans, depth)
    bound = "" if chosen else "at most "
    bench.say(f"About {bound}{max(1, round(total / 60))} minutes to go on this machine.")


def _workload(bench: Bench, names: Sequence[str], windows: int) -> Workload:
    config = bench.dense.model.config
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", 4 * hidden)
    widths = {"x": hidden, "norm": hidden, "m": hidden, "o": hidden, "z": wide, "phi": wide}
    needs = Needs(("x",))
    for name in names:
        needs = needs | find_method(name).needs
    forwards = (5.0 if bench.request.speed else 0.0) * 0.4 + (
        bench.request.new_tokens / 20 if bench.request.prompt else 0.0
    )
    return Workload(
        fit_windows=len(bench.fit_windows),
        eval_windows=windows,
        features=sum(widths.get(name, 1) for name in gathered_features(needs)),
        repairs=len(names) + 1,
        tokens=bench.request.calibration.sequence_length,
        extra_forwards=forwards,
    )


def _header(bench: Bench, command: str | None) -> dict[str, Any]:
    model, config = bench.dense.model, bench.dense.model.config
    return {
        "schema": SCHEMA,
        "ghostlayers": checkpoint.versions()["ghostlayers"],
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": dict(checkpoint.versions()),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": str(bench.layerwise.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "model": {
            "name": bench.dense.base.title or Path(bench.dense.base.name).name,
            "num_layers": bench.layerwise.num_layers,
            "hidden_size": config.hidden_size,
            "num_parameters": sum(each.numel() for each in model.parameters()),
            "licence": bench.dense.base.licence,
        },
        "recipe": {**bench.request.calibration.to_dict(), "fit_windows": len(bench.fit_windows)},
        "comparison": {
            key: value for key, value in bench.request.to_dict().items() if key != "calibration"
        },
        "command": command,
        "prompt": bench.request.prompt,
        "corpora": [
            {
                "name": Path(name).name,
                "num_windows": len(windows),
                "available_windows": windows.available,
                "sequence_length": windows.sequence_length,
                "bos": windows.bos,
                "calibration_overlap": len(set(windows.documents) & set(bench.scored.documents)),
            }
            for name, windows in bench.corpora.items()
        ],
        "skipped": list(bench.skipped),
    }
