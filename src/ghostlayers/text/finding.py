"""Which files a name stands for: a file, a folder, a pattern, or what `datasets` saved."""

import glob
import os
import re
from pathlib import Path
from typing import Literal

from ghostlayers.errors import CorpusError, listed
from ghostlayers.runtime.files import at_home, exists
from ghostlayers.text.files import FORMATS, ending_of
from ghostlayers.text.raw import COMPRESSIONS, check_regular

Use = Literal["calibration", "evaluation"]


_MOST_FILES = 100_000
"""Files of a folder: enough for the largest data sets, and not those of a whole disk."""


_ABOUT = re.compile(
    r"(licen[cs]es?|copying|copyright|notice|use_policy|readme|changelog|citation)(?![a-z])", re.I
)
"""How files of plain text begin that are about the data beside them, and none of it."""


_METADATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
"""Files beside data that describe it."""


def saved_folder(name: str, use: Use) -> Path | None:
    """The folder with what `datasets` saved for a use, if that is what a name stands for.

    Raises:
        CorpusError: it holds several splits, and none of those for the use.
    """
    folder = at_home(name)
    if not exists(name.strip()) or not folder.is_dir():
        return None
    if (folder / "dataset_dict.json").is_file():
        return _split_of(folder, use)
    whole = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return folder if whole else None


def _split_of(folder: Path, use: Use) -> Path:
    """The split for a use among those in a folder."""
    splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
    wanted = ("train",) if use == "calibration" else ("test", "validation")
    split = next((name for name in wanted if name in splits), None)
    if split is None and len(splits) != 1:
        raise CorpusError(
            f"'{folder}' holds the splits {listed(splits) or '(none)'}; expected "
            f"{' or '.join(wanted)} for {use}. Name the folder of one, such as "
            f"{folder / (splits or ['train'])[0]}."
        )
    return folder / (split or splits[0])


def find_files(name: str) -> list[Path]:
    """The files of text that a name stands for; none if there is nothing of that name.

    Raises:
        CorpusError: what is there is no text, or the name can be none.
    """
    path = at_home(name)
    try:
        is_folder = path.is_dir()
        there = path.exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CorpusError(
            f"'{name[:60]}...' is no corpus's name ({reason}). Expected the name of a "
            "corpus, a file or a folder; documents in memory go in a list of their own."
        ) from error
    if is_folder:
        return _files_in(path)
    if there:
        check_regular(path)
        if ending_of(path) is None:
            raise CorpusError(f"cannot read '{name}': expected a file in {_known()}.")
        return [path]
    if glob.has_magic(name):
        return _matching(name)
    return []


def _known() -> str:
    return f"{', '.join(FORMATS)}, or such a text file in {', '.join(COMPRESSIONS)}"


def _files_in(folder: Path) -> list[Path]:
    """Files of text in a folder and its sub-folders, in an order that hangs on names alone."""
    texts = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place) / name for name in files if not name.startswith("."))
        texts += [path for path in paths if ending_of(path) and not _is_about_others(path)]
        if len(texts) > _MOST_FILES:
            raise CorpusError(
                f"folder '{folder}' holds more than {_MOST_FILES:,} files of text with its "
                "sub-folders; name a smaller one, or a pattern."
            )
    data = [path for path in texts if path.suffix.lower() != ".md"]  # notes beside data
    if not texts:
        raise CorpusError(
            f"folder '{folder}' holds no file in {_known()}; licences, readmes and the like do not "
            "count, but can be named themselves."
        )
    return sorted(data or texts, key=lambda path: path.relative_to(folder).as_posix())


def _is_about_others(path: Path) -> bool:
    """Whether a file in a folder tells of the others: a licence, a readme, what describes data."""
    if path.name in _METADATA:
        return True
    plain = FORMATS["." + str(ending_of(path)).split(".")[1]] == "text"
    return plain and _ABOUT.match(path.name) is not None


def _matching(pattern: str) -> list[Path]:
    """Files that a pattern names."""
    expanded = str(at_home(pattern))
    names = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207  paths may be absolute
    files = [path for path in map(Path, names) if path.is_file() and ending_of(path)]
    if not files:
        raise CorpusError(f"no file in {_known()} matches '{pattern}'.")
    return files
