"""The kinds of picture on the page: lines, points with a front, a heat map, bars, rows of dots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ghostlayers.report.drawing import (
    LIGHT,
    LINE,
    Style,
    cut,
    new_axes,
    titled,
    to_svg,
    write_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One named line.

    Attributes:
        name: what it shows.
        points: in the order of the line.
        style: how it looks.
        every: how many points there are to a marker.
    """

    name: str
    points: Sequence[Point]
    style: Style
    every: int = 1

    @property
    def title(self) -> str:
        """What a pointer reads at it: its name, and its values unless they are many."""
        shown = ", ".join(f"{y:.4g} at {x:g}" for x, y in self.points[:40])
        return f"{self.name}: {shown}" + (", ..." if len(self.points) > 40 else "")


@dataclass(frozen=True)
class Dot:
    """One point with a name, or a bar with a text: drawn at ``x``, and ``y`` where there is one."""

    name: str
    style: Style
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class Axis:
    """The name of an axis, and what it spans; ``whole`` is for counts."""

    label: str
    limits: Point | None = None
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the horizontal axis."""

    start: float
    stop: float
    note: str


def limits(values: Sequence[float], *, log: bool = False, zero: bool = False) -> Point:
    """What an axis spans that holds all values with a little room, from zero if asked.

    With ``log`` only positive values count.
    """
    shown = [value for value in values if value > 0 or not log] or [0.5, 1.0]
    low, high = min(shown), max(shown)
    if log:
        room = max((high / low) ** 0.06, 1.05)
        return low / room, high * room
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 1e-6)
    return (0.0 if zero and low >= 0 else low - room), high + room


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    *,
    bands: Sequence[Band] = (),
    rules: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines with markers.

    Args:
        series: what to draw.
        x: the horizontal axis.
        y: the vertical one.
        label: for screen readers.
        bands: stretches of the horizontal axis to shade.
        rules: places on the horizontal axis to mark, each with a short name.
    """
    axes = new_axes(top=14.0 + LINE * len(rules))
    for band in bands:
        axes.axvspan(band.start, band.stop, color=LIGHT["band"], lw=0, gid=titled(band.note))
    for line in sorted(series, key=lambda line: line.style.index is not None):  # grey ones below
        xs, ys = zip(*line.points, strict=True)
        gid = titled(line.title, line.style)
        axes.plot(xs, ys, markevery=line.every, gid=gid, **line.style.marked())
    set_axes(axes, x, y)
    _draw_rules(axes, rules)
    return to_svg(axes, label)


def set_axes(axes: "Axes", x: Axis, y: Axis) -> None:
    """Name both axes, and let them span and be divided as they say."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

    for name, axis in (("x", x), ("y", y)):
        axes.set(**{f"{name}label": axis.label, f"{name}scale": "log" if axis.log else "linear"})
        if axis.limits:
            axes.set(**{f"{name}lim": axis.limits})
        drawn = axes.xaxis if name == "x" else axes.yaxis
        low, high = drawn.get_view_interval()
        places: Locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=axis.whole)
        if axis.log and high > 10 * low:
            places = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6)
        drawn.set_major_locator(places)
        drawn.set_minor_locator(NullLocator())
        drawn.set_major_formatter(write_number)


def _draw_rules(axes: "Axes", rules: Sequence[tuple[float, str]]) -> None:
    """Each name on a line of its own, beside its rule and above the rules that it crosses."""
    middle = sum(axes.get_xlim()) / 2
    late = sorted((rule for rule in rules if rule[0] >= middle), reverse=True)
    line = LINE * axes.figure.dpi / 72 / axes.get_window_extent().height
    for index, (place, name) in enumerate([*sorted(set(rules) - set(late)), *late]):
        top = 1 + (len(rules) - index) * line
        look: dict[str, Any] = {"color": LIGHT["quiet"], "ls": (0, (2, 3)), "lw": 1.0}
        axes.axvline(place, ymax=top, clip_on=False, **look)
        axes.annotate(
            f"\u00a0{cut(name, 40)}\u00a0",
            (place, top),
            xycoords=("data", "axes fraction"),
            ha="left" if place < middle else "right",
            va="top",
        )


def scatter_chart(
    dots: Sequence[Dot], x: Axis, y: Axis, label: str, front: Sequence[Point]
) -> Markup:
    """Points, with the front of those that none beats as a stepped line.

    What lies above the vertical axis is drawn at its edge.
    """
    axes = new_axes(340.0)
    xs, ys = zip(*front, strict=True)
    look: dict[str, Any] = {"color": LIGHT["text"], "lw": 1.5, "ls": (0, (4, 2))}
    axes.step(xs, ys, where="post", gid=titled("Pareto front"), **look)
    top = y.limits[1] if y.limits else float("inf")
    for dot in sorted(dots, key=lambda dot: dot.style.index is not None):
        axes.plot(dot.x, min(dot.y, top), gid=titled(dot.name, dot.style), **dot.style.marked())
    set_axes(axes, x, y)
    return to_svg(axes, label)


def heat_map(values: Sequence[Sequence[float | None]], marks: Sequence[Dot], label: str) -> Markup:
    """Every span: its start upwards, its stop to the right; the colour is the value."""
    size = len(values)
    known = [
        (stop, start, value)
        for start in range(size)
        for stop in range(start + 1, size)
        if (value := values[start][stop]) is not None
    ]
    axes = new_axes(410.0)
    side = axes.get_window_extent().width * 72 / axes.figure.dpi / size
    stops, starts, shades = zip(*known, strict=True)
    cells = axes.scatter(
        stops, starts, side**2, shades, marker="s", edgecolors="face", linewidths=0.7
    )
    for mark in sorted(marks, key=lambda mark: -(mark.style.index or 0)):
        # Larger for later selections, so that the marks of one place nest.
        look = mark.style.marked(7.2 + 4.8 * (mark.style.index or 0))
        look |= {"mec": LIGHT["page"], "mew": 1.5, "gid": titled(mark.name)}
        axes.plot(mark.x, mark.y, **look)
    shown = cells.legend_elements(num=5, fmt="{x:.2g}", markersize=11)
    axes.legend(*shown, title="mean cosine", loc="upper left", alignment="left")
    axes.grid(visible=False)
    edges = (-0.5, size - 0.5)
    x = Axis("boundary after the span", edges, whole=True)
    set_axes(axes, x, Axis("boundary before the span", edges, whole=True))
    return to_svg(axes, label)


def bar_chart(bars: Sequence[tuple[str, Dot]], label: str) -> Markup:
    """Horizontal bars from zero, each with a name at its left and its dot's name at its end."""
    room = 10 + 8.0 * max(len(dot.name) for _, dot in bars)
    axes = new_axes(26.0 * len(bars) + 12, left=148.0, right=max(118.0, room), top=6.0, bottom=6.0)
    colours = [LIGHT[dot.style.colour] for _, dot in bars]
    drawn = axes.barh(range(len(bars)), [dot.x for _, dot in bars], 0.7, color=colours)
    texts = [dot.name for _, dot in bars]
    axes.bar_label(drawn, texts, padding=6, color=LIGHT["text"])
    axes.set_xlim(0, max(dot.x for _, dot in bars) or 1.0)
    axes.xaxis.set_visible(False)
    axes.spines.bottom.set_visible(False)
    axes.grid(visible=False)
    _name_rows(axes, [name for name, _ in bars], 18)
    return to_svg(axes, label)


def _name_rows(axes: "Axes", names: Sequence[str], most: int) -> None:
    """Rows of a picture, the first on top, each named at its left."""
    axes.set_yticks(range(len(names)), [cut(name, most) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params("y", labelcolor=LIGHT["text"])


def dot_chart(
    rows: Sequence[tuple[str, Sequence[Dot]]],
    x: Axis,
    label: str,
    rules: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Dots on lines, each with a name at its left."""
    top = 14.0 + LINE * len(rules)
    axes = new_axes(26.0 * len(rows) + 62 + top, left=180.0, top=top)
    for row, (_, dots) in enumerate(rows):
        for dot in dots:
            axes.plot(dot.x, row, gid=titled(dot.name, dot.style), **dot.style.marked())
    set_axes(axes, x, Axis(""))
    _name_rows(axes, [name for name, _ in rows], 24)
    _draw_rules(axes, rules)
    return to_svg(axes, label)
