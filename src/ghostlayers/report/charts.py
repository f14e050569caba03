"""The kinds of picture on the page: lines, points with a front, a heat map, bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ghostlayers.report.svg import (
    MARKERS,
    Frame,
    Scale,
    draw_axes,
    drawing,
    fit_scale,
    marker,
    path,
    tag,
    tip,
    words,
    write_number,
)


@dataclass(frozen=True)
class Style:
    """How a series looks everywhere on the page.

    Attributes:
        index: which colour, dash and marker; None for the thin grey ones.
        number: the series' number on the page, by which the legend finds it.
    """

    index: int | None = None
    number: int | None = None

    @property
    def classes(self) -> str:
        """The classes of its group."""
        return "series " + ("faint" if self.index is None else f"c{self.index % len(MARKERS)}")

    @property
    def shape(self) -> str:
        """Its marker."""
        return "circle" if self.index is None else MARKERS[self.index % len(MARKERS)]


@dataclass(frozen=True)
class Series:
    """One named line or cloud of points.

    Attributes:
        name: what it shows.
        points: in the order of the line.
        style: how it looks.
        notes: what a pointer reads at each point.
        every: how many points there are to a marker.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: Style
    notes: tuple[str, ...] = ()
    every: int = 1


@dataclass(frozen=True)
class Axis:
    """The name of an axis, and how its scale is made."""

    label: str
    log: bool = False
    zero: bool = False
    whole: bool = False
    scale: Scale | None = None

    def fit(self, values: Sequence[float]) -> Scale:
        """The given scale, or one that holds the values."""
        return self.scale or fit_scale(values, log=self.log, zero=self.zero, whole=self.whole)

    def ticks(self, values: Sequence[float]) -> list[float] | None:
        """Whole numbers for counts: the values themselves where they are few."""
        known = sorted(set(values))
        if not self.whole or len(known) <= 8:
            return known if self.whole else None
        return [tick for tick in self.fit(values).ticks() if abs(tick - round(tick)) < 1e-9]


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the horizontal axis."""

    start: float
    stop: float
    note: str


LINE = 16.0
"""Height of a line of text in a drawing."""


def _ordered(series: Sequence[Series]) -> list[Series]:
    """The grey ones first, so that the coloured ones lie on top."""
    return sorted(series, key=lambda each: each.style.index is not None)


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    *,
    bands: Sequence[Band] = (),
    rules: Sequence[tuple[float, str]] = (),
    height: float = 300.0,
) -> Markup:
    """Lines with a marker at every point.

    Args:
        series: what to draw.
        x: the horizontal axis.
        y: the vertical one.
        label: for screen readers.
        bands: stretches of the horizontal axis to shade.
        rules: places on the horizontal axis to mark, each with a short name.
        height: of the drawing, which is 420 wide.
    """
    xs = [point[0] for each in series for point in each.points]
    ys = [point[1] for each in series for point in each.points]
    frame = Frame(x.fit(xs), y.fit(ys), height=height, top=14.0 + LINE * len(rules)).place()
    return drawing(
        frame,
        label,
        *(_band(frame, band) for band in bands),
        draw_axes(frame, x.label, y.label, x_ticks=x.ticks(xs)),
        *_rules(frame, rules),
        *(_line(frame, each) for each in _ordered(series)),
    )


def _band(frame: Frame, band: Band) -> Markup:
    start, stop = frame.x.at(band.start), frame.x.at(band.stop)
    return tag(
        "rect",
        tip(band.note),
        x=start,
        y=frame.top,
        width=max(stop - start, 1.0),
        height=frame.height - frame.bottom - frame.top,
        class_="band",
    )


def _rules(frame: Frame, rules: Sequence[tuple[float, str]]) -> list[Markup]:
    """Each name on a line of its own, beside its rule and above the rules that it crosses."""
    middle = (frame.left + frame.width - frame.right) / 2
    placed = sorted((frame.x.at(value), name) for value, name in rules)
    early = [rule for rule in placed if rule[0] < middle]
    late = [rule for rule in reversed(placed) if rule[0] >= middle]
    bottom = frame.height - frame.bottom
    parts = []
    for index, (place, name) in enumerate([*early, *late]):
        height = frame.top - 4 - LINE * (len(placed) - 1 - index)
        anchor, aside = ("start", 4.0) if place < middle else ("end", -4.0)
        line = tag("line", x1=place, x2=place, y1=height - 10, y2=bottom, class_="rule")
        parts += [line, words(name, place + aside, height, anchor=anchor)]
    return parts


def _line(frame: Frame, series: Series) -> Markup:
    places = [(frame.x.at(a), frame.y.at(b)) for a, b in series.points]
    notes = series.notes or tuple(f"{series.name}: {write_number(b)}" for _, b in series.points)
    parts = []
    if len(places) > 1:
        parts.append(tag("path", tip(series.name), d=path(places), class_="line"))
    size = 2.2 if series.style.index is None else 4.5
    parts += [
        marker(series.style.shape, *place, tip(note), size=size)
        for place, note in list(zip(places, notes, strict=True))[:: series.every]
    ]
    return tag("g", *parts, class_=series.style.classes, data_r=series.style.number)


def scatter_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    front: Sequence[tuple[float, float]] = (),
) -> Markup:
    """Points, with the front of those that none beats as a stepped line."""
    xs = [point[0] for each in series for point in each.points]
    ys = [point[1] for each in series for point in each.points]
    frame = Frame(x.fit(xs), y.fit(ys), height=340.0).place()
    parts = []
    for each in _ordered(series):
        size = 2.4 if each.style.index is None else 4.2
        dots = [
            marker(each.style.shape, frame.x.at(a), frame.y.at(b), tip(note), size=size)
            for (a, b), note in zip(each.points, each.notes, strict=True)
        ]
        parts.append(tag("g", *dots, class_=each.style.classes, data_r=each.style.number))
    steps = _steps([(frame.x.at(a), frame.y.at(b)) for a, b in front])
    stairs = tag("path", tip("Pareto front"), d=path(steps), class_="front") if steps else None
    return drawing(frame, label, draw_axes(frame, x.label, y.label), stairs, *parts)


def _steps(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    steps: list[tuple[float, float]] = []
    for x, y in places:
        if steps:
            steps.append((x, steps[-1][1]))
        steps.append((x, y))
    return steps


@dataclass(frozen=True)
class Mark:
    """A cut on the heat map: its gap, and which selection chose it."""

    start: int
    stop: int
    name: str
    style: Style


HEAT = ((34, 24, 76), (38, 92, 148), (34, 150, 138), (128, 196, 92), (250, 228, 80))
"""From the lowest to the highest value, rising in lightness, so that it also reads in grey."""


def heat_colour(share: float) -> str:
    """The colour of a value between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    index = min(int(place), len(HEAT) - 2)
    rest = place - index
    mixed = (a + (b - a) * rest for a, b in zip(HEAT[index], HEAT[index + 1], strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def heat_map(values: Sequence[Sequence[float | None]], marks: Sequence[Mark], label: str) -> Markup:
    """Every span: its start upwards, its stop to the right; the colour is the value."""
    size = len(values)
    places = [(a, b) for a in range(size) for b in range(a + 1, size)]
    known = [v for a, b in places if (v := values[a][b]) is not None and math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    scale = Scale(-0.5, size - 0.5)
    frame = Frame(scale, scale, width=460.0, height=450.0).place()
    cell = (frame.width - frame.left - frame.right) / size
    squares = [
        _square(frame, cell, a, b, value, (value - low) / ((high - low) or 1.0))
        for a, b in places
        if (value := values[a][b]) is not None and math.isfinite(value)
    ]
    return drawing(
        frame,
        label,
        draw_axes(frame, "boundary after the span", "boundary before the span"),
        tag("g", *squares, shape_rendering="crispEdges"),
        *(_heat_mark(frame, mark) for mark in sorted(marks, key=lambda each: -_size(each))),
        _colour_bar(frame, low, high),
    )


def _square(frame: Frame, cell: float, start: int, stop: int, value: float, share: float) -> Markup:
    return tag(
        "rect",
        tip(f"[{start}, {stop}): {value:.4f}"),
        x=frame.x.at(stop) - cell / 2,
        y=frame.y.at(start) - cell / 2,
        width=cell + 0.3,
        height=cell + 0.3,
        fill=heat_colour(share),
    )


def _heat_mark(frame: Frame, mark: Mark) -> Markup:
    x, y = frame.x.at(mark.stop), frame.y.at(mark.start)
    note = tip(mark.name)
    size = _size(mark)
    halo = tag("g", marker(mark.style.shape, x, y, size=size), class_="halo")
    shape = marker(mark.style.shape, x, y, note, size=size)
    return tag("g", halo, shape, class_=mark.style.classes)


def _size(mark: Mark) -> float:
    """Larger for later selections, so that the marks of one place nest."""
    return 3.6 + 2.4 * (mark.style.index or 0)


def _colour_bar(frame: Frame, low: float, high: float) -> Markup:
    left, top, width, steps = frame.left + 14, frame.top + 24, 150.0, 30
    cells = [
        tag(
            "rect",
            x=left + index * width / steps,
            y=top,
            width=width / steps + 0.5,
            height=10,
            fill=heat_colour(index / (steps - 1)),
        )
        for index in range(steps)
    ]
    return tag(
        "g",
        *cells,
        words("mean cosine", left, top - 7),
        words(f"{low:.2f}", left, top + 26),
        words(f"{high:.2f}", left + width, top + 26, anchor="end"),
    )


@dataclass(frozen=True)
class Bar:
    """One bar: its name, length and what is written at its end."""

    name: str
    value: float
    text: str
    style: Style


CHARACTER = 8.0
"""What a letter of a value takes at most."""


def bar_chart(bars: Sequence[Bar], label: str, *, axis: str = "") -> Markup:
    """Horizontal bars from zero, one a line, each named at its left."""
    row, left = 26.0, 148.0
    high = max((bar.value for bar in bars), default=1.0) or 1.0
    height = row * len(bars) + 12
    room = max([118.0, *(10 + CHARACTER * len(bar.text) for bar in bars)])
    scale = Scale(0.0, high, left, 420 - room)
    frame = Frame(scale, scale, height=height)
    parts = []
    for index, bar in enumerate(bars):
        top = index * row + 6
        end = scale.at(bar.value)
        parts.append(words(_cut(bar.name), left - 8, top + 14, anchor="end", kind="name"))
        rect = tag("rect", x=left, y=top, width=max(end - left, 1.5), height=18, rx=2, class_="bar")
        group = tag("g", tip(f"{bar.name}: {bar.text} {axis}"), rect, class_=bar.style.classes)
        parts += [group, words(bar.text, end + 6, top + 14, kind="value")]
    return drawing(frame, label, *parts)


def _cut(name: str, most: int = 20) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def dot_chart(
    rows: Sequence[tuple[str, Sequence[tuple[float, str, Style]]]],
    x: Axis,
    label: str,
    rules: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Dots on named lines: a name, and for each dot its value, its note and its style."""
    xs = [dot[0] for _, dots in rows for dot in dots]
    step = 26.0
    height = step * len(rows) + 46 + 30
    y = Scale(-0.5, len(rows) - 0.5)
    frame = Frame(x.fit(xs), y, height=height, left=180.0, top=14.0 + LINE * len(rules)).place()
    parts = []
    for index, (name, dots) in enumerate(rows):
        place = frame.y.at(len(rows) - 1 - index)
        end = frame.width - frame.right
        parts.append(tag("line", x1=frame.left, x2=end, y1=place, y2=place, class_="grid"))
        parts.append(words(_cut(name, 26), frame.left - 8, place + 4, anchor="end", kind="name"))
        parts += [
            tag("g", marker(style.shape, frame.x.at(value), place, tip(note)), class_=style.classes)
            for value, note, style in dots
        ]
    axes = draw_axes(frame, x.label, "", y_ticks=())
    return drawing(frame, label, axes, *_rules(frame, rules), *parts)


def swatch(style: Style) -> Markup:
    """A piece of a series for a legend."""
    parts = [
        tag("path", d="M2 9L40 9", class_="line"),
        marker(style.shape, 21, 9, size=2.2 if style.index is None else 4.5),
    ]
    return tag(
        "svg",
        tag("g", *parts, class_=style.classes),
        viewBox="0 0 42 18",
        width=42,
        height=18,
        aria_hidden="true",
        class_="swatch",
    )
