"""Rows of tables in text, whose first line names their columns."""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import IO, Any

from ghostlayers.errors import CorpusError
from ghostlayers.text import raw
from ghostlayers.text.raw import decode, lines
from ghostlayers.text.rows import Row, check_unique
from ghostlayers.text.sources import cause

_NO_NAME = re.compile(r"[+-]?[\d.,:/_ TZ+-]*\d[\d.,:/_ TZ+-]*([eE][+-]?\d+)?|[\da-fA-F-]{16,}")
"""Numbers, dates, times, hashes and UUIDs: no column is called so."""


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
    before = csv.field_size_limit(raw.MAX_LINE)
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
    check_unique(names)
