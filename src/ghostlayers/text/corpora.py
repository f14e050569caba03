"""Text for calibration and evaluation: named corpora, files and folders -> documents.

A source that is small is read whole. Of a large one, calibration draws documents by a seed, and
evaluation reads the first: memory and time follow from the text that is wanted.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlayers.errors import CorpusError, RecipeError, suggest
from ghostlayers.runtime.files import exists
from ghostlayers.text import raw
from ghostlayers.text.drawing import draw, take
from ghostlayers.text.files import ending_of, open_file
from ghostlayers.text.finding import Use, find_files, saved_folder
from ghostlayers.text.rows import PEEK, TextOfRow, choose_text
from ghostlayers.text.sources import Document, Reader, cause, document_of
from ghostlayers.text.tables import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK_LINE = "\n\n"
"""Joins documents unless the caller says otherwise; PTB's sentences want a space."""


MAX_CHARACTERS = 64_000_000
"""Text that is read at most: far more than any calibration needs, and bounded in memory."""


CHARACTERS_PER_TOKEN = 8
"""Characters of text for each token needed: about twice what is used, in most languages."""


CHARACTERS_PER_HUB_TOKEN = 32
"""The same of a hub corpus, which is read from its start: random windows shall come from many of
its documents."""


DRAWN = 2_000_000
"""Characters drawn of a large source at least: some from many places, for few windows too."""


_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?):(?P<config>[^:/\\]*)(:(?P<split>[^:/\\]+))?")
"""A data set on the hub as a user writes it: ``name:config:split``."""


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hugging Face hub, read as a stream."""

    path: str
    config: str | None
    splits: dict[Use, str]
    column: str | None = "text"


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


@dataclass(frozen=True)
class Corpus:
    """Documents and where they come from.

    Attributes:
        name: as the caller gave it.
        documents: in reading order; empty ones belong to the text but are nobody's document.
        separator: joins the documents.
        source: path, or hub id with config and split.
        complete: False if there is more text than was read or drawn.
        continued: numbers of documents that go on where the one before ended: parts of a long text,
            with no separator between them.
    """

    name: str
    documents: tuple[str, ...]
    separator: str = BLANK_LINE
    source: str = "in memory"
    complete: bool = True
    continued: frozenset[int] = frozenset()

    def texts(self) -> Iterator[str]:
        """The text in pieces: every document, with what stands behind it."""
        for number, document in enumerate(self.documents, 1):
            last = number == len(self.documents) or number in self.continued
            yield document if last else document + self.separator

    def joined(self) -> str:
        """The text that is tokenised as a whole."""
        return "".join(self.texts())

    def sha256(self) -> str:
        """Hash of the joined text, of what was read or drawn of it."""
        digest = hashlib.sha256()
        for text in self.texts():
            digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def document_hash(document: str) -> str:
    """A short hash of a document, surrounding white space aside."""
    return hashlib.sha256(document.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class _Wanted:
    """What is asked of every source; see `load_corpus`."""

    use: Use
    text_column: str | None
    separator: str
    max_characters: int
    seed: int | None
    tokenizer: "PreTrainedTokenizerBase | None"
    turns: bool = False

    def text_of(self, rows: Sequence[Any], where: str) -> TextOfRow:
        """How the rows of a source become text."""
        return choose_text(rows, self.text_column, where, self.tokenizer, turns=self.turns)


def load_corpus(
    data: str | Path | Sequence[str] | Corpus,
    *,
    use: Use,
    text_column: str | None = None,
    separator: str = BLANK_LINE,
    max_characters: int = MAX_CHARACTERS,
    seed: int | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    turns: bool = False,
) -> Corpus:
    """Read a corpus.

    Args:
        data: a name from `HUB_CORPORA`; a data set on the hub as ``name:config:split``; a file of
            text, JSON, CSV, parquet or Arrow (`files.FORMATS`, compressed or not), a folder or
            a pattern of such, or what `datasets` saved to disk; several of these joined by a plus
            sign, which are mixed in equal parts; a list of documents; or a corpus, which is
            returned as it is.
        use: which split of a named corpus.
        text_column: the column that holds the text; by default ``text``, a chat, or the only column
            of strings that are no identifiers.
        separator: joins the documents.
        max_characters: stop reading after about so many.
        seed: draw so many characters, and `DRAWN` at least, from anywhere in the source, if it has
            more than that and than `raw.WHOLE`; without a seed, the first are read.
        tokenizer: has the template that chats go through.
        turns: chats go through none: their documents hold turns, see `rows.turns_in`.

    Raises:
        CorpusError: the corpus cannot be found, read, or holds no text.
    """
    wanted = _Wanted(use, text_column, separator, max_characters, seed, tokenizer, turns)
    return _load(data, wanted)


def _load(data: str | Path | Sequence[str] | Corpus, wanted: _Wanted) -> Corpus:
    if isinstance(data, Corpus):
        return data
    if isinstance(data, str) and not data.strip():
        raise CorpusError("a corpus must have a name; got an empty one.")
    if not isinstance(data, (str, Path)):
        corpus = _read("documents in memory", "in memory", [_in_memory(data)], wanted)
    elif (hub := hub_corpus(data, wanted.use)) is not None:
        corpus = _load_hub(str(data), hub, wanted)
    elif len(parts := split_names(str(data), "+")) > 1:
        corpus = _mix(str(data), parts, wanted)
    else:
        corpus = _load_files(str(data), wanted)
    if not any(document.strip() for document in corpus.documents):
        raise CorpusError(f"corpus '{corpus.name}' holds no text.")
    return corpus


def hub_corpus(data: Any, use: Use = "calibration") -> HubCorpus | None:
    """The data set on the hub that is meant: a known name, or ``name:config:split``."""
    if not isinstance(data, (str, Path)):
        return None
    if str(data) in HUB_CORPORA:
        return HUB_CORPORA[str(data)]
    match = _HUB_NAME.fullmatch(str(data))
    if match is None or exists(str(data).strip()):
        return None
    split = match["split"] or {"calibration": "train", "evaluation": "test"}[use]
    return HubCorpus(match["path"], match["config"] or None, {use: split}, None)


def characters_for(source: Any, num_tokens: int) -> int:
    """Text to read for so many tokens."""
    on_hub = hub_corpus(source) is not None
    return num_tokens * (CHARACTERS_PER_HUB_TOKEN if on_hub else CHARACTERS_PER_TOKEN)


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


# Reading


def _read(name: str, source: str, readers: Sequence[Reader], wanted: _Wanted) -> Corpus:
    """The whole text if it is short, else its first documents or, with a seed, some of them."""
    limit = wanted.max_characters
    if wanted.seed is not None:
        limit = max(limit, raw.WHOLE)
    documents, complete = take(chain.from_iterable(reader.documents() for reader in readers), limit)
    if not complete and wanted.seed is not None:
        documents = draw(readers, wanted.seed, max(wanted.max_characters, DRAWN))
    return _corpus(name, documents, wanted.separator, source, complete=complete)


def _corpus(
    name: str, documents: Sequence[Document], separator: str, source: str, *, complete: bool
) -> Corpus:
    return Corpus(
        name,
        tuple(document.text for document in documents),
        separator,
        source,
        complete=complete and all(document.whole for document in documents),
        continued=frozenset(n for n, document in enumerate(documents) if document.continues and n),
    )


def _in_memory(data: Sequence[str]) -> Reader:
    documents = tuple(data)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise CorpusError(
                "a corpus in memory must be a list of texts; "
                f"number {index} is {document!r:.60}, of type {type(document).__name__}."
            )

    def text_of(rows: Sequence[Any], where: str) -> TextOfRow:
        del rows, where
        return TextOfRow(("text",), lambda row: str(row["text"]))

    return Rows("memory", len(documents), lambda number: {"text": documents[number]}, text_of)


def split_names(listed: str, mark: str) -> list[str]:
    """Names that a mark joins; a mark that belongs to the name of a file joins nothing."""
    words = [listed] if exists(listed.strip()) else listed.split(mark)
    names: list[str] = []
    while words:
        count = next(
            (n for n in range(len(words), 0, -1) if exists(mark.join(words[:n]).strip())), 1
        )
        names.append(mark.join(words[:count]).strip())
        words = words[count:]
    return names


def _mix(name: str, names: Sequence[str], wanted: _Wanted) -> Corpus:
    """Several corpora, of each as much text as of the shortest."""
    parts = [_load(given, wanted) for given in names]
    share = min(sum(map(len, part.documents)) for part in parts)
    taken = [document for part in parts for document in take(_again(part), share)[0]]
    source = " + ".join(part.source or part.name for part in parts)
    return _corpus(name, taken, wanted.separator, source, complete=False)


def _again(corpus: Corpus) -> Iterator[Document]:
    """A corpus's documents as a reader gave them."""
    for number, text in enumerate(corpus.documents):
        yield Document(text, number in corpus.continued)


# The hub


def _load_hub(name: str, entry: HubCorpus, wanted: _Wanted) -> Corpus:
    from datasets import load_dataset

    split = entry.splits[wanted.use]
    try:
        rows = iter(load_dataset(entry.path, entry.config, split=split, streaming=True))
        documents, complete = take(_hub_documents(name, entry, rows, wanted), wanted.max_characters)
    except CorpusError:
        raise
    except Exception as error:  # the hub's client raises many unrelated types
        raise CorpusError(
            f"corpus '{name}' is {entry.path} ({entry.config}, {split}) on the Hugging Face hub, "
            f"which could not be read: {cause(error)}. Check the connection, or give a local "
            ".txt, .jsonl or .parquet file."
        ) from error
    source = f"{entry.path} {entry.config} {split}"
    return _corpus(name, documents, wanted.separator, source, complete=complete)


def _hub_documents(
    name: str, entry: HubCorpus, rows: Iterator[Any], wanted: _Wanted
) -> Iterator[Document]:
    column = wanted.text_column if entry.column is None else entry.column
    head = list(islice(rows, PEEK if entry.column is None else 1))
    if not head:
        return
    text = choose_text(head, column, name, wanted.tokenizer, turns=wanted.turns)
    for number, row in enumerate(chain(head, rows), 1):
        yield document_of(text, f"row {number:,}", row, True)


# Files and folders


def _load_files(name: str, wanted: _Wanted) -> Corpus:
    folder = saved_folder(name, wanted.use)
    if folder is not None:
        return _read(name, name, [_saved_to_disk(folder, wanted)], wanted)
    files = find_files(name)
    if not files:
        raise CorpusError(_not_found(name))
    readers = [open_file(file, wanted.text_of) for file in files]
    return _read(name, _source(name, files), readers, wanted)


def _source(name: str, files: Sequence[Path]) -> str:
    """The name; with what is mixed in it, if that is of several kinds."""
    endings = [str(ending_of(file)) for file in files]
    kinds = sorted(set(endings))
    if len(kinds) < 2:
        return name
    return f"{name} ({', '.join(f'{endings.count(kind)} {kind}' for kind in kinds)})"


def _saved_to_disk(folder: Path, wanted: _Wanted) -> Reader:
    """What `datasets` saved to a folder."""
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder)).with_format("arrow")
    except Exception as error:  # datasets raises many unrelated types
        raise CorpusError(
            f"cannot read '{folder}' as a data set saved to disk: {cause(error)}."
        ) from error
    return Rows(str(folder), len(data), lambda i: data[i].to_pylist()[0], wanted.text_of)


def _not_found(name: str) -> str:
    if name == "ptb":
        return (
            "'ptb' cannot be loaded by name: its copy on the hub is a script, which current "
            "versions of datasets refuse to run. Give a plain file of its sentences "
            "with --separator ' ', for example ptb.test.parquet or ptb.test.txt."
        )
    return (
        f"no corpus and no file is called '{name}'. {suggest(name, [*HUB_CORPORA, 'ptb'])} "
        "Or give a .txt, .jsonl or .parquet file, or a data set on the hub as name:config:split."
    )
