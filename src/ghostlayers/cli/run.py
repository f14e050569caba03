"""`ghostlayers run recipe.yaml`: a command, with its options in a file."""

import contextlib
import inspect
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.app import command_named
from ghostlayers.cli.shell import shared_command
from ghostlayers.errors import OutputError, RecipeError, suggest
from ghostlayers.report.results import read_results
from ghostlayers.report.summary import summarise as summarise_results
from ghostlayers.runtime.documents import brief, parse_yaml, read_json, read_yaml

MOST_RUNS = 10_000
"""Of one recipe: more would take years."""

OTHERWISE = {"json": "json_file", "gguf": "file", "as": "as_type", "for": "engine"}
"""Options whose parameters could not be called what they are."""

RUNNABLE = (
    "prune",
    "heal",
    "merge",
    "write-data",
    "eval",
    "score",
    "compare",
    "recommend",
    "bench",
    "export",
    "materialize",
)
"""Commands that a recipe may name."""


@shared_command
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A .yaml file.")],
    model: Annotated[str | None, o.option("--model", text="Instead of the recipe's model.")] = None,
    output: Annotated[
        Path | None, o.option("--output", "-o", text="Instead of the recipe's output.")
    ] = None,
    changed: Annotated[
        list[str] | None,
        o.option("--set", metavar="KEY=VALUE", text="Replace any other key of the recipe."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        o.option(
            "--trust-remote-code",
            text="Let the model's own code run; a recipe that wants that needs it said here, "
            "too. [default: off]",
        ),
    ] = False,
    trust_tasks: Annotated[
        bool,
        o.option(
            "--trust-tasks",
            text="Let the code of task files run; a recipe that wants that needs it said here, "
            "too. [default: off]",
        ),
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Run a command whose options stand in a YAML file."""
    changes = {**read_changes(changed or []), "model": model, "output": output}
    changes |= {"trust_remote_code": trust_remote_code or None}
    changes |= {"trust_tasks": trust_tasks or None, "debug": debug or None}
    runs = read_recipe(recipe, {k: v for k, v in changes.items() if v is not None})
    for next_run in runs:
        if next_run is not runs[0]:
            screen.begin_anew()
        announce(next_run, len(runs))
        command_named(next_run.command)(**next_run.arguments)
    summarise(runs)


def read_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Values given as ``key=value``, read as YAML.

    Raises:
        RecipeError: there is no equals sign, or no YAML behind it.
    """
    changes = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set: expected KEY=VALUE, got '{pair}'.")
        changes[key.strip()] = parse_yaml(value, f"--set {pair[:60]}:", RecipeError)
    return changes


@dataclass(frozen=True)
class RecipeRun:
    """One call of a command.

    Attributes:
        command: its name.
        arguments: of the command.
        varied: what distinguishes it from the recipe's other runs.
    """

    command: str
    arguments: dict[str, Any]
    varied: dict[str, Any]


def announce(run: RecipeRun, count: int) -> None:
    """Say which of several runs comes next, and whether others' code may run."""
    if count > 1:
        screen.say(screen.bold(run.command), f" with {describe(run.varied)}")
    for key, whose in (("trust_remote_code", "the model's"), ("trust_tasks", "the task files'")):
        if run.arguments.get(key):
            screen.warn(f"{whose} own code may run in this command (--{key.replace('_', '-')}).")


def describe(varied: Mapping[str, Any]) -> str:
    """What was varied, in words."""
    return ", ".join(f"{key} {value}" for key, value in varied.items())


def summarise(runs: Sequence[RecipeRun]) -> None:
    """For several comparisons: the mean loss of every cell, side by side."""
    folders = {describe(one.varied): one.arguments.get("output") for one in runs}
    files = {name: Path(folder) / "results.json" for name, folder in folders.items() if folder}
    if len(runs) < 2 or not all(path.is_file() for path in files.values()):
        return
    tables = {
        name: {
            entry.key: entry.loss
            for entry in summarise_results(read_results(read_json(path, OutputError), f"'{path}'"))
        }
        for name, path in files.items()
    }
    cells = sorted({cell for table in tables.values() for cell in table})
    rows = [
        [
            f"{cell.layers} {cell.select} {cell.repair}".strip(),
            *(_number(table.get(cell)) for table in tables.values()),
        ]
        for cell in cells
    ]
    screen.table(("mean loss", *tables), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def read_recipe(path: Path, changes: Mapping[str, Any]) -> list[RecipeRun]:
    """The calls that a recipe stands for: one, or one for each combination under ``vary``.

    Raises:
        RecipeError: the file cannot be read, names no command, or has a key that the command does
            not know; the message names near ones.
    """
    values, changes = _spell(_load(path), path), _spell(changes, path)
    name = values.pop("command", None)
    if not isinstance(name, str) or name not in RUNNABLE:
        raise RecipeError(
            f"'{path}': 'command' must say what to run, got {brief(name)}. "
            f"{suggest(str(name), RUNNABLE)}"
        )
    vary = values.pop("vary", {})
    runs = []
    for varied in _combinations(vary, changes, path):
        given = {**values, **changes, **varied}
        if varied and given.get("output") is not None:
            given["output"] = _argument(given["output"], Path, "output", path)
            given["output"] /= _folder_name(varied)
        _check_trust(path, given, changes)
        runs.append(RecipeRun(name, _arguments(path, name, given), varied))
    return runs


def _check_trust(path: Path, given: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Only who types the command may let others' code run; a file that says so may be anyone's."""
    for key in ("trust_remote_code", "trust_tasks"):
        if given.get(key) not in (None, False) and changes.get(key) is not True:
            option = f"--{key.replace('_', '-')}"
            raise RecipeError(
                f"'{path}' asks for '{key}', which lets others' code run on this machine. If you "
                f"have read that code, say so yourself: ghostlayers run {path} {option}."
            )


def _spell(given: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Options by their names in Python: ``max-windows`` is ``max_windows``."""
    spelled: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name in spelled:
            raise RecipeError(f"'{path}': '{name}' is given twice.")
        spelled[name] = value
    return spelled


def _combinations(vary: Any, changes: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """What is varied, one choice a run; a key that is changed varies no more."""
    lists = isinstance(vary, dict) and all(isinstance(e, list) and e for e in vary.values())
    if not lists:
        raise RecipeError(f"'{path}': 'vary' must give a list of values for each key it names.")
    vary = {key: values for key, values in _spell(vary, path).items() if key not in changes}
    if math.prod(map(len, vary.values())) > MOST_RUNS:
        raise RecipeError(f"'{path}': 'vary' stands for more than {MOST_RUNS:,} runs.")
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def _folder_name(varied: Mapping[str, Any]) -> str:
    text = "-".join(f"{key}-{value}" for key, value in varied.items())
    return re.sub(r"[^A-Za-z0-9.+=_-]+", "_", text)[:100]


def _arguments(path: Path, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(command_named(name)).parameters
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        parameter = OTHERWISE.get(key, key)
        if parameter not in known:
            raise RecipeError(
                f"'{path}': unknown key '{key}' for {name}. {suggest(parameter, known)}"
            )
        arguments[parameter] = _argument(value, known[parameter].annotation, key, path)
    arguments = _from_environment(known) | arguments
    missing = [
        parameter.name
        for parameter in known.values()
        if parameter.default is inspect.Parameter.empty and parameter.name not in arguments
    ]
    if missing:
        raise RecipeError(f"'{path}': {name} also needs {', '.join(missing)}.")
    return arguments


def _from_environment(known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """What variables say of a command's options, as they do where it is typed."""
    said: dict[str, Any] = {}
    for name, parameter in known.items():
        for note in getattr(parameter.annotation, "__metadata__", ()):
            variable = getattr(note, "envvar", None)
            if value := os.environ.get(variable or "", ""):
                said[name] = _argument(value, parameter.annotation, name, Path(str(variable)))
    return said


def _load(path: Path) -> dict[str, Any]:
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(
            f"'{path}' must hold keys and values, such as 'command: compare', got "
            f"{type(content).__name__}."
        )
    return content


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list of texts",
}
"""How messages call what an option takes."""


def _argument(value: Any, annotation: Any, key: str, path: Path) -> Any:
    """A YAML value as the command wants it: lists become what one would type after an option.

    Raises:
        RecipeError: it is of another kind, no choice of the option's, or too small.
    """
    kind, where = _kind(annotation), f"'{path}': '{key}'"
    if value is None:
        return None
    if isinstance(value, str) and "\0" in value:
        raise RecipeError(f"{where} holds a NUL character, which no name or text has.")
    if kind is Path:
        return _path(value, where, path.parent)
    if isinstance(value, dict):
        raise RecipeError(f"{where} must be a value or a list, got a mapping.")
    if isinstance(value, list):
        value = [_element(item, where) for item in value]
    plain = typing.get_origin(kind) or kind
    value = _typed(value, plain)
    if plain in KINDS and not _is_a(plain, value):
        raise RecipeError(f"{where} must be {KINDS[plain]}, got {brief(value)}.")
    words = typing.get_args(kind) if plain is Literal else ()
    if words and value not in words:
        raise RecipeError(f"{where} must be one of {', '.join(words)}, got {brief(value)}.")
    for option in getattr(annotation, "__metadata__", ()):
        least = getattr(option, "min", None)
        if least is not None and value < least:
            raise RecipeError(f"{where} must be at least {least}, got {brief(value)}.")
    return value


def _kind(annotation: Any) -> Any:
    """The type of an option, whether or not it may be left out."""
    hint = getattr(annotation, "__origin__", annotation)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _path(value: Any, where: str, folder: Path) -> Path:
    """A path; what comes with a recipe lies beside it."""
    if not isinstance(value, str | int | float | Path) or isinstance(value, bool):
        raise RecipeError(f"{where} must be a path, got {brief(value)}.")
    beside = folder / str(value)
    return beside if beside.is_file() else Path(str(value))


def _typed(value: Any, kind: Any) -> Any:
    """What one would type after an option of a kind, where YAML reads it otherwise."""
    if kind is str and isinstance(value, list):
        return ",".join(value)
    if kind is str and _is_a(float, value):
        return str(value)
    if kind is list and isinstance(value, str):
        return [value]
    if kind is float and isinstance(value, str):  # YAML reads 1e-6 as a word
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _element(value: Any, where: str) -> str:
    """An element of a list, as one would type it."""
    if isinstance(value, str) and "\0" not in value:
        return value
    if _is_a(float, value):
        return str(value)
    raise RecipeError(f"{where} must be a list of texts or numbers, got {brief(value)}.")


def _is_a(kind: type, value: Any) -> bool:
    """A whole number is a number; true and false are none."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
