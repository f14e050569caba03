"""The figure of the front page: what is lost above the dense model, by layers removed.

``python benchmarks/figure.py comparison/results.json -o docs/figure.svg`` draws the results of a
``ghostlayers compare`` with several numbers of layers and one selection.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import matplotlib as mpl
import matplotlib.pyplot as plt

from ghostlayers.report.results import Results, read_results

NAMES = {
    "none": ("cut, not repaired", "#50585f", "o"),
    "linearpatch-hadamard": ("LinearPatch", "#8a6500", "s"),
    "replaceme": ("ReplaceMe", "#a8457f", "D"),
    "ghost": ("Ghost (default)", "#0068a8", "^"),
    "joint:x+z:ridge=auto": ("joint:x+z:ridge=auto", "#00795a", "v"),
}
"""Repairs that are drawn: label, colour, marker."""

STYLE = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "ghostlayers",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#59626d",
    "axes.labelcolor": "#1b1f24",
    "xtick.color": "#59626d",
    "ytick.color": "#59626d",
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
}


def excess(results: Results) -> dict[str, dict[int, float]]:
    """By repair and number of layers: mean loss over the texts, less the dense model's."""
    losses: dict[tuple[str, int], list[float]] = {}
    for cell in results.cells:
        if cell.loss_nats is not None:
            losses.setdefault((cell.repair or "dense", cell.layers), []).append(cell.loss_nats)
    dense = mean(losses["dense", 0])
    found: dict[str, dict[int, float]] = {}
    for (repair, layers), values in sorted(losses.items()):
        if repair in NAMES:
            found.setdefault(repair, {0: 0.0})[layers] = mean(values) - dense
    return found


def apart(heights: dict[str, float]) -> dict[str, float]:
    """Heights of labels, from below, none of which lies on another."""
    least, free = 0.065 * max(heights.values()), float("-inf")
    placed = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max(height, free)
        free = placed[name] + least
    return placed


def draw(found: dict[str, dict[int, float]], layers: int, path: Path) -> None:
    """A line a repair, named at its end."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        for repair, values in found.items():
            label, colour, marker = NAMES[repair]
            axes.plot([*values], [*values.values()], color=colour, marker=marker, linewidth=2)
        most = max(max(values) for values in found.values())
        for repair, height in apart({name: lines[most] for name, lines in found.items()}).items():
            label, colour, _ = NAMES[repair]
            axes.annotate(label, (most, height), (9, -4), textcoords="offset points", color=colour)
        axes.set_xlim(0, most * 1.38)
        axes.set_xticks(sorted({n for values in found.values() for n in values}))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e6e9ed")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"layers removed of {layers}")
        axes.set_title(
            "SmolLM2-135M: loss above the dense model, nats a token", loc="left", fontsize=11
        )
        figure.savefig(path, metadata={"Date": None}, pad_inches=0.12, bbox_inches="tight")
        plt.close(figure)


def main() -> None:
    """Draw a comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a comparison")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/figure.svg"))
    arguments = parser.parse_args()
    results = read_results(json.loads(arguments.results.read_text("utf-8")))
    found = excess(results)
    draw(found, results.model.num_layers or 0, arguments.output)
    for repair, values in found.items():
        print(repair, {layers: round(value, 3) for layers, value in values.items()})


if __name__ == "__main__":
    main()
