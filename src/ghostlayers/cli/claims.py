"""What a command reads and what it will write, checked and locked before anything is computed."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ghostlayers.calibration.journal import digest
from ghostlayers.cli.options import names_in
from ghostlayers.runtime import files, locks, parallel
from ghostlayers.runtime.outputs import check_place
from ghostlayers.runtime.places import base_of, check_apart

FOLDERS = {"output": "-o"}
FILES = {"gguf": "--gguf", "file": "--gguf", "written": "-o", "json_file": "--json", "png": "--png"}
INPUTS = {
    "model": "MODEL",
    "checkpoint": "CHECKPOINT",
    "first": "A",
    "second": "B",
    "adapter": "ADAPTER",
    "base": "--base",
    "against": "--against",
    "data": "--data",
    "prompts": "--prompts",
    "prefixes": "--prefixes",
    "eval_data": "--eval-data",
    "imatrix_data": "--imatrix-data",
    "held_out": "--held-out",
    "tasks_path": "--tasks-path",
    "published": "--published",
}
"""Parameters of commands by what they are, and what the user calls them."""

_RECIPE: ContextVar[Path | None] = ContextVar("recipe", default=None)
"""Of the command that is under way, if it stands in a file."""


@contextlib.contextmanager
def claimed(command: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Hold the locks of all that a command will write.

    Of several processes the first one holds them.

    Args:
        command: its name.
        given: its arguments.

    Raises:
        OutputError: an output cannot be written, is taken, may not be replaced, or is an input.
    """
    if command == "run":
        with _reading(given["recipe"]):
            yield
        return
    outputs = _outputs(given)
    if not outputs or given.get("plan"):
        yield
        return
    with contextlib.ExitStack() as stack:
        parallel.by_first(lambda: _claim(stack, command, given, outputs))
        yield


def _outputs(given: Mapping[str, Any]) -> dict[str, Path]:
    """What is written, by the parameter; of a family of files, with the type behind its name."""
    named = [name for name in (*FOLDERS, *FILES) if given.get(name) is not None]
    if not given.get("type"):
        return {name: given[name] for name in named}
    from ghostlayers.export import Family

    types = names_in(given["type"], "--type")
    family = Family(types=tuple(types), imatrix_data=given.get("imatrix_data"))
    return {f"file {kind}": path for kind, path in family.paths(given["file"]).items()}


def _label(name: str) -> str:
    """What the user calls an output."""
    parameter, _, kind = name.partition(" ")
    return f"{(FOLDERS | FILES)[parameter]} {kind}".strip()


def _of(name: str) -> str:
    """The parameter that an output comes from."""
    return name.partition(" ")[0]


@contextlib.contextmanager
def _reading(recipe: Path) -> Iterator[None]:
    token = _RECIPE.set(recipe)
    try:
        yield
    finally:
        _RECIPE.reset(token)


def _claim(
    stack: contextlib.ExitStack, command: str, given: Mapping[str, Any], outputs: Mapping[str, Path]
) -> None:
    check_apart(_inputs(given), {_label(name): path for name, path in outputs.items()})
    overwrite = bool(given.get("overwrite"))
    for name, path in outputs.items():
        if _of(name) in FILES:
            files.check_can_write(path)
        else:
            check_place(path)
    asked = digest(command, str(Path.cwd()), *(f"{k}={v!r}" for k, v in sorted(given.items())))
    for name, path in outputs.items():
        if not files.is_stream(path):
            stack.enter_context(locks.holding(path, asked, replace=overwrite))
            _check_replaceable(name, path, overwrite=overwrite)


def _check_replaceable(name: str, path: Path, *, overwrite: bool) -> None:
    claim = locks.held(path)
    if claim is not None and claim.continues:
        claim.replace = overwrite = True
    if _of(name) in FILES and not overwrite:
        files.check_new(path)


def _inputs(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    inputs = {label: [given[name]] for name, label in INPUTS.items() if given.get(name)}
    if given.get("adapter") and not given.get("base"):
        inputs["its base"] = [base_of(given["adapter"])]
    recipe = _RECIPE.get()
    return {**inputs, "RECIPE": [recipe]} if recipe is not None else inputs
