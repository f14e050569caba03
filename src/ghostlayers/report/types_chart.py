"""GGUF files as pictures: loss against bytes, and against speed, with the frontier drawn."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ghostlayers.report.charts import Axis, Point, limits, set_axes
from ghostlayers.report.drawing import LIGHT, LINE, WIDTH, Style, new_axes, titled, to_svg
from ghostlayers.report.figures import Panel, loss_axis
from ghostlayers.report.results import Results
from ghostlayers.report.summary import pareto_front
from ghostlayers.report.types_table import File, file_grid, files_of, says

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURED = 7
"""Cut models that are drawn in colour, those of lowest loss; the others are grey."""

DOT, LETTER = 5.0, 7.6
"""Half of a mark and a letter of a label, in points, with room around them."""

Styles = Mapping[str, Style]
Box = tuple[float, float, float, float]


def types_content(results: Results) -> dict[str, Any] | None:
    """What the page shows of files: a sentence, two pictures with their marks, and all numbers."""
    files = files_of(results)
    if not files:
        return None
    styles, (head, rows) = styles_of(files), file_grid(results)
    return {
        "sentence": says(files),
        "models": styles,
        "panels": type_panels(files, styles),
        "head": head,
        "rows": rows,
        "file": files[0].row,
    }


def styles_of(files: Sequence[File]) -> dict[str, Style]:
    """How each model is drawn, by its title, the dense one first."""
    lowest: dict[str, float] = {}
    for file in files:
        if not file.key.is_dense and file.loss is not None:
            lowest[file.title] = min(file.loss, lowest.get(file.title, file.loss))
    bright = sorted(lowest, key=lambda title: lowest[title])[:COLOURED]
    cuts = {title: Style(bright.index(title) if title in bright else None) for title in lowest}
    return {"dense": Style(COLOURED), **cuts}


def type_panels(files: Sequence[File], styles: Styles) -> list[Panel]:
    """Two pictures: loss against the size of the file, and against tokens written a second."""
    known = [file for file in files if file.loss is not None]
    timed = [file for file in known if file.row.decode_tokens_s]
    views = (
        ("Loss against bytes", known, _size, "size of the file, MB", 1),
        ("Loss against speed", timed, _speed, "tokens written a second", -1),
    )
    return [
        _panel(title, some, styles, cost, label, sign)
        for title, some, cost, label, sign in views
        if len(some) > 1
    ]


def _size(file: File) -> float:
    return file.row.size_bytes / 1e6


def _speed(file: File) -> float:
    return file.row.decode_tokens_s or 0.0


def _named(files: Sequence[File], front: Sequence[int]) -> str:
    """The files on the frontier, those of a model together."""
    kinds: dict[str, list[str]] = {}
    for index in front:
        kinds.setdefault(files[index].title, []).append(files[index].kind)
    return "On the frontier: " + "; ".join(f"{t}: {', '.join(k)}" for t, k in kinds.items()) + "."


def _panel(
    title: str,
    files: Sequence[File],
    styles: Styles,
    cost: Callable[[File], float],
    label: str,
    sign: int,
) -> Panel:
    """A picture and its frontier in words; less of ``sign`` times the cost is better."""
    front = pareto_front([(sign * cost(file), file.loss or 0.0) for file in files])
    return Panel(title, _draw(files, styles, cost, label, front), _named(files, front))


def _draw(
    files: Sequence[File],
    styles: Styles,
    cost: Callable[[File], float],
    label: str,
    front: Sequence[int],
) -> Markup:
    """Points a file, joined a model at a time."""
    axes = new_axes(340.0)
    points = [(cost(file), file.loss or 0.0) for file in files]
    y, _ = loss_axis([loss for _, loss in points])
    top = y.limits[1] if y.limits else float("inf")
    _draw_front(axes, [points[index] for index in front])
    for title, style in sorted(styles.items(), key=lambda item: item[1].index is not None):
        _draw_model(axes, [e for e in files if e.title == title], style, cost, top)
    x = Axis(label, limits([place for place, _ in points]))
    set_axes(axes, x, y)
    _name_types(axes, files, [(place, min(loss, top)) for place, loss in points], front)
    return to_svg(axes, f"Mean loss against {label}, with the frontier")


def _draw_front(axes: "Axes", front: Sequence[Point]) -> None:
    xs, ys = zip(*front, strict=True)
    look: dict[str, Any] = {"color": LIGHT["text"], "lw": 1.5, "ls": (0, (4, 2))}
    axes.step(xs, ys, where="post", gid=titled("frontier"), **look)


def _draw_model(
    axes: "Axes", files: Sequence[File], style: Style, cost: Callable[[File], float], top: float
) -> None:
    """A thin line through a model's types, and a mark a file."""
    ordered = sorted(files, key=cost)
    places = [(cost(file), min(file.loss or 0.0, top)) for file in ordered]
    axes.plot(*zip(*places, strict=True), color=LIGHT[style.colour], lw=1.0, alpha=0.6)
    for file, (x, y) in zip(ordered, places, strict=True):
        name = f"{file.title}, {file.kind}: {x:,.4g}, loss {file.loss or 0.0:.3f}"
        axes.plot(x, y, gid=titled(name), **{**style.marked(), "ls": "none"})


def _name_types(
    axes: "Axes", files: Sequence[File], places: Sequence[Point], front: Sequence[int]
) -> None:
    """The type beside each file of the dense model and on the frontier, where there is room."""
    scale = 72 / axes.figure.dpi
    dots = [tuple(scale * number for number in axes.transData.transform(place)) for place in places]
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    for index in sorted(range(len(files)), key=lambda index: index not in front):
        kind = files[index].kind
        if not (files[index].key.is_dense or index in front):
            continue
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            box = _label_box(dots[index], len(kind), right, up)
            if box[0] < 0 or box[2] > WIDTH or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            axes.annotate(
                kind, places[index], (right * DOT, up * DOT), textcoords="offset points",
                ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top",
            )  # fmt: skip
            break


def _label_box(dot: Point, letters: int, right: int, up: int) -> Box:
    """Where a label at a corner of a mark lies in the picture, in points."""
    xs = sorted((dot[0] + right * DOT, dot[0] + right * (DOT + LETTER * letters)))
    ys = sorted((dot[1] + up * DOT, dot[1] + up * (DOT + LINE)))
    return xs[0], ys[0], xs[1], ys[1]


def _overlap(one: Box, other: Box) -> bool:
    apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    return not apart
