"""What people ask for: prune, plan and score, a few verbs of a `Study` each, and evaluate."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghostlayers.budgets.budgets import budget_of, check_what_follows
from ghostlayers.budgets.decide import settled
from ghostlayers.budgets.planned import plan_run
from ghostlayers.calibration.passes import Runner
from ghostlayers.checkpoint import records
from ghostlayers.checkpoint.output import Output
from ghostlayers.evaluation import (
    EvaluationResult,
    LoadedTasks,
    TaskReport,
    compare_tasks,
    evaluate_tasks,
    evaluate_windows,
    open_tasks,
)
from ghostlayers.evaluation.written import CONTINUATIONS, WritingReport, write_and_measure
from ghostlayers.model.alike import check_same_tokens
from ghostlayers.model.causal import check_causal
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import leaves_models_alone
from ghostlayers.plan.expected import seconds_since_start
from ghostlayers.plan.saving import CHECKPOINT
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import (
    Documents,
    ModelSource,
    Tokenizer,
    check_asked,
    make_recipe,
    open_model,
    read_evaluation,
)
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.selection import ScoreTable
from ghostlayers.study import Study
from ghostlayers.text import corpora, tokens


@leaves_models_alone
def prune(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    tokenizer: "Tokenizer | None" = None,
    data: Documents | None = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    keep: str | Path | None = None,
    show_text: Callable[[str], None] | None = None,
    show_plan: Callable[[Plan], None] | None = None,
    output: Output | None = None,
    **choices: Any,
) -> PrunedModel:
    """Remove decoder layers from a language model and repair every gap in closed form.

    Arguments as for `Study.open`. Besides, ``keep`` is a folder for what the run has done so far:
    the same call goes on from it after an interruption, and ends with the same bits;
    `PrunedModel.save` deletes it. ``show_text`` is told how the calibration text begins, and
    ``show_plan``, once all is checked and before anything is computed, what the run will take;
    ``output`` says what will be made of the result, so that what could not be is refused early: a
    checkpoint beside ``keep`` if it is not given.

    Returns:
        The pruned model with its evidence; `PrunedModel.save` writes it.

    Raises:
        GhostlayersError: bad input or numbers; see `ghostlayers.errors`.
    """
    study = Study.open(
        model,
        recipe,
        tokenizer=tokenizer,
        data=data,
        options=options,
        revision=revision,
        result_follows=True,
        output=output,
        **choices,
    )
    if show_text is not None:
        show_text(study.windows.preview)
    with study.keeping(keep) as keeping:
        sure = keeping.settled()
        if show_plan is not None:
            folder = None if keep is None else Path(keep).parent
            show_plan(sure.plan(output or Output(folder=folder)))
        cut = sure.choose()
        (output or CHECKPOINT).check_cut(study.dense, study.recipe, cut.spans)
        cut = sure.choose_repair(cut)
        (repairs,) = sure.fit(cut).values()
        return sure.build(cut, repairs)


def plan(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    output: Output | None = CHECKPOINT,
    **choices: Any,
) -> Plan:
    """What `prune` would take on this machine: time, memory, disk and arithmetic, line by line.

    Nothing is computed but a probe of a second or two on random tokens, and what a budget of speed
    times; no text is read. Arguments as for `Study.open` and `prune`; ``output`` says what is
    written of the result (None: nothing), and where: that disk is timed for a large model.

    Raises:
        GhostlayersError: a request that cannot work.
    """
    recipe = make_recipe(recipe, choices)
    options = dataclasses.replace(options or RunOptions(), preset=recipe.preset)
    dense = open_model(model, tokenizer, options, revision, surgery_follows=True)
    check_asked(recipe)
    check_what_follows(dense, recipe, output)
    budget = None
    if recipe.wish is not None and recipe.max_loss is None:
        runner = Runner(dense, options.batch_size)
        budget = budget_of(runner, recipe, output or CHECKPOINT)
        recipe = settled(recipe, budget.fewest())
    return plan_run(dense, recipe, options, seconds_since_start(), output, budget)


@leaves_models_alone
def score(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    tokenizer: "Tokenizer | None" = None,
    data: Documents | None = None,
    options: RunOptions | None = None,
    revision: str | None = None,
    show_text: Callable[[str], None] | None = None,
    **choices: Any,
) -> ScoreTable:
    """Score every layer, and every contiguous span of ``layers`` layers.

    Arguments as for `Study.open`. What only some selections need is measured when the recipe
    selects so: losses after repair of the shortlist of ``recoverable``, or the importance of every
    layer.

    Raises:
        GhostlayersError: bad input or numbers.
    """
    recipe = make_recipe(recipe, choices)
    check_asked(recipe)
    study = Study.open(
        model,
        recipe,
        tokenizer=tokenizer,
        data=data,
        options=options,
        revision=revision,
        surgery_follows=False,
    )
    if show_text is not None:
        show_text(study.windows.preview)
    return study.scores()


@leaves_models_alone
def evaluate(
    model: ModelSource,
    *,
    data: Documents | Sequence[Documents],
    against: "ModelSource | None" = None,
    tokenizer: "Tokenizer | None" = None,
    sequence_length: int = 2048,
    max_windows: int | None = None,
    bos: tokens.BosPolicy = "auto",
    text_column: str | None = None,
    separators: Sequence[str] = (corpora.BLANK_LINE,),
    options: RunOptions | None = None,
    revision: str | None = None,
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

    Returns:
        One result a corpus, in the order given.

    Raises:
        GhostlayersError: bad input.
    """
    options = options or RunOptions()
    sources = [data] if isinstance(data, (str, Path, corpora.Corpus)) else list(data)
    joins = corpora.one_separator_each(separators, len(sources))
    models = _open(model, against, tokenizer, options, revision)
    opened, dense = models[0], models[1:]
    for other in dense:
        check_same_tokens(opened, other)
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
        )
        tokens.check_tokens(opened.network, opened.tokenizer, windows)
        results.append(
            evaluate_windows(
                opened.network,
                windows,
                corpus=corpus.name,
                against=dense[0].network if dense else None,
                batch_size=options.batch_size or 8,
                complete=corpus.complete,
                calibration=calibrated_on,
            )
        )
    return results


@leaves_models_alone
def continue_texts(
    model: ModelSource,
    evaluated: Sequence[EvaluationResult],
    *,
    against: ModelSource,
    continuations: int = CONTINUATIONS,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
    revision: str | None = None,
) -> WritingReport:
    """What a model and a dense one write behind stretches of the texts that were evaluated.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a model in memory.
        evaluated: what `evaluate` returned of it.
        against: the dense model, given in the same ways.
        continuations: stretches that are continued, of all texts together.
        tokenizer: for a model in memory.
        options: how to do it.
        revision: of a model on the hub.

    Raises:
        GhostlayersError: bad input.
    """
    models = _open(model, against, tokenizer, options or RunOptions(), revision)
    opened, dense = models
    check_same_tokens(opened, dense)
    return write_and_measure(
        opened.network,
        dense.network,
        opened.tokenizer,
        [result.windows for result in evaluated if result.windows is not None],
        continuations,
    )


def _open(
    model: ModelSource,
    against: "ModelSource | None",
    tokenizer: "Tokenizer | None",
    options: RunOptions,
    revision: str | None,
) -> list[DenseModel]:
    """The model, and the one that it is compared with, where there is one."""
    models = [open_model(model, tokenizer, options, revision)]
    if against is not None:
        models.append(open_model(against, models[0].tokenizer, options))
    for opened in models:
        check_causal(opened)
    return models


@leaves_models_alone
def evaluate_on_tasks(
    model: ModelSource,
    tasks: Sequence[str] | LoadedTasks,
    *,
    against: "ModelSource | None" = None,
    tasks_path: str | Path | None = None,
    trust_tasks: bool = False,
    limit: int | None = None,
    seed: int | None = None,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
    revision: str | None = None,
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

    Raises:
        GhostlayersError: bad input, or lm-evaluation-harness is not installed.
    """
    options = options or RunOptions()
    if not isinstance(tasks, LoadedTasks):
        tasks = open_tasks(tasks, tasks_path=tasks_path, trust_tasks=trust_tasks, seed=seed)
    models = _open(model, against, tokenizer, options, revision)
    ours, *theirs = [
        evaluate_tasks(
            opened.network,
            opened.tokenizer,
            tasks,
            limit=limit,
            batch_size=options.batch_size or 8,
        )
        for opened in models
    ]
    if not theirs:
        return TaskReport(tuple(ours))
    return TaskReport(tuple(ours), tuple(theirs[0]), tuple(compare_tasks(ours, theirs[0])))
