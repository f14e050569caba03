"""Files and tables of text: their documents in order, or some of them drawn by a seed.

What is read follows from what is wanted, not from how large a source is: lines and blocks of text
are found from random places, rows of tables by their numbers. What can only be read from its start
(compressed files, .csv, a JSON array) gives documents from its first `SCANNED` characters.
"""

import codecs
import csv
import heapq
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple, Protocol

from ghostlayers.errors import CorpusError, first_line
from ghostlayers.text.raw import (
    BLOCK,
    COMPRESSIONS,
    DAMAGED,
    MAX_LINE,
    WHOLE,
    block_at,
    blocks,
    check_regular,
    decode,
    lines,
    open_bytes,
)
from ghostlayers.text.rows import PEEK, Row, TextOfRow

SCANNED = 64_000_000
"""Characters that are read of a source that can only be read from its start."""

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

_MAX_CELL = 1 << 25
"""Bytes of a table's cells, on average, beyond which a file is refused: they are read at once."""

_CONTAINERS = ("data", "rows", "examples")
"""What the array is called in an object that holds a data set."""

_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, csv.Error, *DAMAGED)
"""What readers of damaged files raise."""

_NO_NAME = re.compile(r"[+-]?[\d.,:/_ TZ+-]*\d[\d.,:/_ TZ+-]*([eE][+-]?\d+)?|[\da-fA-F-]{16,}")
"""Numbers, dates, times, hashes and UUIDs: no column is called so."""

_MISSES = 200
"""Random places in a row that find no new line, after which a file is read from its start."""

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


def ending_of(path: Path) -> str | None:
    """The ending by which a file is read; None if it is of no known kind."""
    endings = [each.lower() for each in path.suffixes[-2:]]
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


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
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
    kept: list[tuple[float, int, Document]] = []
    held = seen = 0
    for number, document in enumerate(documents):
        heapq.heappush(kept, (-random.random(), number, document))
        held, seen = held + len(document.text), seen + len(document.text)
        while held - len(kept[0][2].text) >= characters:
            held -= len(heapq.heappop(kept)[2].text)
        if seen >= SCANNED:
            break
    yield from (document for *_, document in sorted(kept, reverse=True))


# Plain text


@dataclass(frozen=True)
class _OnDisk:
    """A file."""

    path: Path

    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class TextFile(_OnDisk):
    """A text: one document if it is short, else blocks that continue each other."""

    def documents(self) -> Iterator[Document]:
        """The text, or its blocks in order."""
        with _reading(self.path, "text"), open_bytes(self.path) as file:
            parts = (decode(data, begin) for begin, data in blocks(file))
            head, length = [], 0
            for part in parts:
                head.append(part)
                length += len(part)
                if length > WHOLE:
                    break
            else:
                yield Document("".join(head))
                return
            for number, part in enumerate(chain(head, parts)):
                yield Document(part, continues=number > 0)

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Blocks from anywhere in the file."""
        if self.path.suffix.lower() in COMPRESSIONS:
            apart = (each._replace(continues=False) for each in self.documents())
            yield from draw_from_stream(apart, random, characters)
            return
        size = self.size()
        with _reading(self.path, "text"), open_bytes(self.path) as file:
            for number in _different(random, -(-size // BLOCK)):
                begin, data = block_at(file, number, size)
                if data:
                    yield Document(decode(data, begin))


def _different(random: Random, count: int) -> Iterator[int]:
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


# Lines and rows


RowsOf = Callable[[IO[bytes]], Iterator[tuple[str, Row, bool]]]
"""Reads rows: where each is, what it holds, and whether that is all of it."""


@dataclass(frozen=True)
class RowFile(_OnDisk):
    """JSON or CSV: one document a row."""

    kind: str
    rows: RowsOf
    text_of: TextOf

    def documents(self) -> Iterator[Document]:
        """A document for each row."""
        with _reading(self.path, self.kind), open_bytes(self.path) as file:
            rows = self.rows(file)
            head = list(islice(rows, PEEK))
            if head:
                text = self.text_of([row for _, row, _ in head], str(self.path))
                yield from (_document(text, *each) for each in chain(head, rows))

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Lines from anywhere in the file, if its rows are lines."""
        by_line = self.kind == "json" and self.path.suffix.lower() not in COMPRESSIONS
        with _reading(self.path, self.kind), open_bytes(self.path) as file:
            head = list(islice(self.rows(file), PEEK)) if by_line else []
            if head and _is_object(file):
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
    row, whole = _json_row(line, begin, where)
    return _document(text, where, row, whole)


def _is_object(file: IO[bytes]) -> bool:
    """Whether the file's first line is a whole row: JSON lines, not an array or a data set."""
    file.seek(0)
    first = next((line for _, line in lines(file) if line.strip()), b"")
    bare = first.removeprefix(codecs.BOM_UTF8).strip()
    if not bare.startswith(b"{") or (len(first) < MAX_LINE and not bare.endswith(b"}")):
        return False
    row, _ = _json_row(first, 0, "line 1")
    return next(_rows_in(row, "line 1")) is row


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
    return place, file.readline(MAX_LINE)


def _document(text: TextOfRow, where: str, row: Row, whole: bool) -> Document:
    try:
        return Document(text.render(row), whole=whole)
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from error


def json_rows(file: IO[bytes]) -> Iterator[tuple[str, Row, bool]]:
    """Rows of JSON lines, of an array, or of a short object that holds an array."""
    numbered = enumerate(lines(file), 1)
    head = next((each for each in numbered if each[1][1].strip()), None)
    if head is None:
        return
    _, (begin, line) = head
    start = line.removeprefix(codecs.BOM_UTF8).strip()
    if start.startswith(b"["):
        yield from _array_rows(_text_chunks(line, begin, file))
    elif start.startswith(b"{") and line.endswith(b"\n") and not start.endswith(b"}"):
        yield from _object_rows(line, begin, f"line {head[0]:,}", file)
    else:
        for number, (place, each) in chain([head], numbered):
            if each.strip():
                where = f"line {number:,}"
                row, whole = _json_row(each, place, where)
                yield from ((where, item, whole) for item in _rows_in(row, where))


def _rows_in(row: Row, where: str) -> Iterator[Row]:
    """A row; or those that it holds, where a whole data set is one object."""
    for name in _CONTAINERS:
        items = row.get(name)
        if isinstance(items, list) and items and all(isinstance(each, dict) for each in items):
            yield from (_as_row(each, where) for each in items)
            return
    yield row


def _json_row(line: bytes, begin: int, where: str) -> tuple[Row, bool]:
    """One line as a row, and whether all of it was read."""
    whole = len(line) < MAX_LINE or line.endswith(b"\n")
    try:
        if not whole:
            line = line[: _last_character(line)]
        value = _parse(decode(line, begin), whole=whole)
    except ValueError as error:
        reason = f"{where}: {cause(error)}"
        raise CorpusError(reason if whole else f"{reason}; it is longer than 16 MB") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: it is nested too deeply") from error
    return _as_row(value, where), whole


def _last_character(line: bytes) -> int:
    """Where the last character ends that is all there."""
    end = len(line)
    while end and line[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(0, end - 1)


def _parse(text: str, *, whole: bool) -> Any:
    if whole:
        return json.loads(text)
    tail = text.rfind("\\", len(text) - 12)  # an escape that is cut must go
    text = text if tail < 0 else text[:tail].rstrip("\\")
    for closing in ('"}', '"}]}', '"]}'):
        try:
            return json.loads(text + closing)
        except ValueError:
            continue
    raise ValueError("a value is cut off")


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise CorpusError(f"{where}: expected an object with a column of text, got {value!r:.60}")


def _array_rows(chunks: Iterator[str]) -> Iterator[tuple[str, Row, bool]]:
    """The items of an array, however long it is, one at a time."""
    buffer, place, number = next(chunks, "").lstrip(), 1, 0  # behind the bracket
    while not buffer.startswith("]", _after_space(buffer, place)):
        number += 1
        value, buffer, place = _next_item(buffer, place, chunks, f"item {number:,}")
        yield f"item {number:,}", _as_row(value, f"item {number:,}"), True
        if buffer[place] == ",":
            place += 1
        elif buffer[place] != "]":
            found = buffer[place : place + 20]
            raise CorpusError(f"item {number:,}: expected a comma behind it, got {found!r}")
    rest = buffer[_after_space(buffer, place) + 1 :].strip()
    if found := (rest or "".join(chunk[:20] for chunk in islice(chunks, 1)).strip())[:20]:
        raise CorpusError(f"the array ends, and more stands behind it: {found!r}")


def _after_space(buffer: str, place: int) -> int:
    while buffer[place : place + 1].isspace():
        place += 1
    return place


def _next_item(buffer: str, place: int, chunks: Iterator[str], where: str) -> tuple[Any, str, int]:
    """The value at a place of a text that goes on in chunks, the text, and what follows there."""
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(buffer, _after_space(buffer, place))
            end = _after_space(buffer, end)
            if end < len(buffer):
                return value, buffer, end
            reason: Exception = ValueError("the array is cut off")
        except (ValueError, RecursionError) as error:
            reason = error
        buffer, place = buffer[place:], 0
        more = next(chunks, "") if len(buffer) < MAX_LINE else ""
        if not more:
            raise CorpusError(f"{where}: {cause(reason)}") from reason
        buffer += more


def _text_chunks(head: bytes, begin: int, file: IO[bytes]) -> Iterator[str]:
    """A file as text, in chunks that grow, so that a long item is not tried too often."""
    size, left = BLOCK, head
    while data := left + file.read(size):
        last = len(data) == len(left)  # the end of the file
        end = len(data) if last else _last_character(data)
        yield decode(data[:end], begin)
        begin, left = begin + end, data[end:]
        size = min(2 * size, 1 << 20)


def _object_rows(
    line: bytes, begin: int, where: str, file: IO[bytes]
) -> Iterator[tuple[str, Row, bool]]:
    """One object over many lines: the only array of rows in it, or itself a row."""
    try:
        value = json.loads(decode(line + file.read(MAX_LINE), begin))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorpusError):
            raise
        _json_row(line, begin, where)  # JSON lines of which the first is broken
        raise CorpusError(cause(error)) from error
    for number, row in enumerate(_rows_in(_as_row(value, where), where), 1):
        yield f"item {number:,}", row, True


def csv_rows(file: IO[bytes], *, tabs: bool) -> Iterator[tuple[str, Row, bool]]:
    """Rows of a table whose first line names its columns."""
    texts = (decode(data, begin) for begin, data in lines(file))
    head = next(texts, "")
    reader = csv.reader(chain([head], texts), delimiter=_delimiter(head, tabs), strict=True)
    names = _next_row(reader)
    if names is None:
        return
    _check_header(names)
    while (values := _next_row(reader)) is not None:
        if not values:
            continue
        where = f"line {reader.line_num:,}"
        if len(values) > len(names):
            raise CorpusError(f"{where}: {len(values)} values for {len(names)} columns")
        yield where, dict(zip(names, values, strict=False)), True


def _delimiter(head: str, tabs: bool) -> str:
    """What stands between the names of columns: the usual sign, or another if that is not there."""
    usual = "\t" if tabs else ","
    return next((sign for sign in (usual, ";", "\t", "|", ",") if sign in head), usual)


def _next_row(reader: Any) -> list[str] | None:
    """The next row of a reader; the limit of a cell's size, one for all readers, is put back."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise CorpusError(f"line {reader.line_num:,}: {cause(error)}") from error
    finally:
        csv.field_size_limit(before)


def _check_header(names: Sequence[str]) -> None:
    """Refuse a first line that looks like text rather than names of columns."""
    for name in names:
        if (
            _NO_NAME.fullmatch(name.strip())
            or len(name) > 60
            or name.rstrip().endswith((".", "!", "?"))
            or " , " in name
        ):
            raise CorpusError(
                f"the first line names no columns: it has '{name[:40]}'. Put a line with their "
                "names before it, such as: text"
            )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise CorpusError(f"two columns are called '{twice[0]}'")


# Tables with numbered rows


@dataclass(frozen=True)
class Rows:
    """Rows that can be asked for by number: a list, a dataset, an Arrow file."""

    name: str
    count: int
    row: Callable[[int], Row]
    text_of: TextOf
    kind: str = "a dataset"

    def size(self) -> int:
        """Rows; there is no other source beside it."""
        return self.count

    def documents(self) -> Iterator[Document]:
        """A document for each row."""
        yield from self._at(range(self.count))

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Rows from anywhere."""
        del characters
        yield from self._at(_different(random, self.count))

    def _at(self, numbers: Any) -> Iterator[Document]:
        with _reading(Path(self.name), self.kind):
            if self.count:
                head = [self.row(number) for number in range(min(PEEK, self.count))]
                text = self.text_of(head, self.name)
                for number in numbers:
                    yield _document(text, f"row {number:,}", self.row(number), True)


@dataclass(frozen=True)
class ArrowFile(_OnDisk):
    """An Arrow file, as a stream or for random access; it is mapped, not read."""

    text_of: TextOf

    def documents(self) -> Iterator[Document]:
        """A document for each row."""
        return self._rows().documents()

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Rows from anywhere in the file."""
        return self._rows().draw(random, characters)

    def _rows(self) -> Rows:
        import pyarrow as pa  # type: ignore[import-untyped]

        if not self.size():
            return Rows(str(self.path), 0, lambda _: {}, self.text_of, "arrow")
        with _reading(self.path, "arrow"):
            mapped = pa.memory_map(str(self.path))
            try:
                batches = list(pa.ipc.open_stream(mapped))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(mapped)
                batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        ends = list(accumulate(batch.num_rows for batch in batches))

        def row(number: int) -> Row:
            batch = bisect_right(ends, number)
            first = ends[batch] - batches[batch].num_rows
            found: Row = batches[batch].slice(number - first, 1).to_pylist()[0]
            return found

        return Rows(str(self.path), ends[-1] if ends else 0, row, self.text_of, "arrow")


@dataclass(frozen=True)
class ParquetFile(_OnDisk):
    """A parquet file: only the columns of text are read, and only the groups of rows wanted."""

    text_of: TextOf

    def documents(self) -> Iterator[Document]:
        """A document for each row."""
        if not self.size():
            return
        with _reading(self.path, "parquet"), self._open() as table:
            text = self._text(table)
            if text is not None:
                groups = range(table.metadata.num_row_groups)
                yield from (each for _, each in self._rows_of(table, groups, text))

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Rows of some groups, in random order."""
        if not self.size():
            return
        with _reading(self.path, "parquet"), self._open() as table:
            text = self._text(table)
            if text is not None:
                groups = self._draw_groups(table, text, random, characters)
                rows = (each for _, each in self._rows_of(table, groups, text))
                yield from draw_from_stream(rows, random, characters)

    def _open(self) -> Any:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        return pq.ParquetFile(self.path, buffer_size=BLOCK, pre_buffer=False)

    def _text(self, table: Any) -> TextOfRow | None:
        """How rows become text; None if there are no rows."""
        groups = range(table.metadata.num_row_groups)
        filled = [group for group in groups if table.metadata.row_group(group).num_rows]
        if not filled:
            return None
        _check_cells(table.metadata.row_group(filled[0]))
        batch = next(table.iter_batches(batch_size=PEEK, row_groups=filled[:1]))
        return self.text_of(batch.to_pylist(), str(self.path))

    def _rows_of(
        self, table: Any, groups: Sequence[int], text: TextOfRow
    ) -> Iterator[tuple[int, Document]]:
        number = 0
        for group in groups:
            _check_cells(table.metadata.row_group(group), text)
            batches = table.iter_batches(
                batch_size=16, row_groups=[group], columns=list(text.columns), use_threads=False
            )
            for row in chain.from_iterable(batch.to_pylist() for batch in batches):
                number += 1
                yield number, _document(text, f"row {number:,}", row, True)

    def _draw_groups(
        self, table: Any, text: TextOfRow, random: Random, characters: int
    ) -> list[int]:
        """Groups of rows in random order, until they hold a few times what is wanted."""
        chosen: list[int] = []
        held = 0
        for group in _different(random, table.metadata.num_row_groups):
            chosen.append(group)
            held += _bytes_of(table.metadata.row_group(group), text)
            if held >= 4 * characters:
                break
        return chosen


def _check_cells(group: Any, text: TextOfRow | None = None) -> None:
    average = _bytes_of(group, text) // max(1, group.num_rows)
    if average > _MAX_CELL:
        raise CorpusError(
            f"its rows hold {average / 1e6:,.0f} MB on average, and are read at once; split them "
            "into documents, or write the text to a .txt file"
        )


def _bytes_of(group: Any, text: TextOfRow | None = None) -> int:
    """Bytes that the columns of text take in a group of rows; all, where it is not known yet."""
    columns = [group.column(index) for index in range(group.num_columns)]
    return sum(
        int(column.total_uncompressed_size)
        for column in columns
        if text is None or column.path_in_schema.split(".")[0] in text.columns
    )
