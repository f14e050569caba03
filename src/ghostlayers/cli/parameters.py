"""The parameters of a command: its own, and those that are made of fields of dataclasses."""

import inspect
import keyword
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

from ghostlayers.cli import options as o
from ghostlayers.runtime.settings import KEY, Setting, fields_of


@dataclass(frozen=True)
class Fields:
    """Beside a parameter's type: its value is made of options that are fields of that type.

    Attributes:
        names: of the fields, as on the screen; among them other parameters' that stand there.
        make: the value from what is given; the type itself if not given.
        of: further types whose fields they may be.
        beside: the command's own parameters that ``make`` is told, too.
    """

    names: str
    make: Callable[..., Any] | None = None
    of: tuple[type, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def order(self) -> list[str]:
        """The names, one by one."""
        return self.names.split()


@dataclass(frozen=True)
class Reading:
    """How a value is typed that is not typed as it is.

    Attributes:
        type: of the option.
        read: makes the field's value of it; told the option's name.
    """

    type: Any
    read: Callable[[Any, str], Any]


READINGS = {
    "name": Reading(str, lambda given, _: given),
    "separator": Reading(str, lambda given, _: o.unescape(given)),
    "separators": Reading(list[str], lambda given, _: [o.unescape(text) for text in given]),
    "names": Reading(str, o.names_in),
    "names or none": Reading(str, lambda given, option: o.names_in(given or None, option)),
    "numbers": Reading(str, lambda given, option: o.numbers_in(given, option, "3,5,7")),
    "corpora": Reading(str, o.corpora_in),
    "corpora or none": Reading(str, lambda given, option: o.corpora_in(given or None, option)),
    "path": Reading(Path, lambda given, _: str(given)),
}
"""By the names that settings have for them."""


_DEBUG = inspect.Parameter(
    "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=o.Debug
)


class Parameters:
    """What a command takes on the command line, and what its function takes.

    Args:
        function: a parameter whose type is annotated with `Fields` stands for several options.
        debug: add ``--debug``, which is for what calls it alone.

    Attributes:
        signature: of the command, one parameter an option.
    """

    def __init__(self, function: Callable[..., None], *, debug: bool = True) -> None:
        self._own = dict(inspect.signature(function, eval_str=True).parameters)
        made = {name: _fields_in(parameter.annotation) for name, parameter in self._own.items()}
        self._made = {name: fields for name, fields in made.items() if fields is not None}
        flat = self._flat()
        if debug:
            flat.setdefault("debug", _DEBUG)
        keyword = inspect.Parameter.KEYWORD_ONLY
        self.signature = inspect.Signature(
            [parameter.replace(kind=keyword) for parameter in flat.values()]
        )

    def _flat(self) -> dict[str, inspect.Parameter]:
        """Parameters in the order of the screen, by field or own name."""
        flat: dict[str, inspect.Parameter] = {}
        for name, own in self._own.items():
            if name not in self._made:
                flat.setdefault(name, own)
                continue
            fields, owners = self._made[name]
            flat |= {n: self._own.get(n) or _parameter_of(n, owners) for n in fields.order}
        return flat

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the function takes, of the options that were given."""
        bound = self.signature.bind(**given)
        bound.apply_defaults()
        return {name: self._argument(name, bound.arguments) for name in self._own}

    def _argument(self, name: str, given: Mapping[str, Any]) -> Any:
        if name not in self._made:
            return given[name]
        fields, owners = self._made[name]
        values = {own: given[own] for own in fields.beside}
        for field in fields.order:
            if field in self._own:
                continue
            how = _setting(field, owners)
            typed = given[parameter_name(field, how)]
            if typed is not None:
                read = READINGS[how.read].read if how.read else _as_it_is
                values[field] = read(typed, option_name(field, how))
        return (fields.make or owners[0])(**values)


def _fields_in(annotation: Any) -> tuple[Fields, tuple[type, ...]] | None:
    """The fields that a parameter is made of, and the classes that have them; None if it is not."""
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, Fields):
            return note, (annotation.__origin__, *note.of)
    return None


def _setting(name: str, owners: Sequence[type]) -> Setting:
    """How a field is asked for, of the first class that has one of that name."""
    how: Setting = next(f[name] for f in map(fields_of, owners) if name in f).metadata[KEY]
    return how


def option_name(name: str, how: Setting) -> str:
    """A field's name on the command line."""
    return how.option or f"--{name.replace('_', '-')}"


def parameter_name(name: str, how: Setting) -> str:
    """A field's name in recipes, and as a parameter of the command, where Python lets it be one."""
    called = option_name(name, how).removeprefix("--").replace("-", "_")
    return name if keyword.iskeyword(called) else called


def option_for(owner: type, name: str) -> Any:
    """The option of a class's field."""
    field = fields_of(owner)[name]
    how: Setting = field.metadata[KEY]
    long = option_name(name, how) + (f"/{how.off}" if how.off else "")
    return o.option(
        *filter(None, (long, how.short)),
        text=_say(how, field.default),
        panel=how.panel,
        metavar=how.metavar,
        min=how.least,
        envvar=how.variable,
    )


def _parameter_of(name: str, owners: Sequence[type]) -> inspect.Parameter:
    """The parameter of a field, of the first class that has one of that name."""
    owner = next(one for one in owners if name in fields_of(one))
    field = fields_of(owner)[name]
    how: Setting = field.metadata[KEY]
    kind = READINGS[how.read].type if how.read else typing.get_type_hints(owner)[name]
    needed = field.default is MISSING
    return inspect.Parameter(
        parameter_name(name, how),
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if needed else None,
        annotation=Annotated[kind if needed else kind | None, option_for(owner, name)],
    )


def _say(how: Setting, default: Any) -> str:
    """Help that states the default and, where it differs, what --preset ghosted sets."""
    if how.says == "" or (how.says is None and default in (MISSING, None, ())):
        return how.text
    ours = how.says or default
    differs = how.paper is not None and how.paper != default and str(how.paper) != str(ours)
    return f"{how.text} [default: {ours}{f'; ghosted: {how.paper}' if differs else ''}]"


def _as_it_is(value: Any, option: str) -> Any:
    del option
    return value
