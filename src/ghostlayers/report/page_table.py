"""Tables as the page's template shows them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A row of a table: its texts, a class, and the share that is drawn behind one of them."""

    texts: Sequence[str]
    kind: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table whose rows' first texts name them.

    Attributes:
        head: the names of the columns.
        rows: what stands under them.
        caption: what it shows.
        bar: the column that a row's share is drawn in.
        mark: the column that a row's class colours.
    """

    head: Sequence[str]
    rows: Sequence[Line]
    caption: str = ""
    bar: int | None = None
    mark: int | None = None

    @property
    def words(self) -> set[int]:
        """The columns of words, which stand at the left."""
        columns = enumerate(zip(*(row.texts for row in self.rows), strict=True))
        return {place for place, texts in columns if any(map(_has_letters, texts))} | {0}


def _has_letters(text: str) -> bool:
    return any(letter.isalpha() for letter in text)


def plain(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Table:
    """A table without bars and classes."""
    return Table(head, [Line(row) for row in rows], caption)
