"""`ghostlayers methods`: the published methods that presets reproduce, and what packages add."""

from typing import Annotated

import typer

from ghostlayers.cli import screen
from ghostlayers.cli.shell import simple_command
from ghostlayers.presets import PRESETS, Preset, find_preset
from ghostlayers.repairs import REPAIR_REGISTRY
from ghostlayers.selection.methods import SELECTION_REGISTRY


@simple_command
def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Show every choice of this one.", show_default=False),
    ] = None,
) -> None:
    """The published methods, each as its authors and their code run it (--preset NAME)."""
    if name is not None:
        _show(find_preset(name))
        return
    for preset in PRESETS.values():
        screen.say(screen.bold(preset.name), f": {preset.title}, arXiv:{preset.paper}")
        screen.say(f"  code: {preset.code}; {_summary(preset)}, {preset.dtype}")
        for point in preset.differs:
            screen.say("  ", screen.dim(f"differs: {point}"))
    screen.say("--preset NAME takes every choice of one; ghostlayers methods NAME lists them.")
    _show_added()


def _show_added() -> None:
    """What other packages add, each with its package; what cannot be used with the reason."""
    for registry in (REPAIR_REGISTRY, SELECTION_REGISTRY):
        for added in registry.outside():
            screen.say(screen.bold(added.name), f": a {registry.kind} of {added.package}")
            problem = f"cannot be used: {added.problem}" if added.problem else ""
            screen.say("  ", added.summary, screen.dim(problem))


def _summary(preset: Preset) -> str:
    keys = ("select", "repair", "data", "windows", "sequence_length")
    chosen = [str(preset.choices[key]) for key in keys if key in preset.choices]
    return ", ".join(chosen)


def _show(preset: Preset) -> None:
    names = ", ".join((preset.name, *preset.also))
    screen.say(screen.bold(preset.title), f" (--preset {names})")
    screen.say(f"Paper: arXiv:{preset.paper}. Code: {preset.code}.")
    rows = [[key, repr(value)] for key, value in preset.choices.items()]
    screen.table(("choice", "value"), [*rows, ["dtype", preset.dtype]])
    for point in preset.differs:
        screen.say(f"Differs: {point}")
