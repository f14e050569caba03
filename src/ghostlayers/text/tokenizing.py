"""Long texts to tokens, a piece at a time, with the tokens of the text as a whole.

A tokenizer that is given 300 MB at once takes tens of gigabytes and minutes. Here it is given
pieces that overlap. Where two pieces agree on what lies in both, by tokens and by their places,
best at the border of a word, they are joined; where they do not agree, they are tokenised together.
"""

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import CorpusError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PIECE = 1 << 14
"""Characters tokenised at a time."""

AT_ONCE = 8
"""Pieces given to the tokenizer together: it takes as many cores as it is allowed for them."""

OVERLAP = 1 << 10
"""Characters that two pieces share: many words, in any language."""

AGREEMENT = 16
"""Tokens on which both pieces must agree around a joint."""

MAX_TOGETHER = 1 << 17
"""Characters without any joint after which one is forced: no text, but a run of one character or
the like, in which a tokenizer's choice hangs on how long it is."""

MAX_WHOLE = 8_000_000
"""Characters that are tokenised at once where pieces cannot be joined: about 3 GB of memory."""

_HALVES = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON can hold and no tokenizer takes."""

Done = Callable[[int], object]
"""Told how many characters more are tokenised."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text and where they lie.

    Attributes:
        ids: of every token.
        starts: the character that each token begins with; None if the tokenizer does not tell.
    """

    ids: Int[Tensor, " tokens"]
    starts: Int[Tensor, " tokens"] | None


@dataclass(frozen=True)
class _Piece:
    """A stretch of the text with its tokens.

    Attributes:
        begin: its place in the whole.
        text: the stretch.
        ids: its tokens.
        spans: where they lie in the whole.
        start: the place at which the piece before left off.
    """

    begin: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    start: int = 0

    @property
    def first(self) -> int:
        """The first token that no piece before has."""
        return self.token_at(self.start)

    @property
    def end(self) -> int:
        """The place behind it."""
        return self.begin + len(self.text)

    def token_at(self, place: int) -> int:
        """The first token that begins at a place or behind it."""
        return bisect_left(self.spans, (place, -1))

    def starts_word(self, place: int) -> bool:
        """Whether white space begins or ends at a place."""
        here, before = self.text[place - self.begin], self.text[place - self.begin - 1]
        return here.isspace() != before.isspace()

    def agrees(self, mine: int, other: "_Piece", its: int) -> bool:
        """Whether both have the same tokens at the same places, before a joint and behind it."""
        half = AGREEMENT // 2
        if min(mine, its) < half or mine + half > len(self.ids):
            return False
        ours, theirs = slice(mine - half, mine + half), slice(its - half, its + half)
        return self.ids[ours] == other.ids[theirs] and self.spans[ours] == other.spans[theirs]


def tokenize_texts(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str = "text",
    done: Done | None = None,
) -> Tokens:
    """Tokenise the concatenation of some texts, without special tokens.

    Args:
        texts: what is concatenated.
        tokenizer: the model's tokenizer.
        name: of the corpus, for messages.
        done: told how many characters more are tokenised.

    Raises:
        CorpusError: the text is too long for a tokenizer that does not tell where its tokens lie.
    """
    if not tokenizer.is_fast:
        whole = _encode(tokenizer, _bounded(texts, name))["input_ids"]
        return Tokens(torch.tensor(whole, dtype=torch.int32), None)
    ids, starts = array("i"), array("i")
    for piece, last in _pieces(texts, tokenizer):
        ids.extend(piece.ids[piece.first : last])
        starts.extend(start for start, _ in piece.spans[piece.first : last])
        if done is not None:
            done(len(piece.text) - OVERLAP)
    return Tokens(_tensor(ids), _tensor(starts))


def _tensor(values: "array[int]") -> Tensor:
    if not values:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer(values, dtype=torch.int32)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: str | list[str]) -> "BatchEncoding":
    return tokenizer(  # type: ignore[no-any-return]
        [_whole(text) for text in texts] if isinstance(texts, list) else _whole(texts),
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )


def _whole(text: str) -> str:
    return _HALVES.sub("\ufffd", text)


def _bounded(texts: Iterable[str], name: str) -> str:
    """All the text, where it cannot be taken in pieces."""
    taken, length = [], 0
    for text in texts:
        length += len(text)
        if length > MAX_WHOLE:
            raise CorpusError(
                f"corpus '{name}' has more than {MAX_WHOLE:,} characters, and they can only be "
                "tokenised at once: the model's tokenizer does not tell where its tokens lie. Give "
                "less text, or ask for fewer windows (--max-windows)."
            )
        taken.append(text)
    return "".join(taken)


def _pieces(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[_Piece, int]]:
    """Pieces, each with the number of the token at which the next one takes over."""
    held: _Piece | None = None
    for piece in _tokenized(_stretches(texts), tokenizer):
        joint = None if held is None else _joint(held, piece)
        if held is not None and joint is None:
            piece = _together(held, piece, tokenizer)
        elif held is not None and joint is not None:
            yield held, joint[0]
            piece = replace(piece, start=joint[1])
        held = piece
    if held is not None:
        yield held, len(held.ids)


def _stretches(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The concatenation in stretches that overlap, each with its place."""
    begin, buffer, new = 0, "", 0
    for text in texts:
        for first in range(0, len(text), PIECE):
            part = text[first : first + PIECE]
            buffer, new = buffer + part, new + len(part)
            if len(buffer) >= PIECE + OVERLAP:
                yield begin, buffer
                begin, buffer, new = begin + len(buffer) - OVERLAP, buffer[-OVERLAP:], 0
    if new:
        yield begin, buffer


def _tokenized(
    stretches: Iterator[tuple[int, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[_Piece]:
    """Stretches with their tokens, in order."""
    while some := list(islice(stretches, AT_ONCE)):
        encoded = _encode(tokenizer, [text for _, text in some])
        rows = zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for (begin, text), ids, spans in rows:
            yield _Piece(begin, text, ids, [(begin + start, begin + end) for start, end in spans])


def _joint(first: _Piece, second: _Piece) -> tuple[int, int] | None:
    """Where the second may take over: at a word's border, if there is one.

    Returns:
        The number of the first's token there, and the place; None if they agree nowhere.
    """
    quarter = (first.end - second.begin) // 4  # at its edges, a piece does not know what follows
    middle = range(first.token_at(second.begin + quarter), first.token_at(first.end - quarter))
    agreed = None
    for mine in middle:
        place = first.spans[mine][0]
        if place <= first.start or not first.agrees(mine, second, second.token_at(place)):
            continue
        if second.starts_word(place):
            return mine, place
        agreed = agreed or (mine, place)
    if agreed is None and len(first.text) >= MAX_TOGETHER:
        place = second.begin + 2 * quarter
        return first.token_at(place), place
    return agreed


def _together(first: _Piece, second: _Piece, tokenizer: "PreTrainedTokenizerBase") -> _Piece:
    """Both as one piece, which goes on where the first did."""
    text = first.text + second.text[first.end - second.begin :]
    (both,) = _tokenized(iter([(first.begin, text)]), tokenizer)
    return replace(both, start=first.start)
