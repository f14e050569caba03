"""Tables whose rows can be asked for by number: lists, datasets, Arrow and parquet files."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from ghostlayers.errors import CorpusError
from ghostlayers.text import raw
from ghostlayers.text.rows import PEEK, Row, TextOfRow, check_unique
from ghostlayers.text.sources import (
    Document,
    OnDisk,
    TextOf,
    different,
    document_of,
    draw_from_stream,
    reading,
)

_MAX_CELL = 1 << 25
"""Bytes of a table's cells, on average, beyond which a file is refused: they are read at once."""


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
        yield from self._at(different(random, self.count))

    def _at(self, numbers: Iterable[int]) -> Iterator[Document]:
        with reading(Path(self.name), self.kind):
            if self.count:
                head = [self.row(number) for number in range(min(PEEK, self.count))]
                text = self.text_of(head, self.name)
                for number in numbers:
                    yield document_of(text, f"row {number:,}", self.row(number), True)


@dataclass(frozen=True)
class ArrowFile(OnDisk):
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
        with reading(self.path, "arrow"):
            mapped = pa.memory_map(str(self.path))
            try:
                table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(mapped).read_all()
            check_unique(table.column_names)

        def row(number: int) -> Row:
            content: Row = table.slice(number, 1).to_pylist()[0]
            return content

        return Rows(str(self.path), table.num_rows, row, self.text_of, "arrow")


@dataclass(frozen=True)
class ParquetFile(OnDisk):
    """A parquet file: only the columns of text are read, and only the groups of rows wanted."""

    text_of: TextOf

    def documents(self) -> Iterator[Document]:
        """A document for each row."""
        return self._documents(lambda table, _: range(table.metadata.num_row_groups))

    def draw(self, random: Random, characters: int) -> Iterator[Document]:
        """Rows of some groups, in random order."""
        rows = self._documents(lambda table, text: _draw_groups(table, text, random, characters))
        return draw_from_stream(rows, random, characters)

    def _documents(
        self, choose_groups: Callable[[Any, TextOfRow], Iterable[int]]
    ) -> Iterator[Document]:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        if not self.size():
            return
        with (
            reading(self.path, "parquet"),
            pq.ParquetFile(self.path, buffer_size=raw.BLOCK, pre_buffer=False) as table,
        ):
            text = self._text(table)
            if text is None:
                return
            rows = _rows_of(table, choose_groups(table, text), text)
            for number, row in enumerate(rows, 1):
                yield document_of(text, f"row {number:,}", row, True)

    def _text(self, table: Any) -> TextOfRow | None:
        """How rows become text; None if there are no rows."""
        groups = range(table.metadata.num_row_groups)
        filled = [group for group in groups if table.metadata.row_group(group).num_rows]
        if not filled:
            return None
        check_unique(table.schema_arrow.names)
        _check_cells(table.metadata.row_group(filled[0]))
        batch = next(table.iter_batches(batch_size=PEEK, row_groups=filled[:1]))
        return self.text_of(batch.to_pylist(), str(self.path))


def _rows_of(table: Any, groups: Iterable[int], text: TextOfRow) -> Iterator[Row]:
    for group in groups:
        _check_cells(table.metadata.row_group(group), text)
        batches = table.iter_batches(
            batch_size=16, row_groups=[group], columns=list(text.columns), use_threads=False
        )
        yield from chain.from_iterable(batch.to_pylist() for batch in batches)


def _draw_groups(table: Any, text: TextOfRow, random: Random, characters: int) -> Iterator[int]:
    """Groups of rows in random order, until they hold a few times what is wanted."""
    held = 0
    for group in different(random, table.metadata.num_row_groups):
        yield group
        held += _bytes_of(table.metadata.row_group(group), text)
        if held >= 4 * characters:
            return


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
