"""Files of text by their endings: plain text, and rows of JSON and CSV.

What is read follows from what is wanted, not from how large a source is: lines and blocks of text
are found from random places, rows of tables by their numbers. What can only be read from its start
(compressed files, .csv, a JSON array) gives documents from its first `sources.SCANNED` characters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import IO

from ghostlayers.text import raw
from ghostlayers.text.csv_rows import csv_rows
from ghostlayers.text.json_rows import begins_with_an_object, json_row, json_rows
from ghostlayers.text.raw import COMPRESSIONS, block_at, blocks, check_regular, decode, lines
from ghostlayers.text.rows import PEEK, Row, TextOfRow
from ghostlayers.text.sources import (
    Document,
    OnDisk,
    Reader,
    TextOf,
    different,
    document_of,
    draw_from_stream,
    reading,
)
from ghostlayers.text.tables import ArrowFile, ParquetFile

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File endings, and what they hold. Those of plain text may be followed by a compression's."""


_MISSES = 200
"""Random places in a row that find no new line, after which a file is read from its start."""


def ending_of(path: Path) -> str | None:
    """The ending by which a file is read; None if it is of no known kind."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in FORMATS:
        return endings[-1]
    if len(endings) == 2 and endings[1] in COMPRESSIONS:
        plain = FORMATS.get(endings[0]) in {"text", "json", "csv"}
        return "".join(endings) if plain else None
    return None


def open_file(path: Path, text_of: TextOf) -> Reader:
    """The reader of a file, by its ending.

    Args:
        path: the file.
        text_of: tells how its rows become text.

    Raises:
        CorpusError: it is no file that can be read.
    """
    check_regular(path)
    ending = ending_of(path)
    assert ending is not None
    kind = FORMATS["." + ending.split(".")[1]]
    if kind == "text":
        return TextFile(path)
    if kind == "parquet":
        return ParquetFile(path, text_of)
    if kind == "arrow":
        return ArrowFile(path, text_of)
    rows = json_rows if kind == "json" else partial(csv_rows, tabs=".tsv" in ending)
    return RowFile(path, kind, rows, text_of)


@dataclass(frozen=True)
class TextFile(OnDisk):
    """A text: one document if it is short, else blocks that continue each other."""

    def documents(self) -> Iterator[Document]:
        """The text, or its blocks in order."""
        with reading(self.path, "text"), raw.open_bytes(self.path) as file:
            parts = (decode(data, begin) for begin, data in blocks(file))
            head, length = [], 0
            for part in parts:
                head.append(part)
                length += len(part)
                if length > raw.WHOLE:
                    break
            else:
                yield Document("".join(head))
                return
            for number, part in enumerate(chain(head, parts)):
                yield Document(part, continues=number > 0)

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Blocks from anywhere in the file."""
        if self.path.suffix.lower() in COMPRESSIONS:
            apart = (block._replace(continues=False) for block in self.documents())
            yield from draw_from_stream(apart, random, characters)
            return
        size = self.size()
        with reading(self.path, "text"), raw.open_bytes(self.path) as file:
            for number in different(random, -(-size // raw.BLOCK)):
                begin, data = block_at(file, number, size)
                if data:
                    yield Document(decode(data, begin))


RowsOf = Callable[[IO[bytes]], Iterator[tuple[str, Row, bool]]]
"""Reads rows: where each is, what it holds, and whether that is all of it."""


@dataclass(frozen=True)
class RowFile(OnDisk):
    """JSON or CSV: one document a row."""

    kind: str
    rows: RowsOf
    text_of: TextOf

    def documents(self) -> Iterator[Document]:
        """A document for each row."""
        with reading(self.path, self.kind), raw.open_bytes(self.path) as file:
            rows = self.rows(file)
            head = list(islice(rows, PEEK))
            if head:
                text = self.text_of([row for _, row, _ in head], str(self.path))
                yield from (document_of(text, *row) for row in chain(head, rows))

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Lines from anywhere in the file, if its rows are lines."""
        by_line = self.kind == "json" and self.path.suffix.lower() not in COMPRESSIONS
        with reading(self.path, self.kind), raw.open_bytes(self.path) as file:
            head = list(islice(self.rows(file), PEEK)) if by_line else []
            if head and begins_with_an_object(file):
                text = self.text_of([row for _, row, _ in head], str(self.path))
                yield from self._draw_lines(file, text, random)
                return
        yield from draw_from_stream(self.documents(), random, characters)

    def _draw_lines(self, file: IO[bytes], text: TextOfRow, random: Random) -> Iterator[Document]:
        size, seen, misses = self.size(), set[int](), 0
        while misses < _MISSES:
            begin, line = _line_after(file, int(random.random() * size))
            if begin in seen or not line.strip():
                misses += 1
                continue
            seen.add(begin)
            misses = 0
            yield _line_document(text, begin, line)
        file.seek(0)  # few lines, or very long ones: the others in order
        for begin, line in lines(file):
            if begin not in seen and line.strip():
                yield _line_document(text, begin, line)


def _line_document(text: TextOfRow, begin: int, line: bytes) -> Document:
    where = f"the line at byte {begin:,}"
    row, whole = json_row(line, begin, where)
    return document_of(text, where, row, whole)


def _line_after(file: IO[bytes], place: int) -> tuple[int, bytes]:
    """The first line that begins at a place or behind it; nothing if a long one lies there."""
    if place:
        file.seek(place - 1)
        skipped = file.readline(1 << 20)
        if not skipped.endswith(b"\n"):
            return place, b""
        place += len(skipped) - 1
    else:
        file.seek(0)
    return place, file.readline(raw.MAX_LINE)
