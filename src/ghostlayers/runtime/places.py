"""Inputs are never outputs: where both really lie, whatever they are called."""

import contextlib
import glob
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ghostlayers.errors import OutputError
from ghostlayers.runtime.files import at_home, exists
from ghostlayers.runtime.outputs import RECORD

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""How llama.cpp names the files that it splits a model into."""

FILES_LOOKED_AT = 20_000
"""Of an input folder: a model has dozens, and no search of a disk shall begin here."""

Input = str | Path | None


def check_apart(inputs: Mapping[str, Iterable[Input]], outputs: Mapping[str, Path | None]) -> None:
    """Refuse outputs that are, contain or lie in an input, or another output.

    Paths are compared by what they lead to: through links, through other names of the same file,
    and through folders that are mounted twice.

    Args:
        inputs: by what they are called; names that are no paths, such as those of a hub, count by
            where their files are kept here.
        outputs: by what they are called; None for none.

    Raises:
        OutputError: with both names.
    """
    wanted = {label: Place(path) for label, path in outputs.items() if path is not None}
    for label, given in inputs.items():
        for path in itertools.chain.from_iterable(map(paths_of, given)):
            for name, place in wanted.items():
                _refuse(place.touches(Place(path)), name, place.path, label, path)
    for (name, place), (other, second) in itertools.combinations(wanted.items(), 2):
        _refuse(place.meets(second), name, place.path, other, second.path)


def _refuse(how: str, name: str, path: Path, label: str, other: Path) -> None:
    if how:
        raise OutputError(
            f"{name} '{path}' {how} {label} '{other}'. What is read is never written to; choose "
            "another place."
        )


class Place:
    """Where a path leads.

    Args:
        path: as it was given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.real = Path(os.path.realpath(path))
        self.at = _number(self.real)
        self.above = {_number(parent) for parent in self.real.parents} - {None}

    def meets(self, other: "Place") -> str:
        """How they are in each other's way; nothing if they are apart."""
        if self.real == other.real or (self.at is not None and self.at == other.at):
            return "is the same as"
        if other.at in self.above or other.real in self.real.parents:
            return "lies in"
        if (self.at is not None and self.at in other.above) or self.real in other.real.parents:
            return "contains"
        return ""

    def touches(self, given: "Place") -> str:
        """As `meets`, with all the files of a folder, which may be links to elsewhere."""
        how = self.meets(given)
        if how or not given.real.is_dir():
            return how
        if any(self.meets(place) for place in _shared_files(given.real)):
            return "is, or holds, a file of"
        return ""


def _number(path: Path) -> tuple[int, int] | None:
    """What the system knows a file or folder by; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _shared_files(folder: Path) -> Iterator[Place]:
    """What in a folder lies elsewhere, or has other names, too."""
    walk = os.walk(folder)
    entries = (Path(where, name) for where, inner, names in walk for name in (*names, *inner))
    for path in itertools.islice(entries, FILES_LOOKED_AT):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode) or (
                stat.S_ISREG(status.st_mode) and status.st_nlink > 1
            ):
                yield Place(path)


def base_of(adapter: str | Path) -> str | None:
    """What the record of an adapter calls its base; None where it does not tell."""
    try:
        record = json.loads((Path(adapter) / RECORD).read_text(encoding="utf-8"))
        name = record["base_model"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def part_name(stem: str, number: int, count: int) -> str:
    """The name of one of several files that a model is split into, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def parts_beside(path: Path) -> list[Path]:
    """The files of a model of which one is named, whether they are there or not; the one alone."""
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    return [path.with_name(part_name(named["stem"], 1 + i, count)) for i in range(count)]


def paths_of(name: Input) -> Iterator[Path]:
    """The paths that may be meant by a name: a path, several joined, a pattern, or a hub's id.

    Of a model that is split into files, all of them.
    """
    for path in _named(name):
        yield path
        yield from (part for part in parts_beside(path) if part != path and exists(part))


def _named(name: Input) -> Iterator[Path]:
    if name is None or str(name) == "":
        return
    text = str(name)
    if isinstance(name, Path):
        yield at_home(name)
        return
    for part in dict.fromkeys((text, *_split(text, ","), *_split(text, "+"))):
        path = at_home(part)
        if exists(path):
            yield path
        elif glob.has_magic(part):
            yield from itertools.islice(_matches(path), FILES_LOOKED_AT)
    yield from _cached(text)


def _matches(pattern: Path) -> Iterator[Path]:
    """The paths that a pattern stands for."""
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    with contextlib.suppress(OSError, ValueError, NotImplementedError):
        yield from fixed.glob(str(pattern.relative_to(fixed)))


def _split(text: str, mark: str) -> list[str]:
    return [part.strip() for whole in text.split(",") for part in whole.split(mark) if part.strip()]


def _cached(name: str) -> Iterator[Path]:
    """Where the hub's files of that name are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for kind in ("models", "datasets"):
        folder = Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
        if exists(folder):
            yield folder
