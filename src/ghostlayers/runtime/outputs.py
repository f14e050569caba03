"""Folders that appear whole or not at all, and replace nothing but what their record lists.

A folder is written beside its final place and then exchanged for what stands there. What stood
there is removed only if Ghostlayers wrote all of it: its record lists every file by its hash, so
that anything more, or anything that was changed, is found before a byte is computed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ghostlayers.errors import OutputError
from ghostlayers.runtime import drafts, locks
from ghostlayers.runtime.files import check_name, takes_files, while_unchanged

RECORD = "ghostlayers.json"

SHOWN = 6
"""Names in a message."""


def check_output(out: Path, *, overwrite: bool, needed_bytes: int) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises:
        OutputError: it exists and may not be overwritten, holds more than Ghostlayers wrote, its
            parent cannot be written, or the disk is too full.
    """
    check_place(out, needed_bytes)
    check_replaceable(out, overwrite=overwrite)


def check_place(out: Path, needed_bytes: int = 0) -> None:
    """Refuse a place where no folder can be made, or that has no room for it.

    Raises:
        OutputError: with the reason.
    """
    try:
        out.exists()
        check_name(out)
        _check_parent(_existing_parent(out), needed_bytes)
    except OSError as error:
        raise OutputError(f"cannot use '{out}' as an output: {error.strerror}.") from error


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace what is there, unless all of it was written here and it is asked for.

    What an interrupted run of the same command has made counts as asked for.

    Raises:
        OutputError: with what is in the way.
    """
    if not os.path.lexists(out) or _is_empty(out):
        return
    if not overwrite and not locks.continues(out):
        raise OutputError(f"'{out}' exists already; choose another folder or pass --overwrite.")
    if not (out / RECORD).is_file():
        raise OutputError(
            f"'{out}' was not made by Ghostlayers (it holds no {RECORD}), so it will not be "
            "overwritten; choose another folder."
        )
    others = unlisted(out)
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise OutputError(
            f"'{out}' holds what its record does not list: {', '.join(others[:SHOWN])}{more}. "
            "Only what Ghostlayers wrote there is ever overwritten; move the rest away, or choose "
            "another folder."
        )


def _is_empty(out: Path) -> bool:
    """Whether it is a folder with nothing in it, which can be put away: not a link, no volume."""
    with contextlib.suppress(OSError):
        own = out.is_dir() and not out.is_symlink() and not out.is_mount()
        return own and not any(out.iterdir())
    return False


def unlisted(folder: Path) -> list[str]:
    """What a folder holds beside its record and the files that the record lists by their hashes.

    Raises:
        OutputError: the record cannot be read.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        listed = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"'{folder / RECORD}' does not tell what was written there, so it will not be "
            "overwritten; choose another folder."
        ) from error
    return [
        name if name not in listed else f"{name} (changed)"
        for name, path in _entries(folder)
        if name != RECORD and not _is(path, listed.get(name))
    ]


def _entries(folder: Path) -> list[tuple[str, Path]]:
    """All that is in a folder, by its path in it; empty folders and links to others, too."""
    paths = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        names = [*files, *(inner for inner in folders if (here / inner).is_symlink())]
        if not folders and not files and here != folder:
            paths.append(here)
        paths += [here / name for name in names]
    return sorted((path.relative_to(folder).as_posix(), path) for path in paths)


def _is(path: Path, expected: Any) -> bool:
    """Whether it is a file of that hash."""
    if not isinstance(expected, str) or path.is_symlink() or not path.is_file():
        return False
    return _known_hash(path) == expected


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_known_hash = while_unchanged(most=1000)(file_hash)
"""Gigabytes are not read again."""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path in it; its record aside."""
    return {name: file_hash(path) for name, path in _entries(folder) if name != RECORD}


def _check_parent(parent: Path, needed_bytes: int) -> None:
    if not parent.is_dir():
        raise OutputError(f"'{parent}' is a file, not a folder; choose another output.")
    if not os.access(parent, os.W_OK) or not takes_files(parent):
        raise OutputError(f"cannot write into '{parent}'; choose another folder.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"'{parent}' has {free / 1e6:,.0f} MB free, the checkpoint needs "
            f"{needed_bytes / 1e6:,.0f} MB; free some space or choose another disk."
        )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextlib.contextmanager
def whole_folder(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A draft beside a folder, which gets its name when all went well and is removed otherwise.

    Args:
        out: the folder to make.
        overwrite: replace what is there, if all of it was written here.
        needed_bytes: of what will be written, about.

    Raises:
        OutputError: it cannot be written, another run is at it, or it may not be replaced.
    """
    check_place(out, needed_bytes)
    with locks.holding(out):
        check_replaceable(out, overwrite=overwrite)
        try:
            draft = drafts.new_folder(out)
            try:
                yield draft
                _publish(draft, out, overwrite=overwrite)
            finally:
                drafts.remove(draft)
        except OSError as error:
            raise OutputError(f"cannot write '{out}': {error.strerror or error}.") from error
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OutputError(f"cannot write the weights into '{out}': {error}.") from error


def _publish(draft: Path, out: Path, *, overwrite: bool) -> None:
    draft.chmod(0o755)  # a draft is private
    _share_weights(draft)
    drafts.flush(draft)
    if os.path.lexists(out):
        check_replaceable(out, overwrite=overwrite)
    locks.note_made(out, draft)
    if os.path.lexists(out) and not _is_empty(out):
        _discard(drafts.exchange(draft, out), draft, out)
    else:
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        draft.rename(out)
    drafts.flush_name(out)


def _discard(old: Path, draft: Path, out: Path) -> None:
    """Remove what was replaced, if nobody has put anything into it meanwhile."""
    if old.is_symlink():
        old.unlink()
    elif unlisted(old):
        drafts.put_back(old, draft, out)
        check_replaceable(out, overwrite=True)
    else:
        shutil.rmtree(old, ignore_errors=True)


def _share_weights(folder: Path) -> None:
    """Let weights be read by whoever may read the rest: safetensors makes its files private."""
    weights = set(folder.glob("*.safetensors"))
    modes = [file.stat().st_mode & 0o666 for file in folder.iterdir() if file not in weights]
    for path in weights:
        path.chmod(max(modes, default=0o600))
