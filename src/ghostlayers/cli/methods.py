"""`ghostlayers methods`: presets of published methods, repairs, selections, what packages add."""

import dataclasses
import inspect
import re
from typing import Annotated, Any

import typer

from ghostlayers.cli import screen
from ghostlayers.cli.shell import simple_command
from ghostlayers.errors import RecipeError, suggest
from ghostlayers.presets import PRESETS, Preset
from ghostlayers.repairs import REPAIR_REGISTRY
from ghostlayers.repairs.arguments import Argument, WithArguments, arguments_of
from ghostlayers.repairs.registry import Registry
from ghostlayers.selection.methods import SELECTION_REGISTRY

REGISTRIES: dict[str, Registry[Any]] = {
    "--repair": REPAIR_REGISTRY,
    "--select": SELECTION_REGISTRY,
}
"""Classes that an option names."""

_ATTRIBUTES = re.compile(r"^Attributes:\n((?:    .*\n?|\n)*)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


@simple_command
def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Show all of this one.", show_default=False),
    ] = None,
) -> None:
    """The published methods, each as its authors and their code run it, repairs, selections."""
    if name is not None:
        _show_named(name)
        return
    for preset in PRESETS.values():
        screen.say(screen.bold(preset.name), f": {preset.title}, arXiv:{preset.paper}")
        screen.say(f"  code: {preset.code}; {_summary(preset)}, {preset.dtype}")
        for point in preset.differs:
            screen.say("  ", screen.dim(f"differs: {point}"))
    screen.say("--preset NAME takes every choice of one.")
    for option, registry in REGISTRIES.items():
        screen.say("")
        screen.say(screen.bold(f"{option} NAME"))
        for keyword, cls in registry.own.items():
            screen.say(f"  {keyword}: ", screen.dim(cls.summary()))
        _show_added(registry)
    screen.say("")
    screen.say("ghostlayers methods NAME shows all of one: choices, formula, cost, arguments.")


def _show_added(registry: Registry[Any]) -> None:
    """What other packages add, each with its package; what cannot be used with the reason."""
    for added in registry.outside():
        screen.say("  ", screen.bold(added.name), f": a {registry.kind} of {added.package}")
        problem = f"cannot be used: {added.problem}" if added.problem else ""
        screen.say("    ", added.summary, screen.dim(problem))


def _summary(preset: Preset) -> str:
    keys = ("select", "repair", "data", "windows", "sequence_length")
    chosen = [str(preset.choices[key]) for key in keys if key in preset.choices]
    return ", ".join(chosen)


def _show_named(name: str) -> None:
    """A preset, a repair and a selection, as far as they have this name.

    Raises:
        RecipeError: nothing has.
    """
    presets = {also: p for p in PRESETS.values() for also in (p.name, *p.also)}
    classes = {option: _keywords(registry) for option, registry in REGISTRIES.items()}
    keyword = name.partition(":")[0]
    owners = [option for option, keywords in classes.items() if keyword in keywords]
    if name not in presets and not owners:
        known = set(presets).union(*classes.values())
        raise RecipeError(f"unknown method '{name[:60]}'. {suggest(name, known)}")
    if name in presets:
        _show(presets[name])
    for option in owners:
        _show_class(option, REGISTRIES[option].class_of(keyword))


def _keywords(registry: Registry[Any]) -> set[str]:
    return {*registry.own, *(added.name for added in registry.outside())}


def _show(preset: Preset) -> None:
    names = ", ".join((preset.name, *preset.also))
    screen.say(screen.bold(preset.title), f" (--preset {names})")
    screen.say(f"Paper: arXiv:{preset.paper}. Code: {preset.code}.")
    rows = [[key, repr(value)] for key, value in preset.choices.items()]
    screen.table(("choice", "value"), [*rows, ["dtype", preset.dtype]])
    for point in preset.differs:
        screen.say(f"Differs: {point}")


def _show_class(option: str, cls: type[WithArguments]) -> None:
    """What a class says of itself, and how its arguments are written."""
    screen.say(screen.bold(f"{option} {cls.keyword}"))
    for line in _ATTRIBUTES.sub("", inspect.getdoc(cls) or "").strip().splitlines():
        screen.say(line)
    says = _said_of_fields(cls)
    for arg in arguments_of(cls):
        default = _default(arg)
        screen.say("  ", screen.bold(_form(arg)), f"  {says.get(arg.name, arg.note)}")
        screen.say("    ", screen.dim(arg.expected + (f"; {default}" if default else "")))


def _said_of_fields(cls: type) -> dict[str, str]:
    """What docstrings say of the fields of a class, its own before those that it inherits."""
    says: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        for block in _ATTRIBUTES.findall(inspect.cleandoc(kind.__doc__ or "")):
            says |= {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(block)}
    return says


def _form(argument: Argument) -> str:
    """How it is written behind the keyword."""
    if argument.placed:
        return f":{argument.name.upper()}"
    return f":{argument.key}" if argument.kind is bool else f":{argument.key}=VALUE"


def _default(argument: Argument) -> str:
    if argument.default is dataclasses.MISSING:
        return "must be given"
    return "" if argument.default in (None, False) else f"{argument.default} if not given"
