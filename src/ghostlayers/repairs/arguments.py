"""Methods as text and back: ``ghost:rank=64`` is ``Ghost(rank=64)``.

The fields of a frozen dataclass are its arguments. One that is true or false is written as its name
(``ghost:affine``), one that stands at a place of its own as its value (``refit:2``), any other as
``name=value``. What has its default is left out, but for what stands at a place.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.spans import small_number


def argument(default: Any, **says: Any) -> Any:
    """A field that says how it is written; a plain one does where nothing is to be said.

    Args:
        default: its value where the text names none.
        says: ``placed``, ``what``, ``note``, ``least`` and ``most`` of `Argument`.
    """
    return dataclasses.field(default=default, metadata={"argument": says})


@dataclass(frozen=True)
class Argument:
    """An argument of a class, as text and messages see it.

    Attributes:
        name: of its field.
        default: its value where the text names none; `dataclasses.MISSING` if it must.
        kind: type of its values beside words: bool, int, float or str; None for words alone.
        words: texts that a value may be.
        placed: it is written by its value alone, as the 2 of ``refit:2``.
        what: what messages call it, such as ``the number of layers``; its name if empty.
        note: what another value than the default does, for help and reports.
        least: the least number; 1 for whole ones and 0 for others, if None.
        most: the largest whole number, far above what can be of use.
    """

    name: str
    default: Any
    kind: type | None
    words: tuple[str, ...]
    placed: bool = False
    what: str = ""
    note: str = ""
    least: float | None = None
    most: int = 100_000

    @property
    def key(self) -> str:
        """Its name in text; what is true by default is named by ``no-``."""
        name = self.name.replace("_", "-")
        return f"no-{name}" if self.default is True else name

    @property
    def bound(self) -> float:
        """The least number that it may be."""
        return (1 if self.kind is int else 0) if self.least is None else self.least

    def read(self, text: str) -> Any:
        """The value that a text stands for; the text itself where it stands for none."""
        if text in self.words or self.kind not in (int, float):
            return text
        if self.kind is int:
            number = small_number(text)
            return text if number is None else number
        try:
            return float(text)
        except ValueError:
            return text

    def written(self, value: Any) -> str:
        """The text of a value; empty where nothing needs to be said."""
        if self.placed:
            return _plain(value)
        if value == self.default:
            return ""
        return self.key if isinstance(value, bool) else f"{self.key}={_plain(value)}"

    def allows(self, value: Any) -> bool:
        """Whether a value may be given."""
        if value is self.default or (isinstance(value, str) and value in self.words):
            return True
        if self.kind is float:
            return type(value) in (int, float) and self.bound <= value < math.inf
        if self.kind is int:
            return type(value) is int and self.bound <= value <= self.most
        if self.kind is str:
            return isinstance(value, str) and bool(_TEXT.fullmatch(value))
        return type(value) is self.kind

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        kinds = {
            bool: "true or false",
            int: f"a whole number from {self.bound:,g} to {self.most:,}",
            float: f"a number >= {self.bound:g} (and finite)",
            str: "text without ':' and '='",
        }
        *others, last = [*self.words, *([kinds[self.kind]] if self.kind else [])]
        return f"{', '.join(others)} or {last}" if others else last


_TEXT = re.compile(r"(?!\s)[^:=\x00-\x1f]+(?<!\s)")


def _plain(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return re.sub(r"e([+-])0", r"e\1", text)


def arguments_of(cls: type) -> tuple[Argument, ...]:
    """The arguments of a class, its own before those that it inherits."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = [name for kind in cls.__mro__ for name in inspect.get_annotations(kind)]
    return tuple(_argument(fields[n], hints[n]) for n in dict.fromkeys(names) if n in fields)


def _argument(field: "dataclasses.Field[Any]", hint: Any) -> Argument:
    parts = _alternatives(hint)
    kind = next((part for part in parts if part in (bool, int, float, str)), None)
    words = tuple(part for part in parts if isinstance(part, str))
    return Argument(field.name, field.default, kind, words, **field.metadata.get("argument", {}))


def _alternatives(hint: Any) -> list[Any]:
    """The types and words that a hint allows."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [one for part in typing.get_args(hint) for one in _alternatives(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else [hint]


@dataclass(frozen=True)
class WithArguments:
    """What can be written as text: a keyword, and arguments behind it.

    Attributes:
        keyword: what its text begins with; the name of the class, if it has no other.
    """

    keyword: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Name a class that names itself nothing."""
        if "keyword" not in cls.__dict__:
            cls.keyword = cls.__name__

    def __post_init__(self) -> None:
        """Refuse values that an argument cannot have.

        Raises:
            RecipeError: one is of another type, or beyond its bounds.
        """
        for arg in arguments_of(type(self)):
            value = getattr(self, arg.name)
            if not arg.allows(value):
                raise RecipeError(
                    f"'{str(self)[:60]}': {arg.what or arg.key} must be {arg.expected}, got "
                    f"'{_plain(value)[:60]}'."
                )

    def __str__(self) -> str:
        values = [arg.written(getattr(self, arg.name)) for arg in arguments_of(type(self))]
        return ":".join([self.keyword, *filter(None, values)])

    @classmethod
    def summary(cls) -> str:
        """What it does, in one sentence: the first line of its docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    def explain(self) -> str:
        """What it does, its arguments included, in one sentence."""
        given = [arg for arg in arguments_of(type(self)) if getattr(self, arg.name) != arg.default]
        notes = [arg.note for arg in given if arg.note]
        text = self.summary()
        return f"{text.removesuffix('.')}, {', '.join(notes)}." if notes else text


Named = TypeVar("Named", bound=WithArguments)


def parse(cls: type[Named], text: str, kind: str) -> Named:
    """An object of a class from its text, such as ``ghost:affine:rank=64``.

    Args:
        cls: the class of that keyword.
        text: the keyword, and arguments behind it.
        kind: what is named, for messages.

    Raises:
        RecipeError: an argument that the class does not know, or a value that it cannot have.
    """
    arguments = arguments_of(cls)
    known = {arg.key: arg for arg in arguments if not arg.placed}
    places = [arg for arg in arguments if arg.placed]
    words = [*known, *(word for arg in places for word in arg.words)]
    values: dict[str, Any] = {}
    for part in text.split(":")[1:]:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        named = known.get(key)
        if not key or (named is not None and named.name in values):
            raise RecipeError(f"cannot read the {kind} '{text}': expected name:argument:key=value.")
        if named is not None and (named.kind is bool) != bool(equals):
            values[named.name] = named.read(value) if equals else named.default is not True
        elif places and not equals:
            place = places.pop(0)
            values[place.name] = place.read(key)
        else:
            hint = suggest(key, words) if words else "It takes none."
            raise RecipeError(f"'{text}': unknown argument '{key}'. {hint}")
    for arg in arguments:
        if arg.default is MISSING and arg.name not in values:
            raise RecipeError(f"'{text}' lacks {arg.what or arg.key}: {arg.expected}.")
    return cls(**values)
