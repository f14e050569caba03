"""Cost curves of calibration: against depth, width, removed layers and windows.

    python benchmarks/curves.py --output curves [--small] [--device cuda --dtype bfloat16]

Every point is a run of `calibration.py` on a random Llama: choosing layers that are not adjacent
and fitting their repairs, this package's way and the straightforward way, beside bare forward
passes. The limits are drawn in the same plots: the forward passes that the answer needs, and the
memory of one block of the stream with three matrices of hidden x hidden float64 numbers. A point
that is there already is not measured again.
"""

import argparse
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

import calibration

CASES = ("select-fit-cut", "plain-select-cut", "plain-fit-cut")
SEQUENCE = 256


@dataclass(frozen=True)
class Point:
    """A size to measure at."""

    hidden: int = 256
    layers: int = 16
    removed: int = 4
    windows: int = 16

    @property
    def cut(self) -> str:
        """Every other layer, from the second on."""
        step = max(1, (self.layers - 1) // self.removed)
        chosen = range(1, self.layers, step) if self.layers > 2 else [1]
        return ",".join(str(layer) for layer in [*chosen][: self.removed])


SWEEPS: dict[str, list[Point]] = {
    "layers": [Point(layers=n, removed=1) for n in (2, 4, 8, 16, 32, 64)],
    "hidden": [
        Point(hidden=h, layers=4, removed=1, windows=max(8, h // SEQUENCE + 1))
        for h in (256, 512, 1024, 2048, 4096)
    ],
    "removed": [Point(layers=32, removed=n) for n in (1, 2, 4, 8, 15)],
    "windows": [Point(windows=n) for n in (4, 16, 64, 256)],
}
LABELS = {"removed": "removed layers", "hidden": "hidden size"}
SMALL = {name: points[:2] for name, points in SWEEPS.items()}


def measure(point: Point, folder: Path, device: str, dtype: str) -> dict[str, Any]:
    """One run, kept as soon as it is there."""
    path = folder / f"{point.hidden}-{point.layers}-{point.removed}-{point.windows}.json"
    if not path.is_file():
        command = ["--random", f"{point.hidden},{point.layers}"]
        command += ["--windows", str(point.windows), "--sequence-length", str(SEQUENCE)]
        command += ["--layers", str(point.removed), "--cut", point.cut, "--repeats", "1"]
        command += ["--only", ",".join(CASES), "--json", str(path)]
        command += ["--device", device, "--dtype", dtype]
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            calibration.main(command)  # starts a process a case, where that is needed
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def needed_seconds(cases: dict[str, Any]) -> float:
    """The bare forward passes that choosing and fitting cannot do without."""
    bare = cases["bare"]
    seconds, elapsed = min(bare["seconds"]), bare["elapsed"]
    total = bare["work"][0][2]
    parts = cases["select-fit-cut"]["work"]
    return float(
        sum(seconds * (elapsed[stop] - elapsed[start]) * n / total for start, stop, n in parts)
    )


def curves(content: dict[str, Any], point: Point) -> dict[str, tuple[float, float]]:
    """Seconds and megabytes by way."""
    cases = content["cases"]
    about = content["header"]
    tokens = SEQUENCE * 4 if about["device"] == "cpu" else 8192
    stream = tokens * point.hidden * torch.finfo(getattr(torch, about["dtype"])).bits // 8
    limit = (stream + 3 * point.hidden**2 * 8) / 1e6
    plain = [cases[name] for name in CASES[1:]]
    return {
        "limit": (needed_seconds(cases), limit),
        "this package": (min(cases[CASES[0]]["seconds"]), cases[CASES[0]]["extra_mb"]),
        "straightforward": (
            sum(min(each["seconds"]) for each in plain),
            max(each["extra_mb"] for each in plain),
        ),
    }


def draw(found: dict[str, list[tuple[Point, dict[str, tuple[float, float]]]]], path: Path) -> None:
    """A column a sweep: time above, memory below."""
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.1 * len(found), 5.6), layout="constrained")
        panels = figure.subplots(2, len(found), squeeze=False)
        for column, (name, points) in enumerate(found.items()):
            xs = [getattr(point, name) for point, _ in points]
            for row, what in enumerate(("seconds", "extra memory, MB")):
                axes = panels[row, column]
                for way, style in (
                    ("limit", "k:"),
                    ("this package", "o-"),
                    ("straightforward", "s--"),
                ):
                    axes.plot(xs, [ways[way][row] for _, ways in points], style, ms=4, label=way)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_xticks(xs, [f"{x:,}" for x in xs], minor=False)
                axes.set_xlabel(LABELS.get(name, name))
                axes.set_ylabel(what if column == 0 else "")
                axes.grid(visible=True, alpha=0.3)
        panels[0, 0].legend(frameon=False)
        figure.savefig(path, dpi=150)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("curves"))
    parser.add_argument("--small", action="store_true", help="two points a curve")
    parser.add_argument("--only", metavar="CURVE,...", help=", ".join(SWEEPS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[Point, dict[str, tuple[float, float]]]]] = {}
    wanted = arguments.only.split(",") if arguments.only else list(SWEEPS)
    for name in wanted:
        points = (SMALL if arguments.small else SWEEPS)[name]
        print(f"\n| {name} | needed, s | here, s | straightforward, s | limit, MB | here, MB | "
              "straightforward, MB |\n|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
        found[name] = []
        for point in points:
            ways = curves(
                measure(point, arguments.output, arguments.device, arguments.dtype), point
            )
            found[name].append((point, ways))
            times = " | ".join(f"{ways[w][0]:.2f}" for w in ways)
            memory = " | ".join(f"{ways[w][1]:.0f}" for w in ways)
            print(f"| {getattr(point, name):,} | {times} | {memory} |", flush=True)
    draw(found, arguments.output / "curves.png")
    print(f"\n{arguments.output / 'curves.png'}")


if __name__ == "__main__":
    main()
