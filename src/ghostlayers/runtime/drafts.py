"""What is written beside its final place, and exchanged for what stands there in one step.

A draft has a name that nobody can guess and is made anew, so that no link is followed and nobody's
file is taken for it. Whoever holds the lock of an output (`locks`) knows that no other run is at
work on it, so every draft that then lies there is of a run that was killed.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

MARK = ".ghostlayers-"
OLD = ".old"
"""What is to be replaced is called so in between, where two names cannot be exchanged."""

LONGEST = 40
"""Bytes that the name of a draft or a lock has beyond that of its output."""

_OURS = re.compile(r"([0-9a-f]{16}|\d+-[a-z0-9_]+)(\.\w+)?")
"""How drafts end; those of older versions named their process."""

_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def draft_name(path: Path) -> Path:
    """A name beside a path for its draft."""
    return path.absolute().with_name(f".{path.name}{MARK}{secrets.token_hex(8)}")


def new_file(path: Path) -> Path:
    """An empty draft of a file, with its ending, which tells some writers what to write."""
    draft = draft_name(path)
    draft = draft.with_name(draft.name + path.suffix)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return draft


def new_folder(path: Path) -> Path:
    """An empty draft of a folder."""
    draft = draft_name(path)
    draft.mkdir(mode=0o700)
    return draft


def settle(path: Path) -> None:
    """Clear up after runs that were killed while they wrote this; its lock must be held.

    What one of them had moved away in order to replace it is put back first.
    """
    left = _left(path)
    for draft in left:
        if draft.suffix == OLD and not os.path.lexists(path):
            draft.rename(path)
        elif draft.is_dir():
            put_parts_back(draft)
    for draft in left:
        remove(draft)


def clear(folder: Path) -> None:
    """Remove the drafts of all files in a folder of ours."""
    for draft in inside(folder):
        remove(draft)


def inside(folder: Path) -> set[Path]:
    """The drafts of all files in a folder of ours."""
    paths = folder.glob(f".*{MARK}*")
    return {d for d in paths if _OURS.fullmatch(d.name.rpartition(MARK)[2]) and is_own(d)}


def _left(path: Path) -> list[Path]:
    folder, start = path.absolute().parent, f".{path.name}{MARK}"
    with contextlib.suppress(OSError):
        drafts = [draft for draft in folder.iterdir() if draft.name.startswith(start)]
        drafts = [draft for draft in drafts if _OURS.fullmatch(draft.name[len(start) :])]
        return sorted(draft for draft in drafts if is_own(draft))
    return []


def is_own(path: Path) -> bool:
    """Whether this user made it; true where users have no numbers."""
    try:
        return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file or a folder of ours, or a link and not what it leads to; as far as it goes."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def exchange(draft: Path, path: Path) -> Path:
    """Give a draft the name of what stands there; return where that lies now.

    Where the system can, at any instant either the old or the new one has the name. Elsewhere a
    kill may come in between, and `settle` puts the old one back.

    Raises:
        OSError: neither could be renamed; all is as it was.
    """
    if _exchanged(draft, path):
        return draft
    old = draft.with_name(draft.name + OLD)
    path.rename(old)
    try:
        draft.rename(path)
    except BaseException:
        old.rename(path)
        raise
    return old


def put_back(old: Path, draft: Path, path: Path) -> None:
    """Undo an `exchange`, which returned ``old``."""
    if old == draft:
        exchange(draft, path)
    else:
        path.rename(draft)
        old.rename(path)


def put_parts_back(draft: Path) -> None:
    """Give what was moved into a draft its names again, unless all new files have theirs."""
    held = list(draft.iterdir())
    if all(path.suffix == OLD for path in held):
        return
    for path in sorted(held):
        if path.suffix == OLD:
            path.replace(draft.with_name(path.name.removesuffix(OLD)))


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; false where the system or the disk cannot."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    call = getattr(library, "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder and all in it."""
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
    with contextlib.suppress(PermissionError):  # folders, on some systems
        _sync(path)


def flush_name(path: Path) -> None:
    """Have the disk hold the name of a file: what its folder says of it."""
    with contextlib.suppress(OSError):  # not every disk can be asked to
        _sync(path.absolute().parent)


def _sync(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
