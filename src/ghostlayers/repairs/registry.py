"""Methods by their keyword: ours, and those of other packages, which an entry point names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Generic

from ghostlayers.errors import RecipeError, first_line, suggest
from ghostlayers.repairs.arguments import Named, WithArguments, parse


class TextOfObject(str):
    """The text of an object whose class no text leads to: it brings the object along.

    Attributes:
        value: the object.
    """

    value: WithArguments


@dataclass(frozen=True)
class Outside:
    """What another package adds.

    Attributes:
        name: its keyword.
        package: with its version.
        summary: one sentence; empty if it cannot be loaded.
        problem: why it cannot be used; empty if it can.
    """

    name: str
    package: str
    summary: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Registry(Generic[Named]):
    """The classes of one kind by their keyword.

    Attributes:
        kind: ``repair`` or ``selection``; the entry points' group is ``ghostlayers.repairs`` or
            ``ghostlayers.selections``.
        base: what every class of it extends.
        own: our own classes.
    """

    kind: str
    base: type[Named]
    own: Mapping[str, type[Named]]
    _loaded: dict[str, type[Named]] = field(default_factory=dict, repr=False)

    def find(self, given: str | Named) -> Named:
        """The object that a text names, or that was given itself.

        Raises:
            RecipeError: there is none; the message names near ones. Or its arguments mean nothing,
                or its package cannot be loaded.
        """
        if isinstance(given, TextOfObject):
            given = given.value  # type: ignore[assignment]
        if isinstance(given, self.base):
            return given
        if not isinstance(given, str):
            what = f"a name or an object of a {self.base.__name__}"
            raise RecipeError(f"a {self.kind} must be {what}, got {given!r:.60}.")
        return parse(self.class_of(given.split(":")[0].strip()), given, self.kind)

    def text_of(self, given: str | Named) -> str:
        """What records hold of it: a text as it is, an object's own.

        Where no text leads back to the object's class, the text brings the object along.

        Raises:
            RecipeError: its class takes the keyword of another.
        """
        if not isinstance(given, self.base):
            return given  # type: ignore[return-value]
        text, known = str(given), self._known(given.keyword)
        if known is type(given):
            return text
        if known is not None:
            raise RecipeError(
                f"the {self.kind} '{text[:60]}' is of a class of yours that takes the keyword of "
                f"another ({known.__module__}.{known.__name__}); give it one of its own."
            )
        carried = TextOfObject(text)
        carried.value = given
        return carried

    def class_of(self, keyword: str) -> type[Named]:
        """The class of a keyword; other packages are asked only for what is not ours.

        Raises:
            RecipeError: there is none, or it cannot be loaded.
        """
        known = self._known(keyword)
        if known is None:
            names = {*self.own, *(entry.name for entry in self._entries())}
            hint = f" {_OF_A_CLASS}" if keyword[:1].isupper() else ""
            raise RecipeError(f"unknown {self.kind} '{keyword}'. {suggest(keyword, names)}{hint}")
        return known

    def _known(self, keyword: str) -> type[Named] | None:
        known = self.own.get(keyword) or self._loaded.get(keyword)
        if known is None and (entries := self._entries(keyword)):
            known = self._loaded[keyword] = self._load(entries)
        return known

    def outside(self) -> list[Outside]:
        """What other packages add, those that cannot be used included."""
        return [self._described(entry) for entry in self._entries()]

    def _described(self, entry: EntryPoint) -> Outside:
        package = _package(entry)
        if entry.name in self.own:
            return Outside(entry.name, package, problem=f"'{entry.name}' is a name of Ghostlayers")
        try:
            return Outside(entry.name, package, self.class_of(entry.name).summary())
        except RecipeError as error:
            return Outside(entry.name, package, problem=str(error))

    def _entries(self, keyword: str | None = None) -> list[EntryPoint]:
        entries = entry_points(group=f"ghostlayers.{self.kind}s")
        return [entry for entry in entries if keyword in (None, entry.name)]

    def _load(self, entries: list[EntryPoint]) -> type[Named]:
        entry = entries[0]
        what = f"the {self.kind} '{entry.name}' comes from the package {_package(entry)}"
        if len(entries) > 1:
            others = " and ".join(sorted({_package(entry) for entry in entries}))
            raise RecipeError(f"the {self.kind} '{entry.name}' is in {others}; uninstall one.")
        try:
            cls = entry.load()
        except Exception as error:  # whatever its import raises
            raise RecipeError(
                f"{what}, whose '{entry.value}' cannot be loaded ({first_line(error)}). Mend or "
                "uninstall that package."
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise RecipeError(f"{what}, whose '{entry.value}' is no {self.base.__name__}.")
        if cls.keyword != entry.name:
            raise RecipeError(
                f"{what}, whose '{entry.value}' has the keyword '{cls.keyword}': its entry point "
                "must be called the same."
            )
        return cls


_OF_A_CLASS = (
    "The name of a class of your own leads nowhere: give an object of it, or install a package "
    "that names it by an entry point."
)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
