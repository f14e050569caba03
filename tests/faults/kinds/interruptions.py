"""Commands killed at every change of a folder, and at random; the same command then goes on."""

import contextlib
import csv
import hashlib
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.judge import Verdict
from faults.kinds import gguf_files
from faults.kinds.commands import TEXT, prune
from faults.materials import RESULTS, Place, Plan, digest, left_behind

SCORE = ["score", "in/tied", "-n", "1", "-d", TEXT, "--windows", "4", "--held-out-windows", "2"]
SCORE += ["--sequence-length", "32", "--device", "cpu", "--json", "out.json"]
SIGNALS = ["SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"]


def _file(model: str, repair: str) -> list[str]:
    """A cut model as one file."""
    found = [*prune(model, repair).arguments]
    found[found.index("out")] = "out.gguf"
    return found


COMMANDS = {
    "prune": prune("in/tied", "ghost").arguments,
    "prune, unrepaired": prune("in/tied", "none").arguments,
    "prune over another": [*prune("in/tied", "ghost").arguments, "--overwrite"],
    "prune and GGUF": [
        *prune("in/tied", "none").arguments,
        "--pre-tokenizer",
        "gpt-2",
        "--gguf",
        "out.gguf",
    ],
    "adapter": [*RESULTS["adapter"], "-o", "out"],
    "compare": [*RESULTS["compared"], "-o", "out"],
    "materialize": ["materialize", "in/adapter", "-o", "out", "--base", "in/tied"],
    "plan": [*prune("in/tied", "ghost").arguments, "--plan"],
    "offload": [*prune("in/tied", "ghost").arguments, "--offload", "disk"],
    "export": ["export", "in/stock", "--pre-tokenizer", "gpt-2", "--gguf", "out.gguf"],
    "score": SCORE,
    "prune GGUF": [*_file("in/whole.gguf", "refit:1")],
    "prune GGUF over another": [*_file("in/whole.gguf", "none"), "--overwrite"],
    "prune GGUF in parts": [*_file("in/wide.gguf", "none"), "--gguf-split", "1M"],
    "prune packed": prune("in/packed", "refit:1").arguments,
    "prune packed into a file": [*_file("in/packed", "none"), "--pre-tokenizer", "gpt-2"],
}
VOLATILE = {"ghostlayers.json", "README.md", "report.html", "results.json", "results.md"}
VOLATILE |= {"written.json"}
"""Hold times, or hashes of what does; all else must be the same bits."""


@dataclass(frozen=True)
class Killed:
    """A command that is killed some times before it may end.

    Attributes:
        name: of the command.
        exact: at a change of a folder; else at a moment.
    """

    name: str
    exact: bool

    def carry_out(self, lane: Any, place: Place) -> tuple[Plan, Verdict]:
        arguments = COMMANDS[self.name]
        took, changes = _whole(lane, self.name, arguments)
        name = place.rng.choice(SIGNALS)
        plan = Plan(arguments, f"{self.name}, {name}", must="succeed")
        _fresh(place, self.name)
        rng = place.rng
        for turn in range(rng.choice([1, 1, 2, 3])):
            at = rng.randrange(1, changes + 1) if self.exact and changes else None
            label = f"{name} at change {at} of {changes}" if at else f"{name} at a moment"
            plan.label += f"; {label}"
            found = _killed(lane, place, plan, name, at, rng.uniform(0, took), turn)
            if found is not None:
                break
        verdict = found or lane.attempt(place, plan)
        if verdict.kind == "ok" and (other := _other_bits(place, self.name)):
            verdict = Verdict("other bits", other)
        return plan, verdict


_wholes: dict[str, tuple[float, int]] = {}
_bits: dict[str, dict[str, str]] = {}


def _fresh(place: Place, name: str) -> None:
    place.take("tied", "text.txt", "adapter", "stock", "custom", "packed")
    place.take("whole.gguf", "wide.gguf", "model.gguf")
    if name == "prune GGUF over another":
        (place.inputs / "model.gguf").rename(place.root / "out.gguf")
    if name == "prune over another":
        (place.inputs / "custom").rename(place.root / "out")


def _whole(lane: Any, name: str, arguments: Any) -> tuple[float, int]:
    """How long a command takes undisturbed, and how often it changes a folder."""
    if name in _wholes:
        return _wholes[name]
    place = lane.place("whole", random.Random(0))
    _fresh(place, name)
    count = place.root / "said" / "count"
    hook = {"under": str(place.root), "at": -1, "what": "SIGKILL", "count": str(count)}
    began = time.monotonic()
    said = lane.run(place, Plan(arguments, name, hook=hook))
    took = time.monotonic() - began
    if said.code != 0:
        raise RuntimeError(f"{name} does not end by itself: {said.err[-300:]}")
    _bits[name] = _own_bits(place)
    _wholes[name] = took, int(count.read_text() or 0)
    return _wholes[name]


def _own_bits(place: Place) -> dict[str, str]:
    found = digest(place.root)
    if "out/results.csv" in found:
        found["out/results.csv"] = _timeless(place.root / "out/results.csv")
    for path in place.root.glob("out*.gguf"):
        found[path.name] = _without_record(path)
    return {
        name: value
        for name, value in found.items()
        if name.startswith("out") and name.rpartition("/")[2] not in VOLATILE
        and value != "folder" and "parts" not in name and "report" not in name
    }  # fmt: skip


def _without_record(path: Path) -> str:
    """A file without what holds the time at which it was made."""
    file = gguf_files.read(path)
    entries = [each for each in file.entries if each[0] != "ghostlayers.record"]
    return hashlib.sha256(repr((entries, file.tensors)).encode()).hexdigest()


def _timeless(path: Path) -> str:
    """A table of results without what was timed."""
    rows = csv.DictReader(path.read_text().splitlines())
    timed = ("seconds", "_ms")
    return str([{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows])


def _other_bits(place: Place, name: str) -> str:
    found, wanted = _own_bits(place), _bits[name]
    differ = [each for each in {*found, *wanted} if found.get(each) != wanted.get(each)]
    return f"{sorted(differ)[0]} is not as if nothing had happened" if differ else ""


def _killed(
    lane: Any, place: Place, plan: Plan, name: str, at: int | None, moment: float, turn: int
) -> Verdict | None:
    """End it; what it then says and leaves is looked at where it could still speak."""
    hook = None if at is None else {"under": str(place.root), "at": at, "what": name}
    part = Plan(plan.arguments, plan.label, hook=hook, interrupted=True, seconds=60)
    before = digest(place.inputs)
    started = lane.start(place, part, f"said/{turn}")
    if at is None:
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, getattr(signal, name))
    code = started.wait(part.seconds)
    if before != digest(place.inputs):
        return Verdict("input", "an input is not as it was after the interruption")
    if code == 0:
        return Verdict("ok", "it had ended before")
    if at is None and code == -getattr(signal, name):  # before the command line had begun,
        return Verdict("ok", "it had ended") if _had_ended(place, plan) else None  # or behind it
    errors = place.root / f"said/{turn}/stderr"
    if at is None and not errors.exists():
        return None  # before it had a screen
    return _polite(name, code, errors.read_text(errors="replace"))


def _had_ended(place: Place, plan: Plan) -> bool:
    """Whether all is there, and the lock gone: the same command would not be an interrupted one."""
    name = next(each for each, given in COMMANDS.items() if given == plan.arguments)
    locks = place.root.glob(".*.ghostlayers-lock")
    return bool(_bits[name]) and not _other_bits(place, name) and not any(locks)


def _polite(name: str, code: int | None, errors: str) -> Verdict | None:
    if code is None:
        return Verdict("hang", f"does not end at {name}")
    if name == "SIGKILL":
        return None
    if "Traceback" in errors:
        return Verdict("traceback", f"at {name}: {errors.strip().splitlines()[-1][-200:]}")
    if "This is a bug" in errors:
        return Verdict("bug", f"at {name}: {errors.strip()[-200:]}")
    if code not in (0, 1, 2, 129, 130, 143):
        return Verdict("status", f"status {code} at {name}")
    return None


@dataclass(frozen=True)
class Together:
    """Two commands with one output at the same time."""

    def carry_out(self, lane: Any, place: Place) -> tuple[Plan, Verdict]:
        names = ["prune", "prune, unrepaired", "prune and GGUF", "adapter", "prune packed"]
        name = place.rng.choice([*names, "prune GGUF", "prune GGUF in parts"])
        _whole(lane, name, COMMANDS[name])
        _fresh(place, name)
        plan = Plan(COMMANDS[name], f"two at once: {name}", interrupted=True)
        first = lane.start(place, plan, "said/first")
        time.sleep(place.rng.uniform(0, 1.5))
        second = lane.start(place, plan, "said/second")
        codes = [first.wait(60), second.wait(60)]
        for each, code in zip(("first", "second"), codes, strict=True):
            errors = (place.root / "said" / each / "stderr").read_text(errors="replace")
            if found := _polite("the other", code, errors):
                return plan, found
        if 0 not in codes:
            return plan, Verdict("refused", f"neither of two runs ended well: {codes}")
        if other := _other_bits(place, name):
            return plan, Verdict("other bits", other)
        left = left_behind(place.root, plan.outputs)
        return plan, Verdict("left", ", ".join(left)) if left else Verdict("ok")


def make(place: Place, index: int) -> Killed:
    """A command and a way to kill it."""
    names = list(COMMANDS)
    return Killed(names[index % len(names)], exact=place.rng.random() < 0.75)


def together(place: Place, index: int) -> Together:
    """Two at once."""
    return Together()
