"""Settings: fields of dataclasses that say how they are asked for.

What a command line shows, what a file may hold and what `help` prints of a class are all made from
them, so that an option is written once.
"""

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any, TypeVar

WHAT = "What to do"
BUDGET = "A budget instead of a number of layers"
TEXT = "Calibration text"
FIT = "Fit"
HOW = "How to run"
"""Groups of settings, as help shows them."""

KEY = "setting"
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """How a field is asked for.

    Attributes:
        text: what help says.
        panel: the group it is shown in.
        says: its default, as help says it; None for the default itself, if there is one, and empty
            for nothing.
        paper: what the paper's preset sets, shown where it is another value.
        short: another, short name on the command line: ``-n``.
        off: the name that switches it off: ``--no-iterative``.
        option: its name on the command line, where that is not the field's.
        metavar: stands for its value in help.
        least: the smallest number that it may be.
        variable: of the environment, which says its value where the option is not given.
        read: how its value is typed, where it is not typed as it is (see ``cli.options``).
        number: of text: a number may stand for it, in Python and in YAML.
    """

    text: str
    panel: str = HOW
    says: str | None = None
    paper: Any = None
    short: str = ""
    off: str = ""
    option: str = ""
    metavar: str | None = None
    least: int | None = None
    variable: str | None = None
    read: str = ""
    number: bool = False


def setting(default: Any, text: str, panel: str = HOW, **how: Any) -> Any:
    """A field with a default that can be asked for; what else is given, see `Setting`."""
    return dataclasses.field(default=default, metadata={KEY: Setting(text, panel, **how)})


def required(text: str, panel: str = HOW, **how: Any) -> Any:
    """A field without a default that can be asked for."""
    return dataclasses.field(metadata={KEY: Setting(text, panel, **how)})


def same_as(owner: type, name: str, **otherwise: Any) -> Any:
    """A field that is asked for as one of another class is."""
    known = fields_of(owner)[name]
    how = dataclasses.replace(known.metadata[KEY], **otherwise)
    return dataclasses.field(default=known.default, metadata={KEY: how})


def fields_of(owner: type) -> "dict[str, dataclasses.Field[Any]]":
    """The fields of a class that can be asked for, by name."""
    return {field.name: field for field in dataclasses.fields(owner) if KEY in field.metadata}


def write_numbers(asked: Any) -> None:
    """Turn numbers into the text that they stand for, where a setting says that they may be one."""
    for name, field in fields_of(type(asked)).items():
        value = getattr(asked, name)
        if field.metadata[KEY].number and type(value) in (int, float):
            object.__setattr__(asked, name, repr(value))


def documented(owner: type[T]) -> type[T]:
    """Write the settings of a dataclass into its docstring."""
    lines = ["", "", "Attributes:"]
    for name, field in fields_of(owner).items():
        wrap = textwrap.TextWrapper(96, initial_indent="    ", subsequent_indent="        ")
        lines += wrap.wrap(f"{name}: {field.metadata[KEY].text}")
    owner.__doc__ = (owner.__doc__ or "").rstrip() + "\n".join(lines) + "\n"
    return owner
