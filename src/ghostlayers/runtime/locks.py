"""One run at a time for each output, and what a run that did not end well had made of it.

The lock of an output is a file beside it that the system holds for the process and lets go with it,
however that ends. In it stands who holds it, for others to read. A run that ends well removes it.
One that was killed, or interrupted, after an output had its name leaves it there with a note of
what it made: the same command may then replace that output and go on.
"""

import contextlib
import datetime
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ghostlayers.errors import OutputError
from ghostlayers.runtime import drafts

LOCK = f"{drafts.MARK}lock"


@dataclass
class Claim:
    """An output that this process is at.

    Attributes:
        path: the output.
        lock: the system's.
        note: what stands in the lock's file.
        left: the note of a run before, which had made the output and then did not end well.
        replace: what is there may be replaced.
        parents: folders that were made for it, innermost first.
    """

    path: Path
    lock: FileLock
    note: dict[str, Any]
    left: dict[str, Any] | None = None
    replace: bool = True
    parents: list[Path] = field(default_factory=list)

    @property
    def continues(self) -> bool:
        """Whether what is there was made by an interrupted run of the same command."""
        left = self.left or {}
        asked = self.note.get("request")
        return asked is not None and left.get("request") == asked

    def write(self) -> None:
        """Write the note down; what was left by a run before stays until there is another."""
        content = json.dumps({**self.note, "left": self.left}).encode()
        place = os.open(self.lock.lock_file, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.ftruncate(place, max(len(content), os.fstat(place).st_size))
            os.pwrite(place, content, 0)
            os.ftruncate(place, len(content))
        finally:
            os.close(place)


_HELD: dict[str, Claim] = {}
"""What this process holds, by place: the system's locks are the process's, too, and who writes an
output, however deep below the command that claimed it, asks here."""


def held(path: Path) -> Claim | None:
    """This process's claim on an output, if it has one."""
    return _HELD.get(_key(path))


def continues(path: Path, part: Path | None = None) -> bool:
    """Whether what is there was made by an interrupted run of the command that is under way.

    Args:
        path: the output.
        part: of several files that it is made of, the one that is asked about.
    """
    claim = held(path)
    if claim is None or not claim.continues:
        return False
    return part is None or _is_made(claim.left or {}, part)


@contextlib.contextmanager
def holding(path: Path, request: str | None = None, *, replace: bool = True) -> Iterator[None]:
    """Be the only run that is at an output; drafts that killed runs left of it are cleared.

    Args:
        path: of the file or folder to be made.
        request: digest of the command, by which it knows what it has made itself.
        replace: what is there may be replaced.

    Raises:
        OutputError: another run is at it, or nothing can be written there.
    """
    key = _key(path)
    if key in _HELD:
        yield
        return
    claim = _take(path, request, replace=replace)
    _HELD[key] = claim
    ended = False
    try:
        yield
        ended = True
    finally:
        del _HELD[key]
        _let_go(claim, ended=ended)


def note_made(path: Path, draft: Path) -> None:
    """Note that a draft is about to get the name of an output which this process holds."""
    claim = held(path)
    if claim is not None:
        claim.note["made"] = identity(draft)
        claim.write()


def note_parts(path: Path, parts: Mapping[Path, Path]) -> None:
    """Note that drafts are about to get the names of the files that an output is made of.

    Args:
        path: the output, which this process holds.
        parts: drafts by the names to come, beside the output.
    """
    claim = held(path)
    if claim is not None:
        claim.note["parts"] = {part.name: identity(draft) for part, draft in parts.items()}
        claim.write()


def _is_made(note: Mapping[str, Any], path: Path) -> bool:
    """Whether a run, by its note, has made what is there under a name; a part's, too."""
    parts = note.get("parts")
    made = [note.get("made"), parts.get(path.name) if isinstance(parts, dict) else None]
    return identity(path) in [entry for entry in made if entry]


def _is_begun(note: Mapping[str, Any], path: Path) -> bool:
    """Whether a run has made an output, or any part of it."""
    parts = note.get("parts")
    names = [Path(name).name for name in parts] if isinstance(parts, dict) else []
    return any(_is_made(note, place) for place in (path, *map(path.with_name, filter(None, names))))


def identity(path: Path) -> list[int] | None:
    """What tells a file or a folder from any other, and stays when it is renamed."""
    try:
        status = path.lstat()
    except OSError:
        return None
    same = [] if path.is_dir() else [status.st_size, status.st_mtime_ns]
    return [status.st_ino, *same]


def make_parents(parent: Path) -> list[Path]:
    """Make missing folders; return those made, innermost first.

    Raises:
        OutputError: one cannot be made.
    """
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make '{missing[0]}': {error.strerror}.") from error
    return missing


def _key(path: Path) -> str:
    return str(path.absolute().parent.resolve() / path.name)


def _take(path: Path, request: str | None, *, replace: bool) -> Claim:
    place = path.absolute()
    file = place.with_name(f".{path.name}{LOCK}")
    parents = make_parents(place.parent)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
        claim = Claim(path, lock, _note(request), _left(path, file), replace, parents)
        claim.write()
        drafts.settle(path)
    except Timeout as error:
        raise OutputError(_taken(path, file)) from error
    except OSError as error:
        _leave(lock, parents, stays=_left(path, file) is not None)
        raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error
    return claim


def _let_go(claim: Claim, *, ended: bool) -> None:
    """Remove the lock's file, unless what was made may have to be made again."""
    if not ended and not claim.note.keys() & {"made", "parts"} and claim.left is not None:
        claim.note, claim.left = {**claim.left}, None
        with contextlib.suppress(OSError):
            claim.write()
    stays = not ended and claim.note["request"] and _is_begun(claim.note, claim.path)
    _leave(claim.lock, claim.parents, stays=bool(stays))


def _leave(lock: FileLock, parents: list[Path], *, stays: bool = False) -> None:
    """Let go of a lock, with its file and the folders that were made for nothing."""
    if lock.is_locked and not stays:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


def _note(request: str | None) -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:400],
        "request": request,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))) as opened:
            content = json.loads(opened.read(100_000))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _left(path: Path, file: Path) -> dict[str, Any] | None:
    """The note of the last run that had made what is there now and then did not end well."""
    note = _read(file)
    for former in (note, note.get("left")):
        if isinstance(former, dict) and _is_begun(former, path):
            return {name: value for name, value in former.items() if name != "left"}
    return None


def _taken(path: Path, file: Path) -> str:
    note = {name: _plain(value) for name, value in _read(file).items()}
    if not note:
        return f"'{path}' is being written by another run; wait for it, or choose another output."
    return (
        f"'{path}' is being written by another run: process {note.get('process')} on "
        f"{note.get('host')}, since {note.get('since')} ({note.get('command')}). Wait for it, or "
        "choose another output."
    )


def _plain(value: Any) -> str:
    return "".join(character if character.isprintable() else "?" for character in str(value))[:400]
