"""Folders of killed processes are cleared by the next command; nobody else's are."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from ghostlayers.runtime.scratch import LOCK, Scratch, clear_scratch


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders lie in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_cleared(place: Path) -> None:
    left = place / "ghostlayers-reload-abcdefgh"
    left.mkdir()
    lock = place / f"{left.name}{LOCK}"
    code = (
        "import os, signal, sys; from filelock import FileLock; one = FileLock(sys.argv[1]); "
        "one.acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(lock)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left / "weights").write_text("gigabytes")
    (place / "ghostlayers-plan-abcdefgh").mkdir()  # killed before it had a lock
    clear_scratch()
    assert list(place.iterdir()) == []


def test_what_is_in_use_or_of_others_stays(place: Path) -> None:
    other = place / "ghostlayers-offload-abcdefgh"
    for folder in (other, place / "ghostlayers-offload-notes", place / "elsewhere"):
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    (place / "ghostlayers-demo-abcdefgh").symlink_to(place / "elsewhere")
    (place / "ghostlayers-plan-abcdefgh").write_text("no folder")
    linked = place / "ghostlayers-plan-ijklmnop"
    linked.mkdir()
    (place / f"{linked.name}{LOCK}").symlink_to(place / "elsewhere" / "thesis.tex")
    with FileLock(place / f"{other.name}{LOCK}"):
        before = {entry.name for entry in place.iterdir()}
        with Scratch("demo") as mine:
            clear_scratch()
            here = {entry.name for entry in place.iterdir()}
            assert here == {*before, Path(mine).name, Path(mine).name + LOCK}
        assert {entry.name for entry in place.iterdir()} == before


@pytest.mark.parametrize("count", range(1, 25))
def test_killed_at_any_change_nothing_stays(place: Path, count: int) -> None:
    """Before the first change of the place, between any two, or not at all."""
    changes = {"open", "os.mkdir", "os.remove", "os.rmdir"}
    left = [count]

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event in changes and str(place) in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os._exit(9)

    child = os.fork()
    if not child:
        sys.addaudithook(die)
        one = Scratch("reload")
        for name in "abc":
            Path(one.name, name).touch()
        one.cleanup()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
    clear_scratch()
    assert list(place.iterdir()) == []
