"""Values in files, JSON and YAML, that others may have written or changed: read within bounds.

What is written is strict JSON: a number that is none (NaN, infinity) is null there, and older files
that hold one are read so.
"""

import dataclasses
import functools
import json
import math
import re
import stat
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from ghostlayers.errors import InputError, RecipeError, shortened
from ghostlayers.runtime.shown import one_line

NO_NUMBERS = ("NaN", "Infinity", "-Infinity")
"""What JSON has no place for, and Python's writes."""

MOST_JSON_BYTES = 2**28
"""Far above any tokenizer or results file, and far below what would fill the memory."""

MOST_YAML_BYTES = 2**18
"""A file that people write; it takes seconds to read so much."""

MOST_YAML_VALUES = 100_000
"""Values of a YAML file, those behind an alias counted each time."""

TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")
)


class Checked(BaseModel):
    """A part of a file that is checked as it is read: types are strict, more keys are welcome."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def shape_of(owner: type, *without: str) -> type[Checked]:
    """What a dataclass's values must look like in a file, from its own annotations.

    Args:
        owner: the dataclass.
        without: fields that no file has.
    """
    return _shape_of(owner, without)


@functools.cache
def _shape_of(owner: type, without: tuple[str, ...]) -> type[Checked]:
    hints = typing.get_type_hints(owner, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], ... if _is_required(field) else None)
        for field in dataclasses.fields(owner)
        if field.name not in without
    }
    return create_model(owner.__name__, __base__=Checked, **fields)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_text(path: Path, wrong: type[InputError], most_bytes: int) -> str:
    """A file's text, if it is a file and not too large.

    Args:
        path: of the file.
        wrong: the error to raise.
        most_bytes: it may have.

    Raises:
        InputError: of the type asked for.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise wrong(f"'{path}' cannot be read: it is no ordinary file.")
        if status.st_size > most_bytes:
            raise wrong(
                f"'{path}' cannot be read: it has {status.st_size / 1e6:,.1f} MB, expected at most "
                f"{most_bytes / 1e6:,.1f} MB."
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise wrong(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise wrong(f"'{path}' cannot be read: it is not text in UTF-8 ({error}).") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise wrong(f"'{path}' cannot be read: {error}.") from error  # NUL in its name


def read_json(path: Path, wrong: type[InputError], *, refused: Sequence[str] = ()) -> Any:
    """A JSON file's value; NaN and infinities, which are no JSON, are None.

    Args:
        path: of the file.
        wrong: the error to raise.
        refused: those of them that may not be there; older versions wrote all.

    Raises:
        InputError: of the type asked for.
    """
    text = read_text(path, wrong, MOST_JSON_BYTES)
    return parse_json(text, f"'{path}'", wrong, refused=refused)


def parse_json(
    text: str, where: str, wrong: type[InputError], *, refused: Sequence[str] = ()
) -> Any:
    """A JSON text's value, as `read_json` reads a file's.

    Args:
        text: to read.
        where: what messages call it.
        wrong: the error to raise.
        refused: see `read_json`.

    Raises:
        InputError: of the type asked for.
    """

    def constant(name: str) -> None:
        if name in refused:
            raise ValueError(f"it holds {name}, which is no number")

    try:
        return json.loads(text, parse_constant=constant, parse_float=_finite)
    except RecursionError as error:
        raise wrong(f"{where} cannot be read: its values lie too deep in each other.") from error
    except ValueError as error:
        raise wrong(f"{where} cannot be read: {error}.") from error


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def to_json(content: Any, *, indent: int | None = 2) -> str:
    """Plain values as strict JSON in ASCII, with a line break behind; what is no number is null."""
    return json.dumps(strict(content), indent=indent, allow_nan=False) + "\n"


def strict(content: Any) -> Any:
    """Plain values as they are read again from JSON."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict(item) for item in content]
    return content


def check(values: Any, shape: Any, where: str, wrong: type[InputError]) -> Any:
    """Refuse values of another shape than expected; return them unchanged.

    Args:
        values: as read.
        shape: a `Checked` class, or any type that pydantic knows.
        where: what messages call it.
        wrong: the error to raise.

    Raises:
        InputError: of the type asked for; the message names the place, and what was expected there.
    """
    try:
        TypeAdapter(shape).validate_python(values)
    except ValidationError as error:
        hint = "" if issubclass(wrong, RecipeError) else " Correct it, or get the file again."
        raise wrong(f"{where} cannot be read: {_first_fault(error, values)}.{hint}") from error
    except RecursionError as error:
        raise wrong(f"{where} cannot be read: its values lie too deep in each other.") from error
    return values


def _first_fault(error: ValidationError, values: Any) -> str:
    fault = error.errors(include_url=False)[0]
    place = ".".join(_place(fault["loc"], values))
    if fault["type"] == "missing":
        return f"it lacks {'.'.join(filter(None, (place, str(fault['loc'][-1]))))}"
    got = "" if fault["type"] == "value_error" else f", got {brief(fault['input'])}"
    said = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    said = re.sub("expected (?=greater|less)", "expected a number ", said)
    return f"{f'{place}: ' if place else ''}{said}{got}"


def _place(parts: Iterable[Any], values: Any) -> Iterator[str]:
    """The way into values; pydantic also names the type of a union that it tried."""
    for part in parts:
        try:
            values = values[part]
        except (LookupError, TypeError):
            continue
        yield one_line(part)


def brief(value: Any, most: int = 60) -> str:
    """A value in a message, which may be huge."""
    try:
        return shortened(one_line(repr(value)), most)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a value of type {type(value).__name__}"


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key '{twice}' is given twice, near line {_line(node)}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {  # a date is text here
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith(("timestamp", "value"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def read_yaml(path: Path, wrong: type[InputError]) -> Any:
    """A YAML file's value.

    Args:
        path: of the file.
        wrong: the error to raise.

    Raises:
        InputError: of the type asked for.
    """
    return parse_yaml(read_text(path, wrong, MOST_YAML_BYTES), f"'{path}'", wrong)


def parse_yaml(text: str, where: str, wrong: type[InputError]) -> Any:
    """A YAML text's value: plain values only, no key twice, and no more of it than people write.

    Args:
        text: to read.
        where: what messages call it.
        wrong: the error to raise.

    Raises:
        InputError: of the type asked for.
    """
    try:
        return _parse_yaml(text)
    except RecursionError as error:
        raise wrong(f"{where} is not YAML: its values lie too deep in each other.") from error
    except yaml.YAMLError as error:
        raise wrong(f"{where} is not YAML: {one_line(str(error))}") from error
    except (ValueError, LookupError, AttributeError) as error:  # `!!int x`, thousands of digits
        raise wrong(f"{where} is not YAML: {one_line(str(error))}.") from error


def _parse_yaml(text: str) -> Any:
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    if _values(node, {}) > MOST_YAML_VALUES:
        raise yaml.YAMLError(f"expected at most {MOST_YAML_VALUES:,} values, aliases written out")
    return loader.construct_document(node)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; too many if it stands in itself."""
    if id(node) in known:
        return known[id(node)]
    if node.tag not in TAGS and not node.tag.endswith(":merge"):
        raise yaml.YAMLError(f"the tag '{node.tag}' means nothing here, near line {_line(node)}")
    known[id(node)] = MOST_YAML_VALUES
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
