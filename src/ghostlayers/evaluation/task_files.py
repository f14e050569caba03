"""What task files would run, found before lm-evaluation-harness reads them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ghostlayers.errors import CorpusError, RecipeError

MAX_BYTES = 4 << 20
"""A larger file of settings is none."""

MAX_DEPTH = 64
"""Lists and mappings within one another; readers of YAML call themselves for each."""

NAMED = 3
"""A message names so many places."""

_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Code(str):
    """What a file says to run, as it is written there."""


class _Loader(_Safe):
    """A loader that constructs nothing but plain values."""


def _code(loader: Any, suffix: str, node: yaml.Node) -> _Code:
    del loader, suffix
    value = node.value if isinstance(node, yaml.ScalarNode) else ""
    return _Code(f"{node.tag.removeprefix('tag:yaml.org,2002:')} {value}".strip())


_Loader.add_multi_constructor("!function", _code)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _code)


def find_code(folder: Path) -> list[str]:
    """Every place in a folder's task files that would run code, whichever task is asked for.

    Files that they include are read too, wherever those lie. Templates are not listed: they run in
    a sandbox.

    Args:
        folder: where the harness looks for ``*.yaml``.

    Returns:
        One text a place: the file, and what stands there.

    Raises:
        CorpusError: a file is no file, too large, or nested too deeply to be read safely.
    """
    places: list[str] = []
    waiting, seen = sorted(folder.rglob("*.yaml")), set[Path]()
    while waiting:
        path = waiting.pop(0).resolve()
        if path in seen or path.is_dir():
            continue
        seen.add(path)
        content = _read(path)
        places += [f"{path.name}: {reason}" for reason in _reasons(content)]
        waiting += _included(content, path.parent)
    return places


def check_code(folder: Path, *, trusted: bool) -> list[str]:
    """`find_code`, unless what it finds may not run.

    Raises:
        RecipeError: a file would run code, and that was not allowed.
        CorpusError: as `find_code`.
    """
    places = find_code(folder)
    if places and not trusted:
        raise RecipeError(
            f"task files in '{folder}' can run code on this machine: {listed(places)}. Read them, "
            "then allow it with --trust-tasks (trust_tasks=True), or take a folder without them."
        )
    return places


def listed(places: list[str] | tuple[str, ...]) -> str:
    """The first few places, and how many more there are."""
    more = f"; {len(places) - NAMED} more" if len(places) > NAMED else ""
    return "; ".join(places[:NAMED]) + more


def _read(path: Path) -> Any:
    """The plain values of a file; None where there is nothing that the harness could read."""
    if not path.exists():
        return None  # the harness says so, if a task that is asked for needs it
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise CorpusError(
            f"'{path}' is no task file: expected a file of YAML of at most {MAX_BYTES >> 20} MiB."
        )
    try:
        content = path.read_bytes()
        deep = _depth(content) > MAX_DEPTH
        values = None if deep else yaml.load(content, Loader=_Loader)  # noqa: S506 - a safe one
    except (yaml.YAMLError, ValueError):
        return None  # the harness leaves out files that it cannot read
    except OSError as error:
        raise CorpusError(f"cannot read the task file '{path}': {error.strerror}.") from error
    if deep:
        raise CorpusError(
            f"'{path}' nests lists and mappings more than {MAX_DEPTH} deep; no task does."
        )
    return values


def _depth(content: bytes) -> int:
    """How deep lists and mappings lie in one another, told without going there."""
    depth = deepest = 0
    for event in yaml.parse(content, Loader=_Safe):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, depth)
    return deepest


def _values(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value with its key, at any depth; values that several places share come once."""
    waiting, seen = [("", content)], set[int]()
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if id(value) in seen or not isinstance(value, dict | list):
            continue
        seen.add(id(value))
        pairs = value.items() if isinstance(value, dict) else ((key, item) for item in value)
        waiting += [(str(name), item) for name, item in pairs]


def _reasons(content: Any) -> Iterator[str]:
    for key, value in _values(content):
        if isinstance(value, _Code):
            yield f"{key or 'a key'}: {value}"
        elif key in _RULES and _RULES[key](value):
            yield f"{key}: {str(value)[:80]}"


def _is_script(value: Any) -> bool:
    """A data set that is a program, or that unpickles."""
    path = Path(str(value))
    beside = path / f"{path.name}.py"
    return path.suffix == ".py" or path.name == "pandas" or beside.is_file()


_RULES: dict[str, Any] = {
    "class": bool,  # a task that is a Python class
    "custom_dataset": bool,
    "dataset_path": _is_script,
    "hf_evaluate": bool,  # metrics of the hub are programs
    "storage_options": bool,  # file systems are chosen and set up by it
    "trust_remote_code": bool,
    "unsafe_code": bool,
    "use_prompt": lambda value: ".yaml" in str(value) or "promptsource" in str(value),
}


def _included(content: Any, folder: Path) -> list[Path]:
    included = content.get("include") if isinstance(content, dict) else None
    paths = included if isinstance(included, list) else [included]
    return [folder / path for path in paths if isinstance(path, str) and "\0" not in path]
