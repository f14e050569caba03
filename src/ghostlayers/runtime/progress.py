"""How long work reports what it is doing, without knowing whether anyone looks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Reports that some units of a stage are done."""

    def __call__(self, units: int = 1) -> None:
        """Count units as done."""


class Progress(Protocol):
    """Receives the stages of a run; the command line draws a bar for each."""

    def stage(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of so many units of work."""


class Silent:
    """Progress that shows nothing: the library's default."""

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Advance]:
        """Count nothing."""
        del description, total

        def advance(units: int = 1) -> None:
            del units

        yield advance


# One a process, as a log is: what computes need not hand it down to what it calls.
_shown: Progress = Silent()
_open: set[object] = set()


@contextmanager
def stage(description: str, total: int) -> Iterator[Advance]:
    """Open a stage of so many units of work, shown by whatever shows progress now.

    A stage within a stage is not shown: there is one bar at a time.
    """
    this = object()
    shown = Silent() if _open else _shown
    with shown.stage(description, total) as advance:
        _open.add(this)
        try:
            yield advance
        finally:
            _open.discard(this)


def show_by(progress: Progress) -> Progress:
    """Show stages by this from now on.

    Returns:
        What showed them before.
    """
    global _shown
    before, _shown = _shown, progress
    _open.clear()  # of a pass that an exception left half-way, whose traceback somebody keeps
    return before


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Show stages by this within a block."""
    before = show_by(progress)
    try:
        yield
    finally:
        show_by(before)
