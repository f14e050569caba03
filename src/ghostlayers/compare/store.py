"""A folder that grows part by part, so that an interrupted comparison goes on where it stopped."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostlayers.calibration import journal
from ghostlayers.errors import OutputError
from ghostlayers.runtime import drafts
from ghostlayers.runtime.documents import (
    NO_NUMBERS,
    Checked,
    brief,
    check,
    read_json,
    strict,
    to_json,
)
from ghostlayers.runtime.files import whole_file, write_whole
from ghostlayers.runtime.outputs import file_hash
from ghostlayers.runtime.shown import shared

REQUEST = "request.json"
PARTS = "parts"
REPORT = ("results.json", "results.md", "results.csv", "tasks.csv", "report.html")
"""What is written from the parts at the end."""

WRITTEN = "written.json"
"""The hashes of the reports that were written here: what has others was changed, or is not ours."""


class _Part(Checked):
    """A finished part as it is kept."""

    key: str
    part: dict[str, Any]
    sha256: str


def _damaged(path: Path) -> str:
    return f"the part '{path}' of an interrupted comparison"


def check_place(folder: Path) -> None:
    """Refuse what cannot be a comparison's folder, before anything is opened.

    Raises:
        OutputError: a file's name, or a folder that something else lies in.
    """
    if folder.suffix == ".gguf":
        raise OutputError(f"'{folder}' names a GGUF file; tables and a page need a folder's name.")
    empty = folder.is_dir() and not set(folder.iterdir()) - drafts.inside(folder)
    empty = empty or not folder.exists()
    if not empty and not (folder / REQUEST).is_file():
        raise OutputError(
            f"'{folder}' exists and was not made by a comparison; choose another folder."
        )


class Store:
    """Finished parts of a comparison, each written whole or not at all.

    Args:
        folder: where.
        request: what was asked and of what; a folder that holds another's parts is refused.
        overwrite: throw away what is there, if a comparison made it.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, request: dict[str, Any], *, overwrite: bool = False) -> None:
        request = shared(request)  # names for paths; what they hold is told by hashes
        self.folder = folder
        self._new = not folder.exists()
        if folder.exists():
            drafts.clear(folder)
            self._check(request, overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # First, so that a folder with anything in it is known by it.
            write_whole(folder / REQUEST, to_json(dict(sorted(request.items()))))
            (folder / PARTS).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write into '{folder}': {error.strerror}.") from error
        drafts.clear(folder / PARTS)

    def _check(self, request: dict[str, Any], overwrite: bool) -> None:
        """Go on with the same request, start again if allowed, or refuse."""
        path = self.folder / REQUEST
        check_place(self.folder)
        if not path.is_file():
            return
        check_links(self.folder)
        known = check(read_json(path, OutputError), dict[str, Any], f"'{path}'", OutputError)
        same = known == strict(request)
        if not same and not overwrite:
            raise OutputError(
                f"'{self.folder}' holds another comparison (it differs in "
                f"{_difference(known, request)}); choose another folder, repeat that comparison's "
                "options to go on with it, or pass --overwrite."
            )
        check_reports(self.folder)
        if not same:
            self._empty()

    def _empty(self) -> None:
        """Remove what a comparison wrote, if that is all that lies where it writes.

        Raises:
            OutputError: it is not.
        """
        if self.folder.is_symlink():
            raise OutputError(
                f"'{self.folder}' is a link; nothing is overwritten through one. Name the folder."
            )
        parts = sorted((self.folder / PARTS).glob("*"))
        others = [path.name for path in parts if not (_is_part(path) or _is_unfinished(path))]
        if others:
            raise OutputError(
                f"'{self.folder / PARTS}' holds what no comparison wrote "
                f"({', '.join(others[:6])}), so nothing there is overwritten; choose another "
                "folder."
            )
        for name in (*REPORT, WRITTEN):  # would pass for the new comparison's until that has ended
            (self.folder / name).unlink(missing_ok=True)
        for path in parts:
            journal.finish(path) if path.is_dir() else path.unlink()

    def forget(self) -> None:
        """Leave no folder where there was none and no part came of it."""
        if self._new and not any((self.folder / PARTS).iterdir()):
            with contextlib.suppress(OSError):
                (self.folder / PARTS).rmdir()
                (self.folder / REQUEST).unlink()
                self.folder.rmdir()

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished part, or None."""
        path = self._path(key)
        if not path.is_file():
            return None
        values = read_json(path, OutputError, refused=NO_NUMBERS)
        content = check(values, _Part, _damaged(path), OutputError)
        if content["key"] != key:
            raise OutputError(f"{_damaged(path)} is another part; delete it to measure it again.")
        if content["sha256"] != _sum_of(content["part"]):
            raise OutputError(f"{_damaged(path)} was changed; delete it to measure it again.")
        return content["part"]  # type: ignore[no-any-return]

    def put(self, key: str, part: dict[str, Any]) -> dict[str, Any]:
        """Keep a part; return it as it will be read again."""
        content = {"key": key, "part": part, "sha256": _sum_of(part)}
        write_whole(self._path(key), to_json(content, indent=None))
        journal.finish(self._unfinished(key))
        return strict(part)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def keeping(self, key: str, how: dict[str, Any]) -> Iterator[journal.Journal]:
        """Keep the passes of an unfinished part until it is `put`.

        Args:
            key: of the part.
            how: what its sums depend on beside the request, such as the type they are made in.

        Raises:
            ResumeError: they were made in another way.
        """
        with journal.keeping(self._unfinished(key), {"part": key, **how}) as passes:
            yield passes

    def _unfinished(self, key: str) -> Path:
        return self._path(key).with_suffix(".unfinished")

    def _path(self, key: str) -> Path:
        return self.folder / PARTS / f"{_name(key)}.json"


def write_report_file(path: Path, content: str) -> None:
    """Write one of the reports whole or not at all, and its hash beside it.

    Raises:
        OutputError: it cannot be written.
    """
    before = _written(path.parent).get(path.name, [])[-1:]
    with whole_file(path) as draft:
        draft.write_text(content, encoding="utf-8")
        now = file_hash(draft)
        # Before the report has its name: killed in between, either version is known.
        _note(path, [*before, now])
    _note(path, [now])


def _note(report: Path, known: list[str]) -> None:
    written = {**_written(report.parent), report.name: known}
    write_whole(report.parent / WRITTEN, json.dumps(dict(sorted(written.items())), indent=1))


def check_links(folder: Path) -> None:
    """Refuse a folder whose parts are links to elsewhere.

    Raises:
        OutputError: they are.
    """
    for path in (folder / REQUEST, folder / PARTS):
        if path.is_symlink():
            raise OutputError(f"'{path}' is a link, which no comparison makes; remove it.")


def check_reports(folder: Path) -> None:
    """Refuse a folder in which a report was changed, or is somebody else's.

    Raises:
        OutputError: one would be overwritten.
    """
    written = _written(folder)
    for name in REPORT:
        path = folder / name
        if path.is_symlink() or (path.exists() and not _is_known(path, written.get(name))):
            raise OutputError(
                f"'{path}' was changed, or not written by a comparison of this version, and would "
                "be overwritten; move it away, or choose another folder."
            )


def _is_known(path: Path, hashes: Any) -> bool:
    return path.is_file() and isinstance(hashes, list) and file_hash(path) in hashes


def _written(folder: Path) -> dict[str, Any]:
    try:
        hashes = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _sum_of(part: Any) -> str:
    """By which a part is known to be as it was written."""
    return hashlib.sha256(json.dumps(strict(part), sort_keys=True).encode()).hexdigest()


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _is_part(path: Path) -> bool:
    """Whether it is a finished part: named by the key that stands in it."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return bool(path.name == f"{_name(content['key'])}.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_unfinished(path: Path) -> bool:
    """Whether it is what an interrupted comparison kept of a part."""
    return not path.is_symlink() and path.is_dir() and (path / journal.REQUEST).is_file()


def _difference(known: Any, wanted: Any, path: str = "") -> str:
    """The keys that differ, outermost first."""
    wanted = strict(wanted)
    names = []
    for key in sorted(set(known) | set(wanted)):
        a, b = known.get(key), wanted.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            names.append(_difference(a, b, f"{path}{key}."))
        else:
            names.append(f"{path}{key}: {brief(a)} there, {brief(b)} asked")
    return "; ".join(names)
