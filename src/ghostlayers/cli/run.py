"""`ghostlayers run recipe.yaml`: any command, with its options in a file."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ghostlayers.cli import options as o
from ghostlayers.errors import RecipeError, suggest

Commands = Mapping[str, Callable[..., None]]


def make_run(commands: Commands) -> Callable[..., None]:
    """The command, over the others by name."""

    def run(
        recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A .yaml file.")],
        model: Annotated[
            str | None, o._option("--model", text="Instead of the recipe's model.")
        ] = None,
        output: Annotated[
            Path | None, o._option("--output", "-o", text="Instead of the recipe's output.")
        ] = None,
        debug: o.Debug = False,
    ) -> None:
        """Run a command whose options stand in a YAML file."""
        changes = {"model": model, "output": output, "debug": debug or None}
        name, arguments = read_recipe(
            recipe, commands, {k: v for k, v in changes.items() if v is not None}
        )
        commands[name](**arguments)

    return run


def read_recipe(
    path: Path, commands: Commands, changes: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The command that a recipe names, and the arguments for it.

    Raises:
        RecipeError: the file cannot be read, names no command, or has a key that the command does
            not know; the message names near ones.
    """
    values = _load(path)
    name = values.pop("command", None)
    if name not in commands:
        raise RecipeError(
            f"'{path}': 'command' must say what to run, got {name!r}. "
            f"{suggest(str(name), commands)}"
        )
    known = inspect.signature(inspect.unwrap(commands[name])).parameters
    arguments: dict[str, Any] = {}
    for key, value in {**values, **changes}.items():
        parameter = str(key).replace("-", "_")
        if parameter not in known:
            raise RecipeError(
                f"'{path}': unknown key '{key}' for {name}. {suggest(parameter, known)}"
            )
        arguments[parameter] = _argument(value, known[parameter].annotation, str(key), path)
    missing = [
        each.name
        for each in known.values()
        if each.default is inspect.Parameter.empty and each.name not in arguments
    ]
    if missing:
        raise RecipeError(f"'{path}': {name} also needs {', '.join(missing)}.")
    return name, arguments


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe '{path}': {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"'{path}' must hold keys and values, such as 'command: compare', got "
            f"{type(content).__name__}."
        )
    return content


def _argument(value: Any, annotation: Any, key: str, path: Path) -> Any:
    """A YAML value as the command wants it: lists become what one would type after an option."""
    wanted = getattr(annotation, "__origin__", annotation)
    if wanted is Path or wanted == Path | None:
        return None if value is None else Path(str(value))
    if wanted in (str, str | None) and isinstance(value, list):
        return ",".join(str(each) for each in value)
    if wanted in (str, str | None) and isinstance(value, (int, float)):
        return str(value)
    if wanted == list[str] | None and isinstance(value, str):
        return [value]
    if wanted in (float, float | None) and isinstance(value, str):
        try:  # YAML reads 1e-6 as a word
            return float(value)
        except ValueError:
            pass
    if isinstance(value, dict):
        raise RecipeError(f"'{path}': '{key}' must be a value or a list, got a mapping.")
    return value
