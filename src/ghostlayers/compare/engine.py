"""Running a comparison: the model is opened once, every part is measured once and kept at once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ghostlayers.compare.assembly import assemble, header
from ghostlayers.compare.choices import Choice, choose, jobs_of, spans_in
from ghostlayers.compare.correlate import correlations
from ghostlayers.compare.experiment import (
    Experiment,
    Say,
    check,
    find_tasks,
    identity,
    open_studies,
    read_texts,
)
from ghostlayers.compare.parts import cut_part, dense_part, preset_part
from ghostlayers.compare.plan import plan_comparison, say_estimate, say_what_is_left
from ghostlayers.compare.request import Comparison
from ghostlayers.compare.store import Store
from ghostlayers.compare.types import Typed, check_asked
from ghostlayers.model.loading import leaves_models_alone
from ghostlayers.plan.probe import Speed, probe
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import Documents, ModelSource, Tokenizer, open_model
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.places import check_apart
from ghostlayers.runtime.shown import one_line
from ghostlayers.spans import format_layers, removed_layers


@leaves_models_alone
def compare(
    model: ModelSource,
    request: Comparison,
    out: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    data: Documents | None = None,
    eval_data: Mapping[str, Documents] | None = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    say: Say | None = None,
    show_plan: Callable[[Plan], bool] | None = None,
) -> dict[str, Any]:
    """Measure every selection and every repair at every number of layers.

    Scores are swept once, one sweep a cut gathers the evidence from which all its repairs are
    fitted, and nothing is written but results: no model needs a checkpoint. Finished parts are kept
    in ``out``; the same call goes on where an interrupted one stopped.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a causal language model in memory.
        request: what to compare.
        out: folder for the finished parts; `files.write_report` puts the tables and the page beside
            them.
        tokenizer: for a model in memory.
        data: calibration text instead of the recipe's.
        eval_data: corpora by name, beside those that the request names.
        options: how to run.
        revision: of a model on the hub.
        overwrite: replace another comparison's results.
        say: told how the calibration text begins, what is done and what comes next.
        show_plan: told before anything is computed what it will take; if it gives False, nothing
            is.

    Returns:
        The results, as ``results.json`` holds them; empty if nothing was computed.

    Raises:
        GhostlayersError: bad input or numbers; see `ghostlayers.errors`.
    """
    out, options, say = Path(out), options or RunOptions(), say or _ignore
    inputs = (model, data, request.calibration.data, *request.eval_data)
    paths = [source for source in inputs if isinstance(source, (str, Path))]
    check_apart({"input": paths}, {"output": out})
    with holding(out):
        check_asked(request.types)
        tasks = find_tasks(request, say)
        dense = open_model(model, tokenizer, options, revision, surgery_follows=True)
        repairs = check(dense, request, say)
        studies = open_studies(dense, request, data=data, options=options)
        texts = read_texts(dense, request, eval_data or {})
        store = Store(out, identity(request, studies, texts), overwrite=overwrite)
        files = Typed(dense, request.types, texts, store)
        experiment = Experiment(request, studies, texts, repairs, tasks, store, say, files)
        say(f"Calibration text: {one_line(experiment.study.windows.preview)}")
        speed = probe(dense, experiment.study.windows)
        if show_plan is not None and not show_plan(plan_comparison(experiment, speed)):
            store.forget()
            return {}
        return _compare_presets(experiment) if request.presets else _compare(experiment, speed)


def _ignore(text: str) -> None:
    del text


def _compare(experiment: Experiment, speed: Speed) -> dict[str, Any]:
    """Each selection's layers, each with all repairs: a part for every cut."""
    say_estimate(experiment, speed)
    dense = dense_part(experiment)
    cuts, tables = choose(experiment)
    jobs = jobs_of(cuts)
    say_what_is_left(experiment, speed, jobs)
    parts = []
    for number, (spans, repairs) in enumerate(jobs, start=1):
        layers = format_layers(removed_layers(spans))
        experiment.say(f"Cut {number} of {len(jobs)}: layers {layers}")
        parts.append(cut_part(experiment, spans, repairs))
    results = assemble(header(experiment), dense, parts, list(cuts.values()), tables)
    return {**results, "correlations": correlations(results)}


def _compare_presets(experiment: Experiment) -> dict[str, Any]:
    """Each method by its own choices: a part for every number of layers and preset."""
    request, dense = experiment.request, dense_part(experiment)
    parts, choices = [], []
    for layers in sorted(set(request.layers)):
        for name in request.presets:
            recipe = request.preset_recipe(name, layers)
            part = preset_part(experiment, name, recipe)
            parts.append(part)
            choices.append([Choice(layers, name, spans_in(part), (str(recipe.repair),))])
    return assemble(header(experiment), dense, parts, choices, {})
