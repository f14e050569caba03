"""Folders for what is needed only while a process runs.

Each holds a file that its process keeps locked, so that those of processes that were killed are
known, and cleared by the next command.
"""

import contextlib
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

START = "ghostlayers-"
LOCK = "in-use.lock"
_NAME = re.compile(rf"{START}(reload|plan|offload|demo|draft)-[a-z0-9_]{{8}}")

ATTEMPTS = 5
"""Another command may take a folder that is not locked yet for one that was left."""


_OPEN: "weakref.WeakSet[Scratch]" = weakref.WeakSet()
"""Those of this process."""


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder, cleared by a later command where this process cannot.

    Args:
        what: it is for, in its name.
    """

    def __init__(self, what: str) -> None:
        clear_scratch()
        for attempt in range(ATTEMPTS):
            super().__init__(prefix=f"{START}{what}-", ignore_cleanup_errors=True)
            self._lock = FileLock(Path(self.name) / LOCK)
            try:
                self._lock.acquire()
                _OPEN.add(self)
                return
            except OSError:
                self.cleanup()
                if attempt == ATTEMPTS - 1:
                    raise


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """Remove the folders that are made in this context, at its end."""
    before = list(_OPEN)
    try:
        yield
    finally:
        for each in set(_OPEN).difference(before):
            each.cleanup()


def clear_scratch() -> None:
    """Remove the folders that this user's killed processes left."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        left = [each for each in entries if _NAME.fullmatch(each.name)]
        for entry in left:
            with contextlib.suppress(OSError, Timeout):
                if _is_own(entry):
                    _clear(Path(entry.path))


def _is_own(entry: os.DirEntry[str]) -> bool:
    found = entry.stat(follow_symlinks=False)
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return stat.S_ISDIR(found.st_mode) and mine


def _clear(folder: Path) -> None:
    if not (folder / LOCK).is_file():
        folder.rmdir()  # nothing in it, or nobody knows whose it is
        return
    with FileLock(folder / LOCK, blocking=False):
        shutil.rmtree(folder, ignore_errors=True)
