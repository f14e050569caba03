"""Folders for what is needed only while a process runs.

Each has a file beside it that its process keeps locked, made before the folder and removed after
it. So a folder whose file is not locked, or that has none, is what a killed process left, and the
next command clears it.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ghostlayers.runtime import drafts

START = "ghostlayers-"
LOCK = ".lock"
_NAME = re.compile(
    rf"{START}(reload|plan|offload|expand|demo|draft|types)-[a-z0-9_]{{8}}({re.escape(LOCK)})?"
)

_OPEN: "weakref.WeakSet[Scratch]" = weakref.WeakSet()
"""Those of this process: a command removes what was made anywhere below it (`tidied`)."""


class Scratch:
    """A temporary folder, cleared by a later command where this process cannot.

    As a context it is the folder's path, and ends with it; else it ends with the process.

    Args:
        what: it is for, in its name.

    Attributes:
        name: the folder's path.
    """

    def __init__(self, what: str) -> None:
        clear_scratch()
        folder, lock = _claim(what)
        self.name = str(folder)
        self._remove = weakref.finalize(self, _remove, folder, lock)
        folder.mkdir(mode=0o700)
        _OPEN.add(self)

    def cleanup(self) -> None:
        """Remove the folder."""
        self._remove()

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def _claim(what: str) -> tuple[Path, FileLock]:
    """A name that nobody has, and its lock."""
    while True:
        folder = Path(tempfile.gettempdir()) / f"{START}{what}-{secrets.token_hex(4)}"
        lock = FileLock(_lock_of(folder))
        lock.acquire()
        if not folder.exists() and _lock_of(folder).exists():
            return folder, lock
        lock.release()  # somebody cleared it before it was locked


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock_of(folder).unlink()
    lock.release()


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """Remove the folders that are made in this context, at its end."""
    before = list(_OPEN)
    try:
        yield
    finally:
        for scratch in set(_OPEN).difference(before):
            scratch.cleanup()


def is_scratch(file: Path) -> bool:
    """Whether a file lies in such a folder."""
    return any(_NAME.fullmatch(parent.name) for parent in file.parents)


def clear_scratch() -> None:
    """Remove the folders that this user's killed processes left."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        left = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
        for path in {place.with_name(place.name.removesuffix(LOCK)) for place in left}:
            with contextlib.suppress(OSError, Timeout):
                _clear(path)


def _clear(folder: Path) -> None:
    lock = _lock_of(folder)
    if not (_is_own(folder, stat.S_ISDIR) and _is_own(lock, stat.S_ISREG)):
        return
    if not lock.exists():  # it is made first, and removed last
        shutil.rmtree(folder, ignore_errors=True)
        return
    with FileLock(lock, blocking=False) as held:
        _remove(folder, held)


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether there is nothing, or something of this kind that is this user's."""
    try:
        return is_kind(path.lstat().st_mode) and drafts.is_own(path)
    except FileNotFoundError:
        return True
