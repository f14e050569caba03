"""How training went, on the screen."""

from pathlib import Path

from ghostlayers.checkpoint.proof import Verification, mode_of
from ghostlayers.cli.saved_screen import ENGINES, show_healing, show_materialized
from ghostlayers.cli.screen import bold, choice, dim, say, step, warn
from ghostlayers.healed import HealedModel
from ghostlayers.recipe import HealingRecipe
from ghostlayers.recipe.healing_presets import find_healing_preset


def show_preset(recipe: HealingRecipe) -> None:
    """Every choice that a preset makes, those that were made otherwise marked."""
    if recipe.preset is None:
        return
    preset, now = find_healing_preset(recipe.preset), recipe.to_dict()
    say(bold(preset.title), f", arXiv:{preset.paper}")
    say("  ", ", ".join(choice(name, value, now[name]) for name, value in preset.choices.items()))
    say("  ", dim(f"not as there: {preset.differs}."))


def show_healed(healed: HealedModel) -> None:
    """What was trained, and losses before, on the way and after."""
    show_healing(healed.record["healing"])
    outcome = healed.outcome
    if not outcome.text.other:
        warn(
            "the held-out windows are of the training text; what was gained elsewhere is not "
            "known. Name another text with --held-out."
        )
    repeats = max(outcome.text.repeats)
    if repeats > 4:
        warn(f"the training text was gone through {repeats:.1f} times; more text would be better.")


def save_healed(healed: HealedModel, output: Path, save: str, *, overwrite: bool) -> None:
    """Write a healed model, and say where it lies and how it was proved."""
    step(f"Writing {output} and proving it ...")
    ways = {"checkpoint": healed.save, "adapter": healed.save_adapter, "peft": healed.save_peft}
    write = ways[save]
    show_saved(healed, output, write(output, overwrite=overwrite), save)


def show_saved(
    healed: HealedModel, out_folder: Path, verification: Verification, save: str
) -> None:
    """Where the result lies, how it was proved, and what to do next."""
    show_materialized(out_folder, verification)
    base = healed.cut.dense.base.name
    if save == "adapter":
        say()
        say("Next:")
        say(f'  ghostlayers.from_adapter("{out_folder}")   # needs {base}')
        return
    if save == "peft":
        say()
        say("Next:")
        say(f'  PeftModel.from_pretrained(model, "{out_folder}")   # of {healed.cut.folder}')
        return
    stock = mode_of(healed.model) == "stock"
    say(ENGINES["stock" if stock else "custom"])
    say()
    say("Next:")
    say(f"  ghostlayers eval {out_folder} --against {base} --data wikitext2")
    say(f"  ghostlayers inspect {out_folder}")
