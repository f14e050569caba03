"""Numbers and their meaning as a reader sees them."""

from collections.abc import Iterable, Sequence

from ghostlayers.report.summary import Entry

NOTHING = "–"  # noqa: RUF001  what stands where nothing was measured


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with this many decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}%"


def whole(value: float | None) -> str:
    """A whole number with commas between the thousands."""
    return NOTHING if value is None else f"{round(value):,}"


def winners(best: Sequence[Entry]) -> str:
    """The winners in words; one that wins everywhere is named once."""
    if len({entry.key.repair for entry in best}) > 1 or len(best) == 1:
        return " ".join(map(_winner, best))
    text = f"{best[0].key.repair} loses least, with {_and(str(e.key.layers) for e in best)} removed"
    for join, owner, shares in (
        (": ", "Ghost's", [entry.of_ghost for entry in best]),
        (", and ", "the unrepaired cut's", [entry.of_none for entry in best]),
    ):
        if None not in shares:
            text += f"{join}{_and(percent(share) for share in shares)} of {owner} excess loss"
    return text + "."


def _winner(entry: Entry) -> str:
    shares = [
        f"{percent(share)} of the excess loss of {name}"
        for share, name in ((entry.of_ghost, "Ghost"), (entry.of_none, "no repair"))
        if share is not None
    ]
    leaves = f" leaves {' and '.join(shares)}" if shares else " loses least"
    key = entry.key
    return f"With {key.layers} removed, {key.repair} on the cut by {key.select}{leaves}."


def _and(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
