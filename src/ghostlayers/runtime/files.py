"""Files that appear whole or not at all."""

import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ghostlayers.errors import OutputError
from ghostlayers.runtime import drafts, locks
from ghostlayers.runtime.scratch import Scratch

STREAMS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
"""Where the system keeps what stands for a device or an open file."""

FULL = (errno.ENOSPC, errno.EDQUOT)

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Names of files that go wherever a model goes."""

LONGEST_NAME = 255
"""Bytes of a name that disks can hold."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class _AsItIs:
    """A file as it is now, whatever it and its folder are called."""

    path: Path = field(compare=False)
    device: int
    number: int
    size: int
    written: int
    changed: int


def while_unchanged(most: int) -> Callable[[Callable[[Path], Result]], Callable[[Path], Result]]:
    """Have a function of a file read it once, for as long as it is the same file.

    Args:
        most: files whose results are remembered.
    """

    def decorate(read: Callable[[Path], Result]) -> Callable[[Path], Result]:
        @functools.lru_cache(maxsize=most)
        def known(file: _AsItIs) -> Result:
            return read(file.path)

        @functools.wraps(read)
        def as_it_is(path: Path) -> Result:
            now = path.stat()
            times = now.st_mtime_ns, now.st_ctime_ns
            return known(_AsItIs(path, now.st_dev, now.st_ino, now.st_size, *times))

        return as_it_is

    return decorate


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside the file, which gets its name when all went well and is removed otherwise.

    What is no regular file, such as a pipe, is written to and never replaced.

    Raises:
        OutputError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            if is_stream(path):
                draft = Path(stack.enter_context(Scratch("draft"))) / f"draft{path.suffix}"
                yield draft
                _pour(draft, path)
                return
            draft = drafts.new_file(path)
            stack.callback(drafts.remove, draft)
            yield draft
            _publish(draft, path)
        except OSError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error


@contextlib.contextmanager
def whole_files(out: Path, paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Drafts of files that belong together; the first one, which leads to the others, comes last.

    Where they replace others, those are put back when a name cannot be given, or by the next run
    that is at this output when this one is killed in between; and no reader ever finds the first of
    the ones beside others of the other.

    Args:
        out: what they are made under, whose lock is held.
        paths: the files, beside it.

    Raises:
        OutputError: they cannot be written.
    """
    if list(paths) == [out]:
        with whole_file(out) as draft:
            yield [draft]
        return
    try:
        folder = drafts.new_folder(out)
        try:
            yield [folder / path.name for path in paths]
            locks.note_parts(out, {path: folder / path.name for path in paths})
            _publish_all(out, folder, paths)
        finally:
            drafts.remove(folder)
    except OSError as error:
        raise OutputError(f"cannot write '{out}': {error.strerror or error}.") from error


def _publish_all(out: Path, folder: Path, paths: Sequence[Path]) -> None:
    """Give drafts in a folder of ours their names beside it, or leave all as it was."""
    made: list[Path] = []
    for path in paths:
        _check_still_new(out, path)
    try:
        for path in paths:
            if os.path.lexists(path):
                path.replace(folder / f"{path.name}{drafts.OLD}")
        for path in reversed(paths):
            _publish(folder / path.name, path)
            made.append(path)
    except BaseException:
        for path in made:
            path.replace(folder / path.name)
        drafts.put_parts_back(folder)
        raise


def _publish(draft: Path, path: Path) -> None:
    _check_still_new(path, path)
    draft.chmod(path.stat().st_mode & 0o777 if path.is_file() else 0o666 & ~_umask())
    drafts.flush(draft)
    locks.note_made(path, draft)
    draft.replace(path)
    drafts.flush_name(path)


def _check_still_new(out: Path, path: Path) -> None:
    """Refuse to replace what somebody may have made meanwhile."""
    claim = locks.held(out)
    if claim is not None and not claim.replace and not locks.continues(out, path):
        check_new(path)


def _pour(draft: Path, path: Path) -> None:
    place = os.open(path, os.O_WRONLY | os.O_APPEND)  # a file behind /dev/stdout keeps what it has
    with draft.open("rb") as source, os.fdopen(place, "wb") as target:
        shutil.copyfileobj(source, target)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe, or what stands for an open file: never to be replaced."""
    if not path.exists():
        return False
    return path.absolute().parent in STREAMS or not (path.is_file() or path.is_dir())


def check_can_write(path: Path | None) -> None:
    """Refuse a place where no file can be written, before anything is computed for it.

    Args:
        path: of a file to come; None for none.

    Raises:
        OutputError: it is a folder, or lies in none, or where nothing may be written.
    """
    if path is None:
        return
    folder = path.parent
    try:
        if path.is_dir():
            raise OutputError(f"cannot write '{path}': it is a folder; name a file.")
        if not folder.is_dir():
            raise OutputError(f"cannot write '{path}': there is no folder '{folder}'; make it.")
        if is_stream(path):
            return
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}.") from error
    check_name(path)
    if not os.access(folder, os.W_OK) or not takes_files(folder):
        raise OutputError(f"cannot write '{path}': '{folder}' is not yours to write into.")


def check_name(path: Path) -> None:
    """Refuse a name that a result cannot be given in the end.

    Raises:
        OutputError: it is too long for a draft beside it, holds control characters, is a link to
            nothing, or a mount point.
    """
    longest = LONGEST_NAME - drafts.LONGEST
    if len(os.fsencode(path.name)) > longest:
        raise OutputError(
            f"cannot write '{path}': its name has {len(os.fsencode(path.name))} bytes, of which "
            f"at most {longest} can be written; choose a shorter one."
        )
    if not str(path).isprintable():
        raise OutputError(
            f"cannot write {str(path)!r}: its name holds control characters, which would reach "
            "screens and pages; choose another."
        )
    if not path.name or path.name == "..":
        raise OutputError(f"cannot write '{path}': it names no file or folder of its own.")
    if path.is_symlink() and not path.exists():
        raise OutputError(f"cannot write '{path}': it is a link to nothing; remove it.")
    if os.path.ismount(path):
        raise OutputError(
            f"cannot write '{path}': a disk is mounted there, which cannot be replaced; choose a "
            "name inside it."
        )


def takes_files(folder: Path) -> bool:
    """Whether a file can be made in a folder: one is, and is gone at once."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in FULL  # said where the room is counted


def check_new(path: Path) -> None:
    """Refuse a file that is there already; an empty one holds nothing to be lost.

    Raises:
        OutputError: it is.
    """
    if os.path.lexists(path) and not is_stream(path) and (path.is_dir() or path.stat().st_size):
        raise OutputError(f"'{path}' exists already; choose another name or pass --overwrite.")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def at_home(text: str | Path) -> Path:
    """With ``~`` as the folder it stands for; as it is, where it stands for nobody's."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's raises for unknown users


def exists(path: str | Path) -> bool:
    """Whether there is such a path; what can be none is not there."""
    try:
        return at_home(path).exists()
    except (OSError, ValueError):
        return False


def shown_name(text: str) -> str:
    """A name as others should read it: a path of this machine is its last part.

    Several paths joined by ``,`` or ``+``, as corpora are, become several names. What may as well
    be an id on the hub, ``a/b``, stays.
    """
    parts = re.split(r"([,+])", text)
    return "".join(part if part in {",", "+"} else _last_part(part) for part in parts)


def _last_part(path: str) -> str:
    from_here = path.startswith(("/", "~", "./", "../")) or Path(path).is_absolute()
    return Path(path).name or path if from_here else path
