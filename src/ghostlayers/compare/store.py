"""A folder that grows part by part, so that an interrupted comparison goes on where it stopped."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostlayers import journal
from ghostlayers.documents import Checked, brief, check, read_json, strict, to_json
from ghostlayers.errors import OutputError
from ghostlayers.files import write_whole

REQUEST = "request.json"
PARTS = "parts"
REPORT = ("results.json", "results.md", "results.csv", "tasks.csv", "report.html")
"""What is written from the parts at the end."""


class _Part(Checked):
    """A finished part as it is kept."""

    key: str
    part: dict[str, Any]


def _damaged(path: Path) -> str:
    return f"the part '{path}' of an interrupted comparison"


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
        self.folder = folder
        self._new = not folder.exists()
        if folder.exists():
            self._check(request, overwrite)
        try:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write into '{folder}': {error.strerror}.") from error
        write_whole(folder / REQUEST, to_json(dict(sorted(request.items()))))

    def _check(self, request: dict[str, Any], overwrite: bool) -> None:
        """Go on with the same request, start again if allowed, or refuse."""
        path = self.folder / REQUEST
        if not path.is_file():
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                return
            raise OutputError(
                f"'{self.folder}' exists and was not made by a comparison; choose another folder."
            )
        found = check(read_json(path, OutputError), dict[str, Any], f"'{path}'", OutputError)
        if found == strict(request):
            return
        if not overwrite:
            raise OutputError(
                f"'{self.folder}' holds another comparison (it differs in "
                f"{_difference(found, request)}); choose another folder, repeat that comparison's "
                "options to go on with it, or pass --overwrite."
            )
        for each in (self.folder / PARTS).iterdir():
            journal.finish(each) if each.is_dir() else each.unlink()
        for name in REPORT:  # would pass for the new comparison's until that has ended
            (self.folder / name).unlink(missing_ok=True)

    def forget(self) -> None:
        """Leave no folder where there was none and no part came of it."""
        if self._new and not any((self.folder / PARTS).iterdir()):
            journal.finish(self.folder)

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished part, or None."""
        path = self._path(key)
        if not path.is_file():
            return None
        content = check(read_json(path, OutputError), _Part, _damaged(path), OutputError)
        if content["key"] != key:
            raise OutputError(f"{_damaged(path)} is another part; delete it to measure it again.")
        return content["part"]  # type: ignore[no-any-return]

    def put(self, key: str, part: dict[str, Any]) -> dict[str, Any]:
        """Keep a part; return it as it will be read again."""
        write_whole(self._path(key), to_json({"key": key, "part": part}, indent=None))
        journal.finish(self._unfinished(key))
        return strict(part)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def keeping(self, key: str, how: dict[str, Any]) -> Iterator[None]:
        """Keep the passes of an unfinished part until it is `put`.

        Args:
            key: of the part.
            how: what its sums depend on beside the request, such as the type they are made in.

        Raises:
            ResumeError: they were made in another way.
        """
        with journal.keeping(self._unfinished(key), {"part": key, **how}):
            yield

    def _unfinished(self, key: str) -> Path:
        return self._path(key).with_suffix(".unfinished")

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.folder / PARTS / f"{digest}.json"


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """The keys that differ, outermost first."""
    wanted = strict(wanted)
    names = []
    for key in sorted(set(found) | set(wanted)):
        a, b = found.get(key), wanted.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            names.append(_difference(a, b, f"{path}{key}."))
        else:
            names.append(f"{path}{key}: {brief(a)} there, {brief(b)} asked")
    return "; ".join(names)
