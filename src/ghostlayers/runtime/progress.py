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
