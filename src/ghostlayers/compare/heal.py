"""Healed models in a comparison: every repair that can be saved, trained for the same budget."""

from collections.abc import Mapping
from typing import Any

from ghostlayers.compare.auto import method_named
from ghostlayers.compare.experiment import Experiment
from ghostlayers.evaluation import evaluate_windows
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.outcome import Outcome
from ghostlayers.healing.text import read_text
from ghostlayers.healing.training import Training
from ghostlayers.recipe import HealingRecipe
from ghostlayers.recipe.healing import healing_after
from ghostlayers.repairs.base import Repair
from ghostlayers.spans import Span
from ghostlayers.study import Study
from ghostlayers.surgery import removal

Part = dict[str, Any]


def healing_recipe(experiment: Experiment, study: Study) -> HealingRecipe:
    """How every model of a comparison is trained: on the calibration text.

    Raises:
        RecipeError: the budget is none.
    """
    return healing_after(experiment.request.heal or "", study.recipe)


def heals(experiment: Experiment, repair: str) -> bool:
    """Whether the models of a repair are trained, too."""
    request = experiment.request
    if request.heal is None or not method_named(repair).savable:
        return False
    return repair in (request.heal_repair or (repair,))


def healed_model(
    experiment: Experiment, study: Study, repairs: Mapping[Span, Repair], key: str, name: str
) -> tuple[Any, Part]:
    """A trained network, and what the comparison says of it beside what all models have.

    Args:
        experiment: with the budget.
        study: the model and the text that the repairs were fitted on.
        repairs: one a gap.
        key: of the cut.
        name: of the repair.

    Raises:
        RecipeError: nothing of the model can be trained.
    """
    dense, recipe = study.dense, healing_recipe(experiment, study)
    network = removal.prune_layers(dense, tuple(repairs), repairs)
    cut = CutModel.of(dense, network, tuple(sorted(repairs)), {"recipe": {"repair": name}})
    with experiment.keeping(f"heal {key} {name}", study) as keeping:
        runner = keeping.runner
        outcome = Training(
            cut,
            recipe,
            lambda count, recipe: read_text(
                dense, recipe, count, None if recipe.data else study.corpus
            ),
            runner.batch_size,
            runner.journal,
        ).run()
    return outcome.network, _row(experiment, study, outcome)


def _row(experiment: Experiment, study: Study, outcome: Outcome) -> Part:
    """Losses of a trained network, and what training took."""
    dense, network = study.dense, outcome.network
    losses = {
        name: evaluate_windows(network, windows, corpus=name, against=dense.network).sums.to_dict()
        for name, windows in experiment.texts.items()
    }
    return {
        "losses": losses,
        "healing": {
            "trained": list(outcome.parts),
            "tokens": outcome.text.num_tokens,
            "seconds": outcome.seconds,
            "best_step": outcome.best_step,
            "steps": outcome.steps,
        },
    }
