"""Rows of JSON: lines, an array however long it is, or an object that holds one."""

import codecs
import json
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Any

from ghostlayers.errors import CorpusError
from ghostlayers.text import raw
from ghostlayers.text.raw import decode, lines
from ghostlayers.text.rows import Row, check_unique
from ghostlayers.text.sources import cause


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_unique([name for name, _ in pairs], "values")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_as_object)

_CONTAINERS = ("data", "rows", "examples")
"""What the array is called in an object that holds a data set."""


def json_rows(file: IO[bytes]) -> Iterator[tuple[str, Row, bool]]:
    """Rows of JSON lines, of an array, or of a short object that holds an array."""
    numbered = enumerate(lines(file), 1)
    head = next((entry for entry in numbered if entry[1][1].strip()), None)
    if head is None:
        return
    _, (begin, line) = head
    start = line.removeprefix(codecs.BOM_UTF8).strip()
    if start.startswith(b"["):
        yield from _array_rows(_text_chunks(line, begin, file))
    elif start.startswith(b"{") and line.endswith(b"\n") and not start.endswith(b"}"):
        yield from _object_rows(line, begin, f"line {head[0]:,}", file)
    else:
        for number, (place, line) in chain([head], numbered):
            if line.strip():
                where = f"line {number:,}"
                row, whole = json_row(line, place, where)
                yield from ((where, item, whole) for item in rows_in(row, where))


def begins_with_an_object(file: IO[bytes]) -> bool:
    """Whether the file's first line is a whole row: JSON lines, not an array or a data set."""
    file.seek(0)
    first = next((line for _, line in lines(file) if line.strip()), b"")
    bare = first.removeprefix(codecs.BOM_UTF8).strip()
    if not bare.startswith(b"{") or (len(first) < raw.MAX_LINE and not bare.endswith(b"}")):
        return False
    row, _ = json_row(first, 0, "line 1")
    return next(rows_in(row, "line 1")) is row


def rows_in(row: Row, where: str) -> Iterator[Row]:
    """A row; or those that it holds, where a whole data set is one object."""
    for name in _CONTAINERS:
        items = row.get(name)
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
            yield from (_as_row(item, where) for item in items)
            return
    yield row


def json_row(line: bytes, begin: int, where: str) -> tuple[Row, bool]:
    """One line as a row, and whether all of it was read."""
    whole = len(line) < raw.MAX_LINE or line.endswith(b"\n")
    try:
        if not whole:
            line = line[: last_character(line)]
        value = _parse(decode(line, begin), whole=whole)
    except ValueError as error:
        reason = f"{where}: {cause(error)}"
        raise CorpusError(reason if whole else f"{reason}; it is longer than 16 MB") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: it is nested too deeply") from error
    return _as_row(value, where), whole


def last_character(line: bytes) -> int:
    """Where the last character ends that is all there."""
    end = len(line)
    while end and line[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(0, end - 1)


def _parse(text: str, *, whole: bool) -> Any:
    if whole:
        return _DECODER.decode(text)
    tail = text.rfind("\\", len(text) - 12)  # an escape that is cut must go
    text = text if tail < 0 else text[:tail].rstrip("\\")
    for closing in ('"}', '"}]}', '"]}'):
        try:
            return _DECODER.decode(text + closing)
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
            behind = buffer[place : place + 20]
            raise CorpusError(f"item {number:,}: expected a comma behind it, got {behind!r}")
    rest = buffer[_after_space(buffer, place) + 1 :].strip()
    if behind := (rest or "".join(chunk[:20] for chunk in islice(chunks, 1)).strip())[:20]:
        raise CorpusError(f"the array ends, and more stands behind it: {behind!r}")


def _after_space(buffer: str, place: int) -> int:
    while buffer[place : place + 1].isspace():
        place += 1
    return place


def _next_item(buffer: str, place: int, chunks: Iterator[str], where: str) -> tuple[Any, str, int]:
    """The value at a place of a text that goes on in chunks, the text, and what follows there."""
    while True:
        try:
            value, end = _DECODER.raw_decode(buffer, _after_space(buffer, place))
            end = _after_space(buffer, end)
            if end < len(buffer):
                return value, buffer, end
            reason: Exception = ValueError("the array is cut off")
        except (ValueError, RecursionError) as error:
            reason = error
        buffer, place = buffer[place:], 0
        more = next(chunks, "") if len(buffer) < raw.MAX_LINE else ""
        if not more:
            raise CorpusError(f"{where}: {cause(reason)}") from reason
        buffer += more


def _text_chunks(head: bytes, begin: int, file: IO[bytes]) -> Iterator[str]:
    """A file as text, in chunks that grow, so that a long item is not tried too often."""
    size, left = raw.BLOCK, head
    while data := left + file.read(size):
        last = len(data) == len(left)  # the end of the file
        end = len(data) if last else last_character(data)
        yield decode(data[:end], begin)
        begin, left = begin + end, data[end:]
        size = min(2 * size, 1 << 20)


def _object_rows(
    line: bytes, begin: int, where: str, file: IO[bytes]
) -> Iterator[tuple[str, Row, bool]]:
    """One object over many lines: the only array of rows in it, or itself a row."""
    try:
        value = _DECODER.decode(decode(line + file.read(raw.MAX_LINE), begin))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorpusError):
            raise
        json_row(line, begin, where)  # JSON lines of which the first is broken
        raise CorpusError(cause(error)) from error
    for number, row in enumerate(rows_in(_as_row(value, where), where), 1):
        yield f"item {number:,}", row, True
