"""Numbers as a reader sees them."""

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
