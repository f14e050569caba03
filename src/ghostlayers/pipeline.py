"""The map: text -> tokens -> scores -> layers that go -> closed-form repair -> surgery -> proof.

Each line of `prune` is one of these steps.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ghostlayers.calibration import journal, steps
from ghostlayers.calibration.fingerprint import run_request
from ghostlayers.calibration.fitting import make_fitting, sums_bytes, tokens_bytes
from ghostlayers.calibration.steps import Run
from ghostlayers.checkpoint import records
from ghostlayers.checkpoint.record import make_record
from ghostlayers.evaluation import (
    EvaluationResult,
    LoadedTasks,
    TaskReport,
    compare_tasks,
    evaluate_tasks,
    evaluate_windows,
    open_tasks,
)
from ghostlayers.model import multimodal
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import check_causal, leaves_models_alone
from ghostlayers.plan.probe import probe_blindly
from ghostlayers.plan.saving import CHECKPOINT, Output
from ghostlayers.plan.stages import plan_prune, seconds_since_start
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import (
    Documents,
    check_request,
    check_result,
    make_recipe,
    open_model,
    read_calibration,
    read_evaluation,
)
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime.machine import versions
from ghostlayers.runtime.parallel import check_same, world
from ghostlayers.runtime.progress import Progress, Silent
from ghostlayers.selection import ScoreTable
from ghostlayers.surgery import removal
from ghostlayers.surgery.stock_layer import as_stock_layers
from ghostlayers.text import corpora, tokens


@leaves_models_alone
def prune(
    model: Any,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    data: Documents | None = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    keep: str | Path | None = None,
    show_text: Callable[[str], None] | None = None,
    show_plan: Callable[[Plan], None] | None = None,
    output: Output | None = None,
    progress: Progress | None = None,
    **choices: Any,
) -> PrunedModel:
    """Remove decoder layers from a language model and repair every gap in closed form.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a causal language model in memory.
        recipe: what to do; its fields can also be given by name, such as ``layers=7``.
        tokenizer: for a model in memory.
        data: calibration text instead of the recipe's: documents, or a name or path.
        options: how to do it.
        revision: of a model on the hub.
        keep: a folder for what the run has found so far: the same call goes on from it after an
            interruption, and ends with the same bits. `PrunedModel.save` deletes it.
        show_text: told how the calibration text begins.
        show_plan: told what the run will take, once all is checked and before anything is computed.
        output: what will be made of the result afterwards, for the plan; a checkpoint beside
            ``keep`` if not given.
        progress: told what is being done.
        choices: fields of the recipe.

    Returns:
        The pruned model with its evidence; `PrunedModel.save` writes it.

    Raises:
        GhostlayersError: bad input or numbers; see `ghostlayers.errors`.
    """
    recipe = make_recipe(recipe, choices)
    run = Run(_options_for(recipe, options), progress or Silent())
    dense = open_model(model, tokenizer, run.options, revision, surgery_follows=True)
    started = seconds_since_start()
    check_result(dense, recipe)
    corpus, windows, held_out = read_calibration(dense, recipe, data, progress=run.progress)
    check_causal(dense)
    if show_text is not None:
        show_text(windows.preview)
    fitting = make_fitting(dense, recipe)
    measured_on = held_out.first(recipe.num_held_out_windows)
    if show_plan is not None:
        output = output or Output(folder=None if keep is None else Path(keep).parent)
        show_plan(_plan(dense, recipe, run.options, started, output))

    with _keeping(keep, dense, recipe, windows.joined_with(held_out), run.options):
        found = steps.choose_spans(run, dense, windows, held_out, recipe, fitting)
        spans, table = found.spans, found.table
        check_same("choice of layers", spans)
        fit_windows = windows.first(recipe.num_fit_windows)
        dense.residency.memory.spent += sums_bytes(dense, fitting, spans)
        dense.residency.memory.spent += tokens_bytes(
            dense, fitting, fit_windows.input_ids.numel(), spans
        )
        repairs = found.repairs or steps.fit_repairs(run, dense, fit_windows, spans, fitting)
        evidence = steps.measure_evidence(run, dense, measured_on, repairs)
        births = steps.find_births(run, dense, windows, spans, table)
    pruned = removal.prune_layers(dense, spans, repairs)
    if recipe.export == "stock-layer":
        pruned = as_stock_layers(dense, pruned, spans, repairs)

    return PrunedModel(
        model=multimodal.whole_of(pruned),
        dense=dense,
        recipe=recipe,
        spans=spans,
        num_layers=dense.num_layers,
        repairs=repairs,
        table=table,
        evidence=evidence,
        births=births,
        kept_in=None if keep is None else Path(keep),
        record=multimodal.described(dense.network)
        | make_record(
            base=dense.base,
            recipe=recipe,
            corpus=corpus,
            windows=windows,
            spans=spans,
            num_layers=dense.num_layers,
            repairs=repairs,
            table=table,
            evidence=evidence,
            measured_on=(corpus.name, measured_on),
            versions=versions(),
        ),
    )


def _options_for(recipe: Recipe, options: RunOptions | None) -> RunOptions:
    """A preset's type, too, unless the caller names one."""
    return dataclasses.replace(options or RunOptions(), preset=recipe.preset)


def plan(
    model: Any,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    output: Output | None = CHECKPOINT,
    **choices: Any,
) -> Plan:
    """What `prune` would take on this machine: time, memory, disk and arithmetic of every stage.

    Nothing is computed but a probe of a second or two on random tokens; no text is read. Arguments
    as for `prune`; ``output`` says what is written of the result (None: nothing), and where: that
    disk is timed for a large model.

    Raises:
        GhostlayersError: a request that cannot work.
    """
    recipe = make_recipe(recipe, choices)
    options = _options_for(recipe, options)
    dense = open_model(model, tokenizer, options, revision, surgery_follows=True)
    started = seconds_since_start()
    check_result(dense, recipe)
    return _plan(dense, recipe, options, started, output)


def _plan(
    dense: DenseModel,
    recipe: Recipe,
    options: RunOptions,
    started: float,
    output: Output | None,
) -> Plan:
    speed = probe_blindly(dense, recipe.sequence_length, options.batch_size)
    return plan_prune(
        dense,
        recipe,
        speed,
        started=started,
        output=output,
        processes=world().size,
    )


@contextlib.contextmanager
def _keeping(
    folder: str | Path | None,
    loaded: DenseModel,
    recipe: Recipe,
    windows: tokens.Windows,
    options: RunOptions,
) -> Iterator[None]:
    """Keep a run's passes in a folder, if there is one; check that all processes run the same."""
    if folder is None and world().size == 1:  # nobody asks what the run is
        yield
        return
    request = run_request(loaded, recipe, windows, options)
    check_same("request", request)
    if folder is None:
        yield
        return
    with journal.keeping(Path(folder), request):
        yield


@leaves_models_alone
def score(
    model: Any,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any = None,
    data: Documents | None = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    show_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    **choices: Any,
) -> ScoreTable:
    """Score every layer, and every contiguous span of ``layers`` layers.

    Arguments as for `prune`. What only some selections need is measured when the recipe selects
    so: losses after repair of the shortlist of ``recoverable``, or the importance of every layer.

    Raises:
        GhostlayersError: bad input or numbers.
    """
    recipe = make_recipe(recipe, choices)
    run = Run(_options_for(recipe, options), progress or Silent())
    dense = open_model(model, tokenizer, run.options, revision)
    check_request(dense, recipe, surgery_follows=False)
    _, windows, held_out = read_calibration(dense, recipe, data, progress=run.progress)
    check_causal(dense)
    if show_text is not None:
        show_text(windows.preview)
    fitting = make_fitting(dense, recipe)
    return steps.measure_table(run, dense, windows, held_out, recipe, fitting, residuals=True)


@leaves_models_alone
def evaluate(
    model: Any,
    *,
    data: Documents | Sequence[Documents],
    against: Any = None,
    tokenizer: Any = None,
    sequence_length: int = 2048,
    max_windows: int | None = None,
    bos: tokens.BosPolicy = "auto",
    text_column: str | None = None,
    separators: Sequence[str] = (corpora.BLANK_LINE,),
    options: RunOptions | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> list[EvaluationResult]:
    """Perplexity of any causal language model on corpora, and its divergence from a dense one.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a model in memory.
        data: one corpus or several; a list of strings is several names.
        against: a dense model to compare with, given in the same ways.
        tokenizer: for a model in memory.
        sequence_length: tokens a window.
        max_windows: evaluate the first so many windows of each corpus.
        bos: beginning-of-sequence policy.
        text_column: the column that holds the text.
        separators: joins the documents: one for all corpora, or one each.
        options: how to do it.
        revision: of a model on the hub.
        progress: told what is being done.

    Returns:
        One result a corpus, in the order given.

    Raises:
        GhostlayersError: bad input.
    """
    run = Run(options or RunOptions(), progress or Silent())
    sources = [data] if isinstance(data, (str, Path, corpora.Corpus)) else list(data)
    joins = corpora.one_separator_each(separators, len(sources))
    opened = open_model(model, tokenizer, run.options, revision)
    dense = None if against is None else open_model(against, opened.tokenizer, run.options)
    for each in (opened, dense):
        if each is not None:
            check_causal(each)
    tokens.check_sequence_length(opened.network.config, sequence_length)
    calibrated_on = records.calibration_documents(opened.base.name)
    results = []
    for source, separator in zip(sources, joins, strict=True):
        corpus, windows = read_evaluation(
            source,
            opened.tokenizer,
            separator=separator,
            text_column=text_column,
            sequence_length=sequence_length,
            max_windows=max_windows,
            bos=bos,
            progress=run.progress,
        )
        tokens.check_tokens(opened.network, opened.tokenizer, windows)
        results.append(
            evaluate_windows(
                opened.network,
                windows,
                corpus=corpus.name,
                against=None if dense is None else dense.network,
                batch_size=run.options.batch_size or 8,
                complete=corpus.complete,
                calibration=calibrated_on,
                progress=run.progress,
            )
        )
    return results


@leaves_models_alone
def evaluate_on_tasks(
    model: Any,
    tasks: Sequence[str] | LoadedTasks,
    *,
    against: Any = None,
    tasks_path: str | Path | None = None,
    trust_tasks: bool = False,
    limit: int | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> TaskReport:
    """Accuracy on zero-shot tasks of lm-evaluation-harness, compared pair by pair with a model.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a model in memory.
        tasks: names of the harness's tasks, or what `open_tasks` returned.
        against: a model to compare with, given in the same ways.
        tasks_path: a folder of task files, such as ones that read local data.
        trust_tasks: let them run code.
        limit: the first so many documents of each task.
        seed: for few-shot examples and shuffled options; None is the harness's own.
        tokenizer: for a model in memory.
        options: how to do it.
        revision: of a model on the hub.
        progress: told what is being done.

    Raises:
        GhostlayersError: bad input, or lm-evaluation-harness is not installed.
    """
    run = Run(options or RunOptions(), progress or Silent())
    if not isinstance(tasks, LoadedTasks):
        tasks = open_tasks(tasks, tasks_path=tasks_path, trust_tasks=trust_tasks, seed=seed)
    opened = open_model(model, tokenizer, run.options, revision)
    dense = None if against is None else open_model(against, opened.tokenizer, run.options)
    for each in (opened, dense):
        if each is not None:
            check_causal(each)
    ours, *theirs = [
        evaluate_tasks(
            each.network,
            each.tokenizer,
            tasks,
            limit=limit,
            batch_size=run.options.batch_size or 8,
            progress=run.progress,
        )
        for each in (opened, dense)
        if each is not None
    ]
    if not theirs:
        return TaskReport(tuple(ours))
    return TaskReport(tuple(ours), tuple(theirs[0]), tuple(compare_tasks(ours, theirs[0])))
