"""What shows the stages of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import ghostlayers
from ghostlayers.cli.screen import Bars
from ghostlayers.runtime import progress


class Notes:
    """Notes the stages that are shown, and how far they come."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[progress.Advance]:
        assert total > 0
        self.stages[description] = 0

        def advance(units: int = 1) -> None:
            self.stages[description] += units

        yield advance


def windows() -> Iterator[int]:
    with progress.stage("windows", 2) as advance:
        for number in range(2):
            yield number
            advance()


def test_a_stage_within_a_stage_is_not_shown() -> None:
    with progress.shown_by(notes := Notes()):
        with progress.stage("outer", 3) as advance:
            with progress.stage("inner", 9) as inner:
                inner(9)
            advance(3)
        with progress.stage("next", 1) as advance:
            advance()
    assert notes.stages == {"outer": 3, "next": 1}


def test_passes_that_end_in_any_order_leave_nothing_open() -> None:
    with progress.shown_by(notes := Notes()):
        first, second = windows(), windows()
        next(first)
        next(second)
        list(first)
        list(second)
        with progress.stage("next", 1) as advance:
            advance()
    assert notes.stages == {"windows": 2, "next": 1}


def test_what_a_kept_traceback_leaves_open_hides_nothing_for_others() -> None:
    left = windows()
    next(left)
    with progress.shown_by(notes := Notes()):
        assert list(windows()) == [0, 1]
    left.close()
    assert notes.stages == {"windows": 2}


def test_nothing_is_shown_until_asked_for() -> None:
    notes = Notes()
    before = progress.show_by(progress.Silent())
    try:
        assert list(windows()) == [0, 1]
        ghostlayers.show_progress(notes)
        list(windows())
        ghostlayers.show_progress()
        assert isinstance(progress.show_by(progress.Silent()), Bars)
    finally:
        progress.show_by(before)
    assert notes.stages == {"windows": 2}
