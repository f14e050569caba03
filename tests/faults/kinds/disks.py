"""Disks that are full, read-only or broken, at any change of a folder and at any size."""

import errno
from dataclasses import dataclass
from typing import Any

from faults.judge import Verdict
from faults.kinds.interruptions import COMMANDS, _fresh, _other_bits, _whole
from faults.materials import Place, Plan

NUMBERS = ["ENOSPC", "ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT"]


@dataclass(frozen=True)
class Failing:
    """A command one of whose changes fails; the next time all goes well."""

    name: str
    full: bool

    def carry_out(self, lane: Any, place: Place) -> tuple[Plan, Verdict]:
        arguments = COMMANDS[self.name]
        _, changes = _whole(lane, self.name, arguments)
        _fresh(place, self.name)
        plan = _failing(place, self.name, changes, full=self.full or not changes)
        plan.interrupted = True
        verdict = lane.attempt(place, plan, "said/failing")
        if verdict.wrong:
            return plan, verdict
        again = Plan(arguments, plan.label, must="succeed")
        if verdict.kind == "ok" and "over another" not in self.name:
            return plan, _bits_of(place, self.name)
        found = lane.attempt(place, again)
        return plan, found if found.wrong else _bits_of(place, self.name)


def _failing(place: Place, name: str, changes: int, *, full: bool) -> Plan:
    if full:
        size = place.rng.choice([4096, 10_000, 20_000, 60_000, 100_000, 200_000])
        label = f"{name}, no file over {size} bytes"
        return Plan(COMMANDS[name], label, limits={"file_size": size})
    number, at = place.rng.choice(NUMBERS), place.rng.randrange(1, changes + 1)
    hook = {"under": str(place.root), "at": at, "what": str(getattr(errno, number))}
    return Plan(COMMANDS[name], f"{name}, {number} at change {at} of {changes}", hook=hook)


def _bits_of(place: Place, name: str) -> Verdict:
    other = _other_bits(place, name)
    return Verdict("other bits", other) if other else Verdict("ok")


def make(place: Place, index: int) -> Failing:
    """A command and a disk."""
    names = list(COMMANDS)
    return Failing(names[index % len(names)], full=place.rng.random() < 0.4)
