"""Which part of a row is text: a column, or a chat that goes through the model's template."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

from ghostlayers.errors import CorpusError, listed, shortened, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

PEEK = 8
"""Rows that are looked at to tell which column holds the text."""

CHATS = ("messages", "conversations", "conversation")
"""Columns that hold a list of turns."""

PAIRS = {
    "prompt": ("completion", "response", "answer"),
    "instruction": ("output", "response"),
    "question": ("answer",),
}
"""Columns that hold what is asked, and those that may hold what is answered."""

RECORD = "\x1e"
"""Begins a document that is a chat as JSON; no text begins with a separator of records."""

CONTEXTS = ("input", "context")
"""Columns that belong to an instruction."""

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Roles as ShareGPT calls them; others are taken as they are."""

_IDENTIFIER_NAME = re.compile(
    r"(.*[_\-. ])?(id|ids|idx|index|uuid|guid|url|urls|uri|href|link|hash|sha\d*|md5|digest|doi"
    r"|isbn|key|path|file|filename|date|datetime|time|timestamp|lang|language|license|licence|split"
    r"|subset|domain)",
    re.IGNORECASE,
)

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")

_WORD = re.compile(r"[^\W\d_]+['.,:;!?)\"]*|[\"'(]+[^\W\d_]+\S*")

LONGEST_WORD = 40
"""Letters; what has more is no word but data in letters, such as base64."""


@dataclass(frozen=True)
class TextOfRow:
    """How rows of one source become text.

    Attributes:
        columns: what is read of a row.
        render: makes its text.
    """

    columns: tuple[str, ...]
    render: Callable[[Row], str]


def is_identifier(name: str, values: Sequence[str]) -> bool:
    """Whether a column of strings names things, by its name or by all of its values."""
    if _IDENTIFIER_NAME.fullmatch(name):
        return True
    filled = [value.strip() for value in values if value.strip()]
    return bool(filled) and not any(_says_something(value[:200]) for value in filled)


def _says_something(value: str) -> bool:
    """Whether it has two words at least, or is in a script that may have no space between them.

    Numbers, dates, hashes, addresses, labels and base64 have not.
    """
    if _ADDRESS.fullmatch(value):
        return False
    words = [word for word in value.split() if _WORD.fullmatch(word) and len(word) < LONGEST_WORD]
    return len(words) > 1 or not value.isascii()


def choose_text(
    rows: Sequence[Row],
    wanted: str | None,
    where: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    turns: bool = False,
) -> TextOfRow:
    """How rows become text: the wanted column, ``text``, a chat, or the only column of strings.

    Args:
        rows: the first of a source.
        wanted: the column that the user named.
        where: the source, for messages.
        tokenizer: has the template that chats go through.
        turns: chats stay turns (`turns_in`) and go through no template.

    Raises:
        CorpusError: there is no such column, or more than one, or only identifiers.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    strings = _strings(rows, names)
    if wanted is not None and wanted not in names:
        known = suggest(wanted, names, most=12)
        raise CorpusError(f"'{where}' has no column '{shortened(wanted)}'. {known}")
    if wanted is None and "text" in names and not _holds_turns(rows, "text"):
        wanted = "text"
    if wanted is not None and not _holds_turns(rows, wanted):
        return TextOfRow((wanted,), partial(_plain, wanted))
    chat = _chat(rows, names, wanted)
    if chat is not None and turns:
        return TextOfRow(
            chat.columns, lambda row: RECORD + json.dumps(chat.turns(row), default=str)
        )
    if chat is not None:
        return _templated(chat, where, tokenizer)
    texts = [name for name, values in strings.items() if not is_identifier(name, values)]
    if len(texts) != 1 or _says_more_elsewhere(rows, texts[0]):
        raise CorpusError(_unclear(where, names, list(strings), texts))
    return TextOfRow((texts[0],), partial(_plain, texts[0]))


def _strings(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[str]]:
    """Columns that hold strings and nothing else, with what they hold."""
    strings = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and all(isinstance(value, str) for value in values):
            strings[name] = values
    return strings


def _says_more_elsewhere(rows: Sequence[Row], name: str) -> bool:
    """Whether a column is a title, or the like, of what lies within other columns' values."""
    if name in CHATS:  # a chat written as one string
        return True
    inner = sum(_letters(v) for row in rows for k, v in row.items() if not isinstance(v, str))
    return inner > sum(len(row.get(name) or "") for row in rows)


def _letters(value: Any) -> int:
    """Characters of all the strings in a value, and tokens, whatever it is made of."""
    if isinstance(value, Mapping):
        return sum(map(_letters, value.values()))
    if isinstance(value, list):
        return sum(map(_letters, value))
    return len(value) if isinstance(value, str) else int(isinstance(value, int))


def _unclear(where: str, names: list[str], strings: list[str], texts: list[str]) -> str:
    if strings and not texts:
        return (
            f"'{where}' holds no text that can be told from identifiers: its columns of strings "
            f"({listed(strings)}) name things. Name the column of text with --text-column."
        )
    return (
        f"cannot tell which column of '{where}' holds the text: expected 'text' or a single column "
        f"of strings, got {listed(names)}. Name it with --text-column."
    )


def check_unique(names: Sequence[str], kind: str = "columns") -> None:
    """Refuse names of which one is given twice: only one of the two would be read.

    Raises:
        CorpusError: there is one.
    """
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise CorpusError(f"two {kind} are called '{shortened(twice)}'; rename or drop one")


def _plain(column: str, row: Row) -> str:
    """The text in a column; none where that is null."""
    return _text(_held(row, [column]), f"column '{shortened(column)}'")


def _held(row: Row, columns: Sequence[str], known: Sequence[str] = ()) -> Any:
    """What a row holds in the first of some columns that is filled.

    Args:
        row: it.
        columns: any of which may hold it.
        known: those that are read for something else.

    Raises:
        CorpusError: it has none of them, and text in columns that nobody reads: names have changed.
    """
    values = [row[name] for name in columns if name in row]
    if values:
        return next((value for value in values if value), values[0])
    others = [
        name
        for name, value in row.items()
        if value and isinstance(value, (str, list, dict))
        if name not in known and not _IDENTIFIER_NAME.fullmatch(name)
    ]
    if others:
        raise CorpusError(
            f"the row has no '{shortened(columns[0])}', where other rows have their text; got "
            f"{listed(others)}. Give every row its text under one name, empty where it has none"
        )
    return None


_NO_TEXTS = {
    list: "lists",
    dict: "objects",
    bytes: "bytes",
    bool: "truth values",
    **dict.fromkeys((int, float, Decimal), "numbers"),
}


def _text(value: Any, where: str) -> str:
    """A text; none for what tables write where there is none: null, or not a number.

    Raises:
        CorpusError: it is of another type.
    """
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        kind = _NO_TEXTS.get(type(value), f"values of type {type(value).__name__}")
        raise CorpusError(
            f"{where} holds {kind}, not text. Name a column of strings with --text-column, or "
            "write them as strings"
        )
    return value


# Chats


def turns_in(document: str) -> list[dict[str, Any]] | None:
    """The turns of a document that was read with ``turns``; None if it is no chat."""
    if not document.startswith(RECORD):
        return None
    turns: list[dict[str, Any]] = json.loads(document[len(RECORD) :])
    return turns


def _holds_turns(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name)]
    return bool(values) and all(
        isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
        for value in values
    )


@dataclass(frozen=True)
class _Chat:
    columns: tuple[str, ...]
    turns: Callable[[Row], list[dict[str, Any]]]


def _chat(rows: Sequence[Row], names: Sequence[str], wanted: str | None) -> _Chat | None:
    """The chat that rows hold, if they do."""
    for name in CHATS if wanted is None else (wanted,):
        if name in names and _holds_turns(rows, name):
            return _Chat((name,), partial(_turns, name))
    for asked, known in PAIRS.items() if wanted is None else ():
        answers = [name for name in known if name in names]
        if asked in names and answers:
            asking = (asked, *CONTEXTS) if asked == "instruction" else (asked,)
            there = [name for name in (*asking, *known) if name in names]
            return _Chat(tuple(there), partial(_pair, asking, known))
    return None


def _turns(name: str, row: Row) -> list[dict[str, Any]]:
    return [_turn(turn) for turn in _held(row, [name]) or []]


def _pair(columns: Sequence[str], answers: Sequence[str], row: Row) -> list[dict[str, Any]]:
    """What was asked and answered, as turns: each a text, or turns already."""
    known = (*columns, *answers)
    asked, answered = _held(row, columns[:1], known), _held(row, answers, known)
    if isinstance(asked, list) or isinstance(answered, list):
        return [*_side(asked, "user"), *_side(answered, "assistant")]
    parts = [_text(row.get(name), f"column '{name}'") for name in columns]
    name = next((name for name in answers if row.get(name) is not None), answers[0])
    question = "\n\n".join(part for part in parts if part.strip())
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(answered, f"column '{name}'")},
    ]


def _side(said: Any, role: str) -> list[dict[str, Any]]:
    """What one side said: turns, or the text of one."""
    if isinstance(said, str):
        said = [{"role": role, "content": said}]
    return [_turn(turn) for turn in said or []]


def _turn(turn: Any) -> dict[str, Any]:
    """One turn under the names that templates know."""
    if not isinstance(turn, Mapping):
        raise CorpusError(f"a turn must be an object with a role and a content, not {turn!r:.60}.")
    role = turn.get("role") or turn.get("from")
    content = turn["content"] if "content" in turn else turn.get("value")
    if not isinstance(role, str) or ("content" not in turn and "value" not in turn):
        raise CorpusError(
            "a turn must have 'role' and 'content', or 'from' and 'value'; got "
            f"{listed(turn) or 'nothing'}."
        )
    others = {k: v for k, v in turn.items() if k not in {"role", "from", "content", "value"}}
    filled = {name: value for name, value in others.items() if value is not None}
    return {**filled, "role": ROLES.get(role, role), "content": _content(content)}


def _content(content: Any) -> str:
    """The text of a turn: a string, or the texts among its parts."""
    if isinstance(content, Mapping):
        raise CorpusError(
            "a turn's content must be a text, or a list of parts with a 'text'; got an object "
            f"with {listed(content) or 'nothing'}."
        )
    if isinstance(content, list):
        return "".join(map(_part, content))
    return _text(content, "a turn's content")


def _part(part: Any) -> str:
    """The text of a part: of an image or a sound, none."""
    if isinstance(part, Mapping):
        part = part.get("text")
    return _text(part, "a part of a turn's content")


def _templated(chat: _Chat, where: str, tokenizer: "PreTrainedTokenizerBase | None") -> TextOfRow:
    """A chat as the model's template writes it."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            f"'{where}' holds chats ({', '.join(chat.columns)}), and the model's tokenizer has no "
            "template for them. Take the model that was tuned on chats, put a chat_template into "
            "the tokenizer, or name a column of plain text with --text-column."
        )
    bos, fill_in = getattr(tokenizer, "bos_token", None) or "", tokenizer.apply_chat_template

    def render(row: Row) -> str:
        turns = chat.turns(row)
        if not turns:
            return ""
        try:
            text = str(fill_in(turns, tokenize=False))
        except Exception as error:  # templates raise what they like
            raise CorpusError(
                f"the model's chat template refuses a chat: "
                f"{shortened(str(error).strip() or type(error), 500)}"
            ) from error
        return text.removeprefix(bos)  # windows get one by the policy, as of any text

    return TextOfRow(chat.columns, render)
