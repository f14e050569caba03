"""What became of a fault: right, refused cleanly, or wrong."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.materials import Place, Plan, left_behind

CLEAN = {0, 1, 2}
INTERRUPTED = {129, 130, 143, -9}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")

PROMISES = {
    "silent": "P1, P6: silently wrong",
    "travels": "P2: foreign code travels with a result",
    "input": "P4: an input was changed",
    "code": "P3: code ran",
    "left": "P5: something stayed behind",
    "other bits": "P5: other bits after an interruption",
    "bug": "P8: 'this is a bug' for bad input",
    "traceback": "P8: a traceback",
    "hang": "P7, P8: a hang",
    "crash": "P8: the process died",
    "status": "P8: a status that says nothing",
    "silence": "P8: refused without a word",
    "refused": "refused, though it was right",
    "screen": "P9: control characters on the screen",
    "json": "P6: JSON that is none",
}
"""What can be wrong, and the promise that it breaks."""


@dataclass(frozen=True)
class Verdict:
    """What became of it.

    Attributes:
        kind: "ok", "clean" (refused by name), or a key of `PROMISES`.
        reason: what was seen.
    """

    kind: str
    reason: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it breaks a promise."""
        return self.kind in PROMISES


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int | None
    out: str
    err: str

    @property
    def both(self) -> str:
        return f"{self.out}\n{self.err}"


Truth = Callable[[str, list[int]], dict[str, Any]]


def judge(
    place: Place, plan: Plan, said: Said, before: dict[str, str], after: dict[str, str],
    truth: Truth,
) -> Verdict:  # fmt: skip
    """The first thing that is wrong, or how it ended well."""
    for look in (_ended, _kept, _clean_screen, _cleaned_up):
        if found := look(place, plan, said, before, after):
            return found
    if said.code != 0:
        return Verdict("refused" if plan.must == "succeed" else "clean", _last(said.err))
    if plan.must == "refuse":
        return Verdict("silent", f"accepted: {plan.label}")
    return _results(place, plan, said, truth) or Verdict("ok")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-3:])[-300:]


def _ended(place: Place, plan: Plan, said: Said, *_: Any) -> Verdict | None:
    if place.marker.exists():
        return Verdict("code", f"{plan.label}: code ran")
    if said.code is None:
        return Verdict("hang", f"over {plan.seconds:.0f} s")
    if "Traceback (most recent call last)" in said.both:
        return Verdict("traceback", _last(said.err))
    if "This is a bug" in said.both or "please report" in said.both.lower():
        return Verdict("bug", _last(said.err))
    if said.code < 0 and not plan.interrupted:
        return Verdict("crash", f"signal {-said.code}: {_last(said.err)}")
    if said.code not in (CLEAN | INTERRUPTED if plan.interrupted else CLEAN):
        return Verdict("status", f"status {said.code}: {_last(said.err)}")
    if said.code in (1, 2) and not said.err.strip():
        return Verdict("silence", f"status {said.code} and nothing said")
    return None


def _kept(
    place: Place, plan: Plan, said: Said, before: dict[str, str], after: dict[str, str]
) -> Verdict | None:
    if before == after:
        return None
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    return Verdict("input", f"{sorted(changed)[0]} is not as it was (and {len(changed) - 1} more)")


def _clean_screen(place: Place, plan: Plan, said: Said, *_: Any) -> Verdict | None:
    if found := CONTROL.search(said.both):
        return Verdict("screen", f"character {ord(found[0]):#04x} on the screen")
    return None


def _cleaned_up(place: Place, plan: Plan, said: Said, *_: Any) -> Verdict | None:
    if plan.interrupted:
        return None
    allowed = plan.outputs if said.code == 0 else ()
    left = left_behind(place.root, (*allowed, *plan.there))
    return Verdict("left", f"left behind: {', '.join(left[:4])}") if left else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} in JSON")


def _results(place: Place, plan: Plan, said: Said, truth: Truth) -> Verdict | None:
    for path in sorted(place.root.rglob("*.json")):
        if any(path.is_relative_to(place.root / name) for name in ("in", "said", "home")):
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except ValueError as error:
            return Verdict("json", f"{path.name}: {error}")
    if plan.foreign and (found := _foreign(place.root / "out")):
        return Verdict("travels", f"{plan.label}: {found}")
    if plan.truth is None:
        return None
    wanted = truth(plan.truth, plan.drop)
    if "refuse" in wanted:
        return Verdict("silent", f"{plan.label}: accepted, though: {wanted['refuse']}")
    found = _loss(place.root / "out.json")
    if plan.drop:
        made = truth(plan.made, [])
        found = made.get("loss", math.nan)
    return None if found is None else _compare(found, wanted["loss"], plan)


def _foreign(out: Path) -> str | None:
    """Code in a result that is not ours, or an entry that names it."""
    scripts = [path for path in out.rglob("*.py") if path.name != "modeling_ghostlayers.py"]
    if scripts:
        return f"{scripts[0].name} is in the result"
    for path in out.rglob("*config*.json"):
        content = json.loads(path.read_text())
        keys = ("auto_map", "custom_generate", "compile_config")
        found = [key for key in keys if "evil" in str(content.get(key, ""))]
        if found or "in/tied" in str(content.get("custom_generate", "")):
            return f"{path.name} names it: {found}"
    return None


def _compare(found: float, wanted: float, plan: Plan) -> Verdict | None:
    if not math.isfinite(found) or abs(found - wanted) > 2e-3:
        return Verdict("silent", f"{plan.label}: loss {found:.4f} instead of {wanted:.4f}")
    return None


def _loss(path: Path) -> float | None:
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    results = content.get("results") if isinstance(content, dict) else None
    return results[0].get("loss_nats") if results else None
