"""A fresh process that imports what a proof needs while this one is busy, and waits to be asked.

Imported before torch is, so that both import at the same time.
"""

import contextlib
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ghostlayers.runtime.interrupts import LAST
from ghostlayers.runtime.launchers import alone
from ghostlayers.runtime.scratch import Scratch

RELOAD_CHECK = str(Path(__file__).with_name("reload_check.py"))
"""The program that it runs; importing it would import all that it needs here, too."""


@dataclass(frozen=True)
class Ready:
    """The process, and a folder for what it is asked and answers."""

    scratch: Scratch
    process: "subprocess.Popen[str]"

    @property
    def waits(self) -> bool:
        """Whether it can still be asked."""
        return self.process.poll() is None and Path(self.scratch.name).is_dir()

    def answer(self, request: Path) -> "subprocess.CompletedProcess[str]":
        """Ask it, and wait until it ends."""
        out, said = self.process.communicate(f"{request}\n")
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, said)


_READY: list[Ready] = []


def be_ready() -> None:
    """Start the process that will prove a checkpoint, unless one waits already.

    It ends with this one, asked or not.
    """
    if any(ready.waits for ready in _READY):
        return
    scratch = Scratch("reload")
    process = subprocess.Popen(
        [sys.executable, "-P", RELOAD_CHECK], env=environment(scratch.name), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _READY[:] = [Ready(scratch, process)]
    weakref.finalize(_READY[0], _end, process)
    LAST.append(_dismiss)


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()  # it may be importing still
    process.communicate()


def taken() -> Ready | None:
    """The process that waits, for one question; None if there is none."""
    ready = next((ready for ready in _READY if ready.waits), None)
    _READY.clear()
    return ready


@contextlib.contextmanager
def dismissed() -> Iterator[None]:
    """End the process that waits, where nobody has asked it, as the context ends."""
    try:
        yield
    finally:
        _dismiss()


def _dismiss() -> None:
    for ready in _READY:
        with ready.scratch:
            _end(ready.process)
    _READY.clear()


def environment(scratch: str) -> dict[str, str]:
    """Of a process on its own, in which a private module cache leaves no trace."""
    here = {"HF_MODULES_CACHE": scratch, "TMPDIR": scratch}  # what it leaves goes with its folder
    return {**alone(), **here, "TRANSFORMERS_VERBOSITY": "error"}
