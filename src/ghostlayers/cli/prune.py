"""`ghostlayers prune`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ghostlayers import heal_pipeline, pipeline
from ghostlayers.calibration import journal
from ghostlayers.checkpoint import readiness
from ghostlayers.checkpoint.adapter import check_precision
from ghostlayers.checkpoint.gguf_saving import How
from ghostlayers.checkpoint.output import Output
from ghostlayers.cli import heal_screen, saved_screen, scores_screen, screen
from ghostlayers.cli import options as o
from ghostlayers.cli.gguf_output import write_file
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import shared_command
from ghostlayers.errors import RecipeError
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import open_model
from ghostlayers.pruned import PrunedModel, checkpoint_bytes
from ghostlayers.recipe import HealingRecipe, Recipe, RunOptions
from ghostlayers.recipe.healing import healing_after
from ghostlayers.runtime import parallel
from ghostlayers.runtime.outputs import check_output
from ghostlayers.runtime.settings import WHAT, setting

ASKED = (
    "layers remove smaller faster at speed fits context as_type max_loss select iterative repair "
    "engine overhead preset cosine_axis keep_layers refit overwrite data text_column separator "
    "sampling windows fit_windows search_windows held_out_windows race_windows sequence_length bos "
    "seed inputs token_weight ridge absolute_ridge export quantized"
)
"""Fields of the recipe, as help shows them."""


@dataclass(frozen=True)
class Making(How):
    """How the result is made: a GGUF file's types and parts, and whether it is trained before."""

    heal: str | None = setting(
        None,
        "Train the result before it is written, on the calibration text: 5min, 90s, or 400k "
        "tokens. `ghostlayers heal` has all the choices.",
        WHAT,
        metavar="BUDGET",
        says="no training",
    )


@shared_command
def prune(
    model: o.Model,
    output: o.OutOrFile,
    recipe: Annotated[Recipe, Fields(ASKED, make=o.recipe_to, beside=("output", "gguf"))],
    options: Annotated[RunOptions, Fields(f"{o.RUN} restart plan revision trust_remote_code")],
    making: Annotated[Making, Fields("fallback split heal")],
    overwrite: o.Overwrite = False,
    save: o.SaveOption = "checkpoint",
    gguf: o.GgufOption = None,
    pre_tokenizer: o.PreTokenizer = None,
    restart: o.Restart = False,
    plan: o.PlanOnly = False,
    revision: o.Revision = None,
) -> None:
    """Remove layers, repair every gap, write a checkpoint, and prove that it reloads."""
    options = dataclasses.replace(options, preset=recipe.preset)
    how = How(making.fallback, making.split)
    leaves = Output(save, gguf, output, how, pre_tokenizer, overwrite)
    whole = save == "checkpoint"
    if not plan and not leaves.is_file:
        check_output(output, overwrite=overwrite, needed_bytes=0)
    leaves.check_asked(recipe)
    if making.heal is not None:
        _check_healing(making.heal, recipe, leaves)
    if whole and not leaves.is_file and not plan and parallel.world().leads:
        readiness.be_ready()
    dense = _open(model, recipe, options, revision, exact=leaves.is_file)
    if not whole:
        check_precision(dense, dense.stored_dtype)
    if plan:
        priced = pipeline.plan(dense, recipe, options=options, output=leaves)
        screen.show_plan(priced)
        return
    if not leaves.is_file:
        needed = checkpoint_bytes(dense, recipe) if whole else 0
        check_output(output, overwrite=overwrite, needed_bytes=needed)
    folder = kept_folder(output, restart=restart)
    pruned = _prune(dense, recipe, options, folder, leaves)
    # What is kept goes when all is written, so that a repetition has it until then.
    pruned = dataclasses.replace(pruned, kept_in=None)
    if making.heal is not None:
        healing = healing_after(making.heal, recipe)
        _heal(pruned, healing, output, save, overwrite=overwrite, restart=restart)
    elif not leaves.is_file:
        _save(pruned, output, save, overwrite=overwrite)
    write_file(pruned, leaves, options)
    journal.finish(folder)


def _heal(
    pruned: PrunedModel,
    recipe: HealingRecipe,
    output: Path,
    save: str,
    *,
    overwrite: bool,
    restart: bool,
) -> None:
    """Train what was pruned, and write it; if that gains nothing, as it was before."""
    folder = kept_folder(output.with_name(f"{output.name}-heal"), restart=restart)
    healed = heal_pipeline.heal(pruned, recipe=recipe, keep=folder)
    heal_screen.show_healed(healed)
    if healed.better:
        heal_screen.save_healed(healed, output, save, overwrite=overwrite)
    else:
        screen.warn("training gained nothing, so what is written is the model before it.")
        _save(pruned, output, save, overwrite=overwrite)
    journal.finish(folder)


def _check_healing(budget: str, recipe: Recipe, leaves: Output) -> None:
    """Refuse training that cannot be, before the model is opened.

    Raises:
        RecipeError: no budget, the result is to be a GGUF file, or models are to be sharded.
    """
    healing_after(budget, recipe)
    if parallel.shards() > 1:
        raise RecipeError(
            "--heal trains the model that was just cut, which every process holds whole, but FSDP "
            "divides models as they are read from folders: prune without --heal, then `ghostlayers "
            "heal` the folder. Or start without --use_fsdp."
        )
    if leaves.is_file or leaves.gguf is not None:
        raise RecipeError(
            "--heal writes a folder, not a GGUF file: prune and heal into a folder with a repair "
            "that folds (refit:3), then `ghostlayers export` it."
        )


def _open(
    model: str, recipe: Recipe, options: RunOptions, revision: str | None, *, exact: bool
) -> DenseModel:
    """The dense model, and what there is to say of it."""
    screen.step(f"Loading {model} ...")
    dense = open_model(model, None, options, revision, surgery_follows=True, exact=exact)
    screen.show_expanded(dense.base, stays=exact)
    screen.show_preset(recipe, dense.dtype)
    screen.show_basis(dense, recipe.method)
    return dense


def _prune(
    dense: DenseModel, recipe: Recipe, options: RunOptions, folder: Path, leaves: Output
) -> PrunedModel:
    """The repaired model, and what it cost."""
    pruned = pipeline.prune(
        dense,
        recipe,
        options=options,
        keep=folder,
        show_text=screen.show_text,
        show_plan=screen.show_plan,
        output=leaves,
    )
    scores_screen.show_pruned(pruned)
    return pruned


def kept_folder(output: Path, *, restart: bool) -> Path:
    """Where a run keeps its sums; what an interrupted one kept is used, or thrown away."""
    keep = journal.folder_for(output)
    if restart:
        journal.finish(keep)
        parallel.wait()
    elif keep.is_dir():
        screen.step(f"Going on with what an interrupted run kept in {keep} ...")
    return keep


def _save(pruned: PrunedModel, output: Path, save: str, *, overwrite: bool) -> None:
    if save == "adapter":
        screen.step(f"Writing {output} and making the model of it again ...")
        saved_screen.show_adapter(pruned, output, pruned.save_adapter(output, overwrite=overwrite))
    else:
        screen.step(f"Writing {output} and loading it again in a fresh process ...")
        saved_screen.show_saved(pruned, output, pruned.save(output, overwrite=overwrite))
