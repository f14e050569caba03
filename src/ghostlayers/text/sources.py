"""What every source of text is: documents in order, or some of them drawn by a seed."""

import csv
import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from ghostlayers.errors import CorpusError, first_line
from ghostlayers.text.raw import DAMAGED
from ghostlayers.text.rows import Row, TextOfRow

SCANNED = 64_000_000
"""Characters that are read of a source that can only be read from its start."""


_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, csv.Error, *DAMAGED)
"""What readers of damaged files raise."""


TextOf = Callable[[Sequence[Row], str], TextOfRow]
"""Tells from the first rows of a source, and its name, how they become text."""


class Document(NamedTuple):
    """One document, or a part of one.

    Attributes:
        text: what it says.
        continues: it goes on where the one before it ended, with nothing between them.
        whole: False if it was too long to be read to its end.
    """

    text: str
    continues: bool = False
    whole: bool = True


class Reader(Protocol):
    """A source of documents."""

    def size(self) -> int:
        """How large it is, in any unit that all files share: bytes on disk."""

    def documents(self) -> Iterator[Document]:
        """All, in order."""

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Different ones in random order, at least so many characters of them if it has so many."""


@dataclass(frozen=True)
class OnDisk:
    """A file."""

    path: Path

    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Every error of a file's reader as one that names the file."""
    try:
        yield
    except CorpusError as error:
        reason = str(error).rstrip(".")
        if str(path) in reason:
            raise
        raise CorpusError(f"cannot read '{path}' as {kind}: {reason}.") from error
    except Exception as error:
        if not isinstance(error, _UNREADABLE) and type(error).__module__ != "pyarrow.lib":
            raise  # our own bug
        raise CorpusError(f"cannot read '{path}' as {kind}: {cause(error)}.") from error


def cause(error: BaseException) -> str:
    """What an error says, in one line, to stand within a sentence."""
    return first_line(error).rstrip(".")


def draw_from_stream(
    documents: Iterator[Document], random: Random, characters: int
) -> Iterator[Document]:
    """Documents drawn from what can only be read in order, of its first `SCANNED` characters.

    Every document gets a random number; those with the lowest are kept.
    """
    heap: list[tuple[float, int, Document]] = []
    held = seen = 0
    for number, document in enumerate(documents):
        heapq.heappush(heap, (-random.random(), number, document))
        held, seen = held + len(document.text), seen + len(document.text)
        while held - len(heap[0][2].text) >= characters:
            held -= len(heapq.heappop(heap)[2].text)
        if seen >= SCANNED:
            break
    yield from (document for *_, document in sorted(heap, reverse=True))


def different(random: Random, count: int) -> Iterator[int]:
    """All numbers below a count in random order, without a list of them."""
    seen: set[int] = set()
    while len(seen) < count // 2:
        number = int(random.random() * count)
        if number not in seen:
            seen.add(number)
            yield number
    rest = [number for number in range(count) if number not in seen]
    random.shuffle(rest)
    yield from rest


def document_of(text: TextOfRow, where: str, row: Row, whole: bool) -> Document:
    """The document that a row is.

    Args:
        text: tells how rows become text.
        where: it is, for messages.
        row: what it holds.
        whole: that is all of it.

    Raises:
        CorpusError: it holds no text where it should.
    """
    try:
        return Document(text.render(row), whole=whole)
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from error
