"""Machines with an odd environment: processes of their own, since much is read at the start."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import materials
from faults.judge import Said, Verdict, judge
from faults.kinds.commands import evaluate, prune
from faults.materials import Place, Plan

Change = dict[str, str | None]


@dataclass(frozen=True)
class Odd:
    """One command under one environment.

    Attributes:
        label: what is odd.
        change: of variables; None takes one away.
        streams: of the process, where they are not ordinary.
        must: as of a plan.
    """

    label: str
    change: Change
    streams: Callable[[], dict[str, Any]] = dict
    must: str = "succeed"

    def carry_out(self, lane: Any, place: Place) -> tuple[Plan, Verdict]:
        place.take("tied", "text.txt")
        plan = evaluate("in/tied") if place.rng.random() < 0.7 else prune("in/tied")
        plan.label, plan.must, plan.truth, plan.drop = self.label, self.must, None, []
        before = materials.digest(place.inputs)
        said = self._run(place, plan)
        return plan, judge(place, plan, said, before, materials.digest(place.inputs), lambda *_: {})

    def _run(self, place: Place, plan: Plan) -> Said:
        environment = {**place.environment, **self.change}
        known = {k: v.replace("PLACE", str(place.root)) for k, v in environment.items() if v}
        ordinary = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
        }  # fmt: skip
        command = [sys.executable, "-m", "ghostlayers", *map(str, plan.arguments)]
        try:
            ended = subprocess.run(
                command, cwd=place.root, env=known, timeout=120, **{**ordinary, **self.streams()}
            )
        except subprocess.TimeoutExpired:
            return Said(None, "", "")
        out, err = ((each or b"").decode(errors="replace") for each in (ended.stdout, ended.stderr))
        return Said(ended.returncode, out, err)


def _closed(*numbers: int) -> Callable[[], dict[str, Any]]:
    import os

    return lambda: {"preexec_fn": lambda: [os.close(number) for number in numbers]}


def _full() -> dict[str, Any]:
    return {"stdout": Path("/dev/full").open("w")}


ODD = [
    Odd("ordinary", {}),
    Odd("WORLD_SIZE=abc", {"WORLD_SIZE": "abc", "RANK": "0", "LOCAL_RANK": "0"}, must="refuse"),
    Odd("RANK=-1", {"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"}, must="refuse"),
    Odd("HF_HOME cannot be made", {"HF_HOME": "/proc/none"}),
    Odd("no HOME", {"HOME": None}),
    Odd("HOME cannot be made", {"HOME": "/proc/none"}),
    Odd("LANG=C", {"LANG": "C", "LC_ALL": "C"}),
    Odd("one column", {"COLUMNS": "1"}),
    Odd("COLUMNS=x", {"COLUMNS": "x"}),
    Odd("TMPDIR is missing", {"TMPDIR": "PLACE/none"}),
    Odd("TMPDIR cannot be written", {"TMPDIR": "/proc"}),
    Odd("no standard input", {}, _closed(0)),
    Odd("no standard output", {}, _closed(1), must="either"),
    Odd("no standard error", {}, _closed(2)),
    Odd("no streams at all", {}, _closed(0, 1, 2), must="either"),
    Odd("standard output is full", {}, _full, must="either"),
    Odd("OMP_NUM_THREADS=0", {"OMP_NUM_THREADS": "0"}),
    Odd("OMP_NUM_THREADS=x", {"OMP_NUM_THREADS": "x"}),
    Odd("a proxy that is none", {"HTTPS_PROXY": "http://127.0.0.1:1", "HF_HUB_OFFLINE": None}),
    Odd("CUDA_VISIBLE_DEVICES=9", {"CUDA_VISIBLE_DEVICES": "9"}),
    Odd("PYTHONWARNINGS=error", {"PYTHONWARNINGS": "error"}, must="either"),
    Odd("optimised away", {"PYTHONOPTIMIZE": "2"}, must="refuse"),
    Odd("TERM=dumb", {"TERM": "dumb", "FORCE_COLOR": "0"}),
    Odd("HF_HUB_OFFLINE=x", {"HF_HUB_OFFLINE": "x"}),
    Odd("no PATH", {"PATH": None}),
]


def make(place: Place, index: int) -> Odd:
    """One of them."""
    return ODD[index % len(ODD)]
