"""Folders of killed processes are cleared by the next command; nobody else's are."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from ghostlayers.scratch import LOCK, Scratch, clear_scratch


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders lie in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_cleared(place: Path) -> None:
    left = place / "ghostlayers-reload-abcdefgh"
    left.mkdir()
    code = (
        "import os, signal, sys; from filelock import FileLock; one = FileLock(sys.argv[1]); "
        "one.acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(left / LOCK)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left / "weights").write_text("gigabytes")
    (place / "ghostlayers-plan-abcdefgh").mkdir()  # killed before it had a lock
    clear_scratch()
    assert list(place.iterdir()) == []


def test_what_is_in_use_or_of_others_stays(place: Path) -> None:
    other = place / "ghostlayers-offload-abcdefgh"
    foreign = place / "ghostlayers-offload-notes"
    for each in (other, foreign, place / "elsewhere"):
        each.mkdir()
        (each / LOCK).touch()
    (place / "ghostlayers-demo-abcdefgh").symlink_to(place / "elsewhere")
    unknown = place / "ghostlayers-plan-abcdefgh"
    unknown.mkdir()
    (unknown / "thesis.tex").write_text("years of work")
    before = sorted(each.name for each in place.iterdir())
    with FileLock(other / LOCK), Scratch("demo") as mine:
        clear_scratch()
        assert sorted(each.name for each in place.iterdir()) == sorted([*before, Path(mine).name])
    assert (unknown / "thesis.tex").exists()
    assert (place / "elsewhere" / LOCK).exists()
