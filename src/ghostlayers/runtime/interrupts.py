"""Polite kills: Ctrl-C, SIGTERM and a closed terminal end a command in one way from the start.

This is the first that is imported, so it imports little itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

STATUS = 130
"""Exit status of an interrupted command."""

SAID = "interrupted; nothing was left half-written."

PROGRAM = "ghostlayers"

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


LAST: list[Any] = []
"""What is still to be done where a signal ends the program at once: functions of no arguments.

Of the process, as its signal handlers are, which can be handed nothing else."""


class Interrupts:
    """What came while a command ran.

    Attributes:
        received: one of the signals came.
    """

    def __init__(self) -> None:
        self.received = False


def leave_at_once() -> None:
    """End on a signal without a traceback, for as long as nothing but imports is under way.

    Only in the program itself: who imports the package keeps its own ways.
    """
    if _is_program():
        _install(_leave)


@contextlib.contextmanager
def raised() -> Iterator[Interrupts]:
    """Have each of the signals raise `KeyboardInterrupt` here, so that all cleans up after itself.

    A signal that was ignored stays so, as ``nohup`` wants it.
    """
    came = Interrupts()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        came.received = True
        raise KeyboardInterrupt

    before = _install(stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _install(handler: Any) -> dict[int, Any]:
    """Handle the signals that are not ignored; how they were handled before."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        return {}
    known = {number: signal.getsignal(number) for number in SIGNALS}
    # None: somebody's handler that Python knows nothing of.
    known = {n: former for n, former in known.items() if former not in (signal.SIG_IGN, None)}
    for number in known:
        signal.signal(number, handler)
    return known


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"Error: {SAID}\n".encode())
    leave_with(STATUS)


def leave_with(status: int) -> None:
    """End the program at once, with what is still to be done, and nothing of others."""
    for work in LAST:
        with contextlib.suppress(Exception):
            work()
    os._exit(status)


def _is_program() -> bool:
    """Whether this process was started as ``ghostlayers`` or ``python -m ghostlayers``."""
    name = sys.argv[0] if sys.argv else ""
    if name != "-m":
        return os.path.basename(name).partition(".")[0] == PROGRAM  # noqa: PTH119
    given = sys.orig_argv[1:]
    return f"-m{PROGRAM}" in given or PROGRAM in given[given.index("-m") + 1 :][:1]
