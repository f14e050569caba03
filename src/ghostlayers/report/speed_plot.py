"""A picture of how fast models read and write."""

from collections.abc import Sequence
from pathlib import Path

from ghostlayers.evaluation.bench import Point
from ghostlayers.evaluation.drafting import DraftPoint
from ghostlayers.report.heatmap import save_figure
from ghostlayers.runtime.shown import clean


def draw_speed(points: Sequence[Point], path: Path, *, title: str = "") -> None:
    """Tokens a second against the batch: reading on the left, writing on the right.

    Args:
        points: what to draw; a line a model and length.
        path: a .png (or .svg, .pdf) file.
        title: above both.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lengths = sorted({point.length for point in points})
    styles = dict(zip(lengths, ("-", "--", ":", "-.") * len(lengths), strict=False))
    names = list(dict.fromkeys(point.model for point in points))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, what in zip(panels, ("prefill", "decode"), strict=True):
            for index, name in enumerate(names):
                for length in lengths:
                    line = [p for p in points if p.model == name and p.length == length]
                    rates = [getattr(p, f"{what}_rate") for p in line]
                    label = f"{name}, {length} tokens"
                    axes.plot(
                        [p.batch for p in line], rates, styles[length], marker="o", ms=4,
                        color=f"C{index}", label=label,
                    )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted({p.batch for p in points}), minor=False)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter("{x:,.0f}")
            axes.set_xlabel("sequences at a time")
            axes.set_ylabel("tokens a second")
            axes.set_title("reading prompts" if what == "prefill" else "writing, a token at a time")
            axes.grid(visible=True, which="both", alpha=0.25)
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside right upper", frameon=False)
        figure.suptitle(clean(title), parse_math=False)
        save_figure(figure, path)


def draw_drafts(points: Sequence[DraftPoint], path: Path, *, title: str = "") -> None:
    """Tokens a second, and the share of them that is kept, against the length of drafts.

    Args:
        points: what to draw; the first is the dense model alone, a line across.
        path: a .png (or .svg, .pdf) file.
        title: above both.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    alone, *drafts = sorted(points, key=lambda point: point.draft_tokens)
    lengths = [point.draft_tokens for point in drafts]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        speed, share = figure.subplots(1, 2)
        speed.plot(lengths, [point.rate for point in drafts], marker="o", ms=4, label="with drafts")
        speed.axhline(alone.rate, color="C1", linestyle="--", label="dense alone")
        speed.set_ylabel("tokens a second")
        speed.legend(frameon=False)
        share.plot(lengths, [100 * (point.acceptance or 0.0) for point in drafts], marker="o", ms=4)
        share.set_ylabel("kept, % of drafted tokens")
        for axes in (speed, share):
            axes.set_ylim(bottom=0)
            axes.set_xticks(lengths)
            axes.set_xlabel("tokens drafted at a time")
            axes.grid(visible=True, alpha=0.25)
        figure.suptitle(clean(title), parse_math=False)
        save_figure(figure, path)
