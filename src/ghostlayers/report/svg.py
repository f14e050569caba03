"""Drawing in SVG: every colour is a class, so that one drawing suits a light and a dark page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MARKERS = ("circle", "square", "diamond", "triangle", "down", "cross", "ring", "box")
"""Shapes that tell the series apart without their colours; as many as the style sheet's colours."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; everything that is not markup already is escaped.

    Underscores in attribute names stand for hyphens, a trailing one is dropped, None is left out.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child) for child in children if child is not None)
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, inner)


def _short(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def tip(text: str) -> Markup:
    """The text that a pointer sees over an element."""
    return tag("title", text)


@dataclass(frozen=True)
class Scale:
    """Maps values to places on the drawing.

    Attributes:
        low: value at ``start``.
        high: value at ``end``.
        start: place of ``low``.
        end: place of ``high``.
        log: whether ratios, not differences, are equally long.
    """

    low: float
    high: float
    start: float = 0.0
    end: float = 1.0
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, kept within the drawing."""
        share = (self._turn(value) - self._turn(self.low)) / (
            self._turn(self.high) - self._turn(self.low)
        )
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _turn(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale."""
        return self._log_ticks(count) if self.log else self._linear_ticks(count)

    def _linear_ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / max(count, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        low, high = math.log10(self.low), math.log10(self.high)
        decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        if len(decades) < 2 or (high - low < 1.6 and len(decades) < 3):
            steps: tuple[int, ...] = (1, 2, 5) if high - low > 0.5 else (1, 2, 3, 4, 5, 6, 7, 8, 9)
            values = [
                m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps
            ]
            fits = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            return fits[:: max(1, math.ceil(len(fits) / (count + 1)))]
        stride = max(1, math.ceil(len(decades) / (count + 1)))
        return [10.0**e for e in decades if e % stride == 0]


def fit_scale(
    values: Sequence[float], *, log: bool = False, zero: bool = False, whole: bool = False
) -> Scale:
    """A scale that holds all values with a little room, starting at zero if asked.

    With ``log`` only positive values count. With ``whole`` the room is half a step, for counts.
    """
    kept = [value for value in values if value > 0] if log else list(values)
    low, high = (min(kept), max(kept)) if kept else (0.5, 1.0)
    if log:
        room = max((high / low) ** 0.06, 1.05)
        return Scale(low / room, high * room, log=True)
    if whole:
        return Scale(low - 0.5, high + 0.5)
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 1e-6)
    return Scale(0.0 if zero and low >= 0 else low - room, high + room)


def write_number(value: float) -> str:
    """A tick's number, short: 0.02, 350, 25k, 1.3M, 1e-6."""
    size = abs(value)
    if size == 0:
        return "0"
    if 1e3 <= size < 1e4:
        return f"{value:,.0f}"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.3g}{letter}" if size < 1e12 else f"{value:.0e}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Frame:
    """The rectangle of a plot inside its drawing, and its two scales."""

    x: Scale
    y: Scale
    width: float = 420.0
    height: float = 300.0
    left: float = 62.0
    right: float = 14.0
    top: float = 14.0
    bottom: float = 50.0

    def place(self) -> "Frame":
        """The same frame with its scales laid onto the drawing."""
        x = Scale(self.x.low, self.x.high, self.left, self.width - self.right, self.x.log)
        y = Scale(self.y.low, self.y.high, self.height - self.bottom, self.top, self.y.log)
        return Frame(x, y, self.width, self.height, self.left, self.right, self.top, self.bottom)


def drawing(frame: Frame, label: str, *parts: object) -> Markup:
    """The whole picture; ``label`` is what a screen reader says of it."""
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=label,
        class_="plot",
    )


def draw_axes(
    frame: Frame,
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] | None = None,
    y_ticks: Sequence[float] | None = None,
) -> Markup:
    """Grid, ticks and the names of both axes of a placed frame."""
    below, beside = frame.height - frame.bottom, frame.left
    parts: list[Markup] = []
    for value in frame.y.ticks() if y_ticks is None else y_ticks:
        place = frame.y.at(value)
        end = frame.width - frame.right
        parts.append(tag("line", x1=beside, x2=end, y1=place, y2=place, class_="grid"))
        parts.append(_words(write_number(value), beside - 6, place + 5, "end", "tick"))
    for value in frame.x.ticks() if x_ticks is None else x_ticks:
        place = frame.x.at(value)
        parts.append(tag("line", x1=place, x2=place, y1=below, y2=below + 4, class_="axis"))
        parts.append(_words(write_number(value), place, below + 19, "middle", "tick"))
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(
        tag("line", x1=beside, x2=frame.width - frame.right, y1=below, y2=below, class_="axis")
    )
    parts.append(_words(x_label, middle, frame.height - 8, "middle", "label"))
    up = (frame.top + below) / 2
    turned = f"rotate(-90 13 {up:.0f})"
    parts.append(
        tag("text", y_label, x=13, y=up, class_="label", text_anchor="middle", transform=turned)
    )
    return tag("g", *parts)


def _words(text: str, x: float, y: float, anchor: str, kind: str) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def words(text: str, x: float, y: float, *, anchor: str = "start", kind: str = "note") -> Markup:
    """A piece of text."""
    return _words(text, x, y, anchor, kind)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The ``d`` of a line through places."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def marker(shape: str, x: float, y: float, *children: object, size: float = 4.5) -> Markup:
    """One of `MARKERS` at a place; its colour is that of its group."""
    s = size
    if shape in ("circle", "ring"):
        kind = "dot" if shape == "circle" else "dot hollow"
        return tag("circle", *children, cx=x, cy=y, r=s, class_=kind)
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "box": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
        "triangle": [(0, -1.2 * s), (1.2 * s, s), (-1.2 * s, s)],
        "down": [(0, 1.2 * s), (1.2 * s, -s), (-1.2 * s, -s)],
    }
    if shape == "cross":
        line = f"M{x - s:.1f} {y - s:.1f}l{2 * s:g} {2 * s:g}m0 {-2 * s:g}l{-2 * s:g} {2 * s:g}"
        return tag("path", *children, d=line, class_="dot stroke")
    kind = "dot hollow" if shape == "box" else "dot"
    return tag(
        "path", *children, d=path([(x + a, y + b) for a, b in corners[shape]]) + "Z", class_=kind
    )
