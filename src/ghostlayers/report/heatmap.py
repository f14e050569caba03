"""Pictures of a score table."""

from pathlib import Path
from typing import TYPE_CHECKING

from ghostlayers.errors import OutputError, counted
from ghostlayers.runtime.files import check_can_write, whole_file
from ghostlayers.runtime.shown import clean
from ghostlayers.selection import ScoreTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_heatmap(table: ScoreTable, path: Path, *, title: str = "") -> None:
    """Similarity of every pair of boundaries, beside the scores of the candidate spans.

    Args:
        table: what to draw.
        path: a .png (or .svg, .pdf) file.
        title: the model's name.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_similarity(figure, left, table)
        _draw_spans(right, table)
        about = f"{clean(title)}: which layers a cut would remove" if title else ""
        figure.suptitle(about, parse_math=False)
        save_figure(figure, path)


def _draw_similarity(figure: "Figure", axes: "Axes", table: ScoreTable) -> None:
    image = axes.imshow(table.similarity.numpy(), origin="lower", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.85)
    best = max(table.spans, key=lambda score: score.cosine).span
    starts = [score.span.start for score in table.spans]
    stops = [score.span.stop for score in table.spans]
    axes.plot(stops, starts, ".", color="white", markersize=3)
    axes.plot(best.stop, best.start, "o", mfc="none", mec="red", markersize=11, label="highest")
    axes.set_xlabel("boundary after the span")
    axes.set_ylabel("boundary before the span")
    axes.set_title(f"Similarity of the stream (dots: spans of {counted(len(best), 'layer')})")
    axes.legend(loc="lower right", framealpha=0.9)


def _draw_spans(axes: "Axes", table: ScoreTable) -> None:
    starts = [score.span.start for score in table.spans]
    axes.plot(starts, [1 - score.cosine for score in table.spans], "o-", label="1 - cosine", ms=4)
    angles = [score.angular for score in table.spans]
    axes.plot(starts, angles, "^-", label="angular distance of last tokens", ms=4)
    measured = [(s.span.start, s.residual) for s in table.spans if s.residual is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), "s-", label="residual of the linear repair", ms=4)
    births = [score.span.start for score in table.spans if score.birth]
    for index, start in enumerate(births):
        label = "massive activation born inside" if index == 0 else None
        axes.axvspan(start - 0.5, start + 0.5, color="tab:red", alpha=0.12, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("first removed layer")
    axes.set_title(f"Spans of {counted(len(table.spans[0].span), 'layer')} (lower is better)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)


def check_can_draw(path: Path | None) -> None:
    """Refuse a picture that cannot come out, before anything is computed for it.

    Args:
        path: of the picture; None for none.

    Raises:
        OutputError: no file can be written there, or its ending names no kind of picture.
    """
    if path is None:
        return
    from matplotlib.figure import Figure

    check_can_write(path)
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise OutputError(
            f"cannot draw into '{path}': '{path.suffix}' is no kind of picture; name it .png, .svg "
            "or .pdf."
        )


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a picture whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with whole_file(path) as draft:
            figure.savefig(draft, dpi=150, format=path.suffix[1:].lower() or "png")
    except ValueError as error:
        raise OutputError(f"cannot draw into '{path}': {error}.") from error
