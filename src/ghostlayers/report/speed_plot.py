"""A picture of how fast models read and write."""

from collections.abc import Sequence
from pathlib import Path

from ghostlayers.evaluation.bench import Point
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
