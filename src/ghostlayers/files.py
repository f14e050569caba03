"""Files that appear whole or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ghostlayers.errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft beside the file, which gets its name when all went well and is removed otherwise.

    Raises:
        OutputError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


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
    if path.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder; name a file.")
    if not folder.is_dir():
        raise OutputError(f"cannot write '{path}': there is no folder '{folder}'; make it.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write '{path}': '{folder}' is not yours to write into.")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


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
