"""Training after a cut, as people ask for it: a saved model or one just pruned, and a budget."""

from pathlib import Path
from typing import Any

from ghostlayers.errors import RecipeError
from ghostlayers.healed import HealedModel, heal_cut
from ghostlayers.healing.cut_model import CutModel, open_cut
from ghostlayers.healing.sharding_checks import (
    check_sharding,
    options_for_cut,
    options_for_shards,
)
from ghostlayers.model.loading import leaves_models_alone
from ghostlayers.model.multimodal import text_view
from ghostlayers.plan.expected import seconds_since_start
from ghostlayers.plan.healing import plan_heal
from ghostlayers.plan.probe import probe_blindly
from ghostlayers.plan.units import Plan
from ghostlayers.preparation import Documents, ModelSource, Tokenizer, open_model
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.runtime.parallel import shards, world


@leaves_models_alone
def heal(
    model: "str | Path | PrunedModel",
    *,
    against: "ModelSource | None" = None,
    recipe: HealingRecipe | None = None,
    data: Documents | None = None,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
    keep: str | Path | None = None,
    take_kept: bool = False,
    **choices: Any,
) -> HealedModel:
    """Train a cut model for minutes, from its closed-form repair on, against the dense one.

    Args:
        model: a checkpoint or an adapter that Ghostlayers made, or what `prune` returned.
        against: the dense model that it was cut from; known already of what `prune` returned.
        recipe: what is trained, how long, and on what; fields can also be given by name.
        data: training text instead of the recipe's: documents, or corpora with their shares.
        tokenizer: for a dense model in memory.
        options: how to run.
        keep: a folder for what the run has done so far: the same call goes on from it after an
            interruption, and ends with the same bits; `HealedModel.save` deletes it.
        take_kept: train no further, and return the best state that is kept there.
        choices: fields of the recipe.

    Returns:
        The best state on held-out windows; `HealedModel.better` says whether it is better than
        before, and `HealedModel.save` writes it.

    Raises:
        GhostlayersError: bad input, or a loss that is no number.
    """
    if isinstance(data, (str, Path)):  # a name is read as the recipe's is, shares and all
        choices, data = {**choices, "data": str(data)}, None
    recipe = (recipe or HealingRecipe()).changed(choices)
    options = options or RunOptions()
    check_sharding(model, against)
    return heal_cut(
        _open_cut(model, against, tokenizer, options),
        recipe,
        options,
        data=data,
        keep=None if keep is None else Path(keep),
        take_kept=take_kept,
    )


def plan_healing(
    model: str | Path | PrunedModel,
    against: "ModelSource | None",
    recipe: HealingRecipe,
    options: RunOptions | None = None,
    output: Path | None = None,
) -> Plan:
    """What `heal` would take on this machine; arguments as there, ``output`` is where it lies.

    Raises:
        GhostlayersError: a request that cannot work.
    """
    options = options or RunOptions()
    check_sharding(model, against)
    cut = _open_cut(model, against, None, options)
    speed = probe_blindly(cut.dense, recipe.sequence_length, options.batch_size)
    started = seconds_since_start()
    return plan_heal(cut, recipe, speed, started=started, folder=output, processes=world().size)


def _open_cut(
    model: "str | Path | PrunedModel",
    against: "ModelSource | None",
    tokenizer: "Tokenizer | None",
    options: RunOptions,
) -> CutModel:
    if isinstance(model, PrunedModel):
        return CutModel.of(model.dense, text_view(model.model), model.spans, model.record)
    if against is None:
        raise RecipeError("healing a saved model needs the dense one, too: against=...")
    dense = open_model(against, tokenizer, options_for_shards(options), surgery_follows=True)
    cut = open_cut(model, dense, options_for_cut(options, dense))
    if shards() > 1:
        from ghostlayers.healing.sharding import divide_dense  # FSDP takes its time to be imported

        divide_dense(dense)
    return cut
