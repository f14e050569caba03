"""Text for calibration and evaluation: named corpora, files and folders -> documents."""

import glob
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ghostlayers.errors import CorpusError, RecipeError, suggest

Use = Literal["calibration", "evaluation"]

BLANK_LINE = "\n\n"
"""Joins documents unless the caller says otherwise; PTB's sentences want a space."""

MAX_CHARACTERS = 64_000_000
"""Text read from local files: far more than any calibration needs, and bounded in memory."""


CHARACTERS_PER_TOKEN = 32
"""Characters read of a hub corpus for each token needed: about eight times what is used, so that
random windows come from many documents."""


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hugging Face hub, read as a stream."""

    path: str
    config: str
    splits: dict[Use, str]
    column: str = "text"


HUB_CORPORA: dict[str, HubCorpus] = {
    "c4": HubCorpus("allenai/c4", "en", {"calibration": "train", "evaluation": "validation"}),
    "wikitext2": HubCorpus(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "evaluation": "test"},
    ),
    "pg19": HubCorpus(
        "emozilla/pg19", "default", {"calibration": "validation", "evaluation": "test"}
    ),
    "slimpajama": HubCorpus(
        "DKYoon/SlimPajama-6B", "default", {"calibration": "train", "evaluation": "test"}
    ),
    "sec": HubCorpus(
        "arcee-ai/sec-data-mini", "default", {"calibration": "train", "evaluation": "train"}
    ),
}
"""Corpora by name. Every one is read from the hub only when it is named."""

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""File endings, and the `datasets` builder that reads them."""


@dataclass(frozen=True)
class Corpus:
    """Documents and where they come from.

    Attributes:
        name: as the caller gave it.
        documents: in reading order; empty ones belong to the text but are nobody's document.
        separator: joins the documents.
        source: path, or hub id with config and split.
        complete: False if reading stopped at a limit.
    """

    name: str
    documents: tuple[str, ...]
    separator: str = BLANK_LINE
    source: str = "in memory"
    complete: bool = True

    def joined(self) -> str:
        """The text that is tokenised as a whole."""
        return self.separator.join(self.documents)

    def sha256(self) -> str:
        """Hash of the joined text."""
        return hashlib.sha256(self.joined().encode("utf-8", "surrogatepass")).hexdigest()


def document_hash(document: str) -> str:
    """A short hash of a document, surrounding white space aside."""
    return hashlib.sha256(document.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_corpus(
    data: str | Path | Sequence[str] | Corpus,
    *,
    use: Use,
    text_column: str | None = None,
    separator: str = BLANK_LINE,
    max_characters: int = MAX_CHARACTERS,
) -> Corpus:
    """Read a corpus.

    Args:
        data: a name from `HUB_CORPORA`; a .txt, .jsonl or .parquet file, or a folder of such;
            several of these joined by a plus sign, which are mixed in equal parts; a list of
            documents; or a corpus, which is returned as it is.
        use: which split of a named corpus.
        text_column: the column that holds the text; by default ``text``, else the only column
            of strings.
        separator: joins the documents.
        max_characters: stop reading after about so many.

    Raises:
        CorpusError: the corpus cannot be found, read, or holds no text.
    """
    if isinstance(data, Corpus):
        return data
    if not isinstance(data, (str, Path)):
        corpus = Corpus("documents in memory", _documents(data), separator)
    elif str(data) in HUB_CORPORA:
        corpus = _load_hub(str(data), use, separator, max_characters)
    elif "+" in str(data) and not Path(data).exists():
        corpus = _mix(str(data), use, text_column, separator, max_characters)
    else:
        corpus = _load_files(str(data), text_column, separator, max_characters)
    if not any(document.strip() for document in corpus.documents):
        raise CorpusError(f"corpus '{corpus.name}' holds no text.")
    return corpus


def _documents(data: Sequence[str]) -> tuple[str, ...]:
    documents = tuple(data)
    for index, each in enumerate(documents):
        if not isinstance(each, str):
            raise CorpusError(
                f"a corpus in memory must be a list of texts; number {index} is {each!r}, of type "
                f"{type(each).__name__}."
            )
    return documents


def _mix(
    name: str, use: Use, text_column: str | None, separator: str, max_characters: int
) -> Corpus:
    """Several corpora, of each as much text as of the shortest."""
    parts = [
        load_corpus(
            each.strip(),
            use=use,
            text_column=text_column,
            separator=separator,
            max_characters=max_characters,
        )
        for each in name.split("+")
    ]
    share = min(sum(map(len, part.documents)) for part in parts)
    taken = [_take(part.documents, share)[0] for part in parts]
    return Corpus(
        name,
        tuple(document for documents in taken for document in documents),
        separator,
        " + ".join(part.source or part.name for part in parts),
        complete=False,
    )


def characters_for(source: Any, max_windows: int | None, sequence_length: int) -> int:
    """Enough text for the first windows, without reading a whole hub corpus."""
    on_hub = isinstance(source, str) and source in HUB_CORPORA
    if max_windows is None or not on_hub:
        return MAX_CHARACTERS
    return max_windows * sequence_length * CHARACTERS_PER_TOKEN


def one_separator_each(separators: Sequence[str], count: int) -> list[str]:
    """What joins the documents of each of several corpora: one for all, or one each.

    Raises:
        RecipeError: another number of separators.
    """
    if len(separators) not in (1, count):
        raise RecipeError(
            f"{len(separators)} separators for {count} corpora; give one for all, or one each."
        )
    return list(separators) * (count if len(separators) == 1 else 1)


def _load_hub(name: str, use: Use, separator: str, max_characters: int) -> Corpus:
    from datasets import load_dataset

    entry = HUB_CORPORA[name]
    split = entry.splits[use]
    try:
        rows = load_dataset(entry.path, entry.config, split=split, streaming=True)
        documents, complete = _take((str(row[entry.column]) for row in rows), max_characters)
    except Exception as error:  # the hub's client raises many unrelated types
        raise CorpusError(
            f"corpus '{name}' is {entry.path} ({entry.config}, {split}) on the Hugging Face hub, "
            f"which could not be read: {_first_line(error)}. Check the connection, or give a local "
            ".txt, .jsonl or .parquet file."
        ) from error
    return Corpus(
        name,
        documents,
        separator,
        f"{entry.path} {entry.config} {split}",
        complete=complete,
    )


def _load_files(name: str, text_column: str | None, separator: str, max_characters: int) -> Corpus:
    files = _find_files(name)
    documents: list[str] = []
    for file in files:
        left = max_characters - sum(map(len, documents))
        if left <= 0:
            return Corpus(name, tuple(documents), separator, name, complete=False)
        taken, complete = _take(_read_file(file, text_column), left)
        documents.extend(taken)
        if not complete:
            return Corpus(name, tuple(documents), separator, name, complete=False)
    return Corpus(name, tuple(documents), separator, name)


def _find_files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise CorpusError(
            f"'{name[:60]}...' is no corpus's name ({error.strerror}). Expected the name of a "
            "corpus, a file or a folder; documents in memory go in a list of their own."
        ) from error
    if is_folder:
        files = sorted(each for each in path.iterdir() if each.suffix in READERS)
        if files:
            return files
        raise CorpusError(f"folder '{name}' holds no {', '.join(READERS)} file.")
    if path.is_file():
        if path.suffix in READERS:
            return [path]
        raise CorpusError(f"cannot read '{name}': expected a file in {', '.join(READERS)}.")
    if name == "ptb":
        raise CorpusError(
            "'ptb' cannot be loaded by name: its copy on the hub is a script, which current "
            "versions of datasets refuse to run. Give a plain file of its sentences "
            "with --separator ' ', for example ptb.test.parquet or ptb.test.txt."
        )
    raise CorpusError(
        f"no corpus and no file is called '{name}'. {suggest(name, [*HUB_CORPORA, 'ptb'])} "
        "Or give a .txt, .jsonl or .parquet file."
    )


def _read_file(file: Path, text_column: str | None) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
            return
        yield from _read_table(file, text_column)
    except CorpusError:
        raise
    except Exception as error:  # datasets and pyarrow raise many unrelated types
        raise CorpusError(
            f"cannot read '{file}' as {READERS[file.suffix]}: {_first_line(error)}."
        ) from error


def _read_table(file: Path, text_column: str | None) -> Iterator[str]:
    from datasets import load_dataset

    if file.stat().st_size == 0:
        return
    rows = load_dataset(
        READERS[file.suffix], data_files=glob.escape(str(file)), split="train", streaming=True
    )
    column = None
    for row in rows:
        column = column or choose_column(row, text_column, str(file))
        yield "" if row[column] is None else str(row[column])


def choose_column(row: dict[str, Any], wanted: str | None, where: str) -> str:
    """Which column holds the text: the wanted one, ``text``, or the only column of strings.

    Raises:
        CorpusError: there is no such column, or more than one.
    """
    if wanted is not None:
        if wanted in row:
            return wanted
        raise CorpusError(f"'{where}' has no column '{wanted}'. {suggest(wanted, row)}")
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings or ("text" in row and row["text"] is None):
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise CorpusError(
        f"cannot tell which column of '{where}' holds the text: expected 'text' or a single column "
        f"of strings, got {', '.join(row)}. Name it with --text-column."
    )


def _take(documents: Iterable[str], max_characters: int) -> tuple[tuple[str, ...], bool]:
    """Documents up to a number of characters, and whether they were all."""
    taken: list[str] = []
    iterator = iter(documents)
    count = 0
    for document in iterator:
        taken.append(document)
        count += len(document)
        if count >= max_characters:
            break
    return tuple(taken), not list(islice(iterator, 1))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
