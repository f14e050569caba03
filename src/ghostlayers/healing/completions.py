"""Windows of chats in which only answers count: the last turn of each, where it is the model's."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ghostlayers.errors import WindowError
from ghostlayers.text.chats import split_answer
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.rows import turns_in
from ghostlayers.text.token_streams import hashes_of
from ghostlayers.text.tokens import BosPolicy, Windows, uses_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Counts = Bool[Tensor, "windows sequence"]
"""Which tokens are learnt to be predicted."""

Piece = tuple[str, bool]
"""A stretch of text, and whether its tokens count."""


def holds_chats(corpus: Corpus) -> bool:
    """Whether any document is a chat that was read with its turns."""
    return any(turns_in(document) is not None for document in corpus.documents)


def chat_windows(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    bos: BosPolicy = "auto",
) -> tuple[Corpus, Windows, Counts]:
    """The corpus as the template writes it, its windows in order, and which tokens count.

    Chats follow one another as documents do; those that end in no answer are left out, and so are
    windows in which nothing counts. Of a plain text among them all counts. What a chat asks and
    what it answers are tokenised apart, as they are where a model answers.

    Args:
        corpus: read with its turns.
        tokenizer: has the template.
        sequence_length: tokens a window.
        bos: beginning-of-sequence policy.

    Raises:
        CorpusError: the template does not tell where an answer begins.
        WindowError: there is no window in which anything counts.
    """
    ids: list[int] = []
    counts: list[bool] = []
    documents = []
    for pieces in _pieces_of(corpus, tokenizer):
        documents.append("".join(text for text, _ in pieces))
        for text, counted in (*pieces, (corpus.separator, False)):
            own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += own
            counts += [counted] * len(own)
    written = replace(corpus, documents=tuple(documents), continued=frozenset())
    token = tokenizer.bos_token_id if uses_bos(tokenizer, bos) else None
    rows = _cut(torch.tensor(ids, dtype=torch.long), sequence_length, token)
    learnt = _cut(
        torch.tensor(counts, dtype=torch.bool), sequence_length, None if token is None else 0
    )
    some = learnt[:, 1:].any(dim=1)  # nothing predicts a window's first token
    if not bool(some.any()):
        raise WindowError(
            f"corpus '{corpus.name}' has no window of {sequence_length} tokens with an answer in "
            f"it: {len(documents)} chats end in one, with {len(ids)} tokens. Give more chats, or a "
            "shorter --sequence-length."
        )
    known = hashes_of(written, range(len(documents)))
    return written, Windows(rows[some], token is not None, None, known), learnt[some]


def _pieces_of(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sequence[Piece]]:
    """Every document that counts, in stretches."""
    bos = tokenizer.bos_token or ""
    for document in corpus.documents:
        turns = turns_in(document)
        if turns is None and document.strip():
            yield [(document, True)]
        elif turns and turns[-1].get("role") == "assistant":
            before, answer = split_answer(tokenizer, turns)
            yield [(str(before).removeprefix(bos), False), (answer, True)]


def _cut(stream: Tensor, length: int, first: Any) -> Tensor:
    """Windows side by side, each behind a value of its own if there is one."""
    body = length - (first is not None)
    rows = stream[: len(stream) // body * body].view(-1, body)
    if first is None:
        return rows
    return torch.cat([torch.full((len(rows), 1), first, dtype=stream.dtype), rows], dim=1)
