"""How well `--plan` predicts: every stage as planned, and as it then was.

    python benchmarks/plan.py MODEL --data TEXT [--json FILE]

Each request is planned, carried out in the same process, and saved. A stage's time is that between
its progress bar and the next one's, so what lies between two bars belongs to the first.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ghostlayers
from ghostlayers import pipeline
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions

REQUESTS: dict[str, dict[str, Any]] = {
    "recoverable, 7 layers, ghost": {"layers": 7},
    "recoverable, 3 layers, joint:x+z": {"layers": 3, "repair": "joint:x+z"},
    "streamline, 7 layers, piecewise:8": {
        "layers": 7, "select": "streamline", "repair": "piecewise:8"
    },
    "shortgpt, 7 layers, ghost": {"layers": 7, "select": "shortgpt"},
    "perplexity:one-shot, 3 layers, refit:2": {
        "layers": 3, "select": "perplexity:one-shot", "repair": "refit:2"
    },
    "recoverable:greedy, 3 layers, ghost": {"layers": 3, "select": "recoverable:greedy"},
    "taylor, 3 layers, ghost": {"layers": 3, "select": "taylor"},
}  # fmt: skip


class Clock:
    """Progress that notes when stages begin."""

    def __init__(self) -> None:
        self.began: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Any]:  # noqa: ARG002
        """Note the time."""
        self.began.append((description, time.monotonic()))
        yield lambda units=1: None  # noqa: ARG005

    def stages(self, end: float) -> list[tuple[str, float]]:
        """Names and seconds."""
        times = [*(start for _, start in self.began), end]
        return [(name, times[i + 1] - times[i]) for i, (name, _) in enumerate(self.began)]


def carry_out(arguments: argparse.Namespace) -> dict[str, Any]:
    """One request, planned and then made."""
    options = RunOptions()
    given = {
        "data": arguments.data, "windows": arguments.windows,
        "sequence_length": arguments.sequence_length, **REQUESTS[arguments.request],
    }  # fmt: skip
    loaded = load_model(arguments.model, options)
    plan = pipeline.plan(loaded, options=options, **given)
    clock, start = Clock(), time.monotonic()
    ghostlayers.show_progress(clock)
    pruned = ghostlayers.prune(loaded, options=options, **given)
    computed = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pruned.save(Path(folder) / "out")
    end = time.monotonic()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    first = clock.began[0][1] if clock.began else computed
    return {
        "request": arguments.request,
        "planned_s": plan.seconds,
        "took_s": end - start,
        "planned_bytes": plan.memory,
        "peak_bytes": 1024 * max(each.ru_maxrss for each in usage),
        "planned": [(each.name, each.seconds) for each in plan.lines],
        "took": [
            ("reading text", first - start),
            *clock.stages(computed),
            ("saving", end - computed),
        ],
    }


def show(found: dict[str, Any]) -> None:
    """Planned beside measured."""
    planned, took = found["planned_s"], found["took_s"]
    memory, peak = found["planned_bytes"] / 2**30, found["peak_bytes"] / 2**30
    print(f"\n{found['request']}: planned {planned:.0f} s, took {took:.0f} s: {planned / took:.2f}")
    print(f"  memory planned {memory:.2f} GiB, peak {peak:.2f} GiB: {memory / peak:.2f}")
    for word in ("planned", "took"):
        for name, seconds in found[word]:
            print(f"    {word:8}{seconds:7.1f} s  {name}")


def main() -> None:
    """Read the command line; every request gets a process of its own, so that peaks are its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--request", choices=REQUESTS, help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(carry_out(arguments)))
        return
    found = []
    for name in [arguments.request] if arguments.request else REQUESTS:
        command = [sys.executable, __file__, arguments.model, "--data", arguments.data]
        command += ["--windows", str(arguments.windows), "--child", "--request", name]
        command += ["--sequence-length", str(arguments.sequence_length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        show(found[-1])
    for what, ours, theirs in (
        ("time", "planned_s", "took_s"),
        ("memory", "planned_bytes", "peak_bytes"),
    ):
        ratios = [each[ours] / each[theirs] for each in found]
        print(f"\n{what}, planned / found: {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"{torch.get_num_threads()} threads")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
