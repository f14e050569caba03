"""A corpus as tokens, and which document each of them belongs to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import CorpusError, WindowError
from ghostlayers.runtime import progress
from ghostlayers.runtime.progress import Silent
from ghostlayers.text.corpora import Corpus, document_hash
from ghostlayers.text.tokenizing import Done, tokenize_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_FROM = 2_000_000
"""Characters of text whose tokenising takes seconds, so that a bar is shown."""


@dataclass(frozen=True)
class TokenStream:
    """A corpus tokenised as a whole.

    Attributes:
        ids: every token, [tokens].
        owners: index of the document that each token begins in, [tokens]; None if the tokenizer
            does not tell where in the text its tokens lie.
        corpus: the text.
    """

    ids: Int[Tensor, " tokens"]
    owners: Int[Tensor, " tokens"] | None
    corpus: Corpus


def tokenize(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> TokenStream:
    """Tokenise the joined documents, without special tokens.

    Raises:
        CorpusError: the tokenizer makes no tokens of the text, or cannot take so much of it.
    """
    characters = sum(map(len, corpus.documents))
    opened = progress.stage if characters >= SHOWN_FROM else Silent().stage
    with opened("Tokenising the text", characters) as advance:
        tokens = tokenize_texts(
            corpus.texts(), tokenizer, name=corpus.name, done=_up_to(characters, advance)
        )
    if tokens.ids.numel() == 0:
        raise CorpusError(f"the tokenizer makes no tokens of corpus '{corpus.name}'.")
    if tokens.starts is None:
        return TokenStream(tokens.ids, None, corpus)
    ends = torch.tensor([*accumulate(map(len, corpus.texts()))], dtype=torch.int32)
    owners = torch.bucketize(tokens.starts, ends, right=True, out_int32=True)
    return TokenStream(tokens.ids, owners, corpus)


def _up_to(total: int, advance: Done) -> Done:
    """Counts characters, and never more than there are: pieces of a text overlap."""
    left = total

    def done(count: int) -> None:
        nonlocal left
        count = max(0, min(count, left))
        left -= count
        advance(count)

    return done


def count_windows(stream: TokenStream, body: int, sequence_length: int | None = None) -> int:
    """How many windows of so many tokens of text there are, side by side.

    Raises:
        WindowError: none.
    """
    available = stream.ids.numel() // body
    if available == 0:
        raise WindowError(
            f"corpus '{stream.corpus.name}' has {stream.ids.numel()} tokens, less than one window "
            f"of {sequence_length or body}; give more text or a shorter --sequence-length."
        )
    return available


def owners_at(stream: TokenStream, starts: Sequence[int], body: int) -> Iterable[int]:
    """Numbers of the documents that windows touch, by the tokens with which they start."""
    if stream.owners is None:
        return range(len(stream.corpus.documents))
    owners = [stream.owners[start : start + body].unique() for start in starts]
    return [int(owner) for owner in torch.cat(owners).unique()] if owners else []


def hashes_of(corpus: Corpus, numbers: Iterable[int]) -> tuple[str, ...]:
    """Hashes of some documents, in order."""
    documents = [corpus.documents[number] for number in sorted(numbers)]
    return tuple(
        dict.fromkeys(document_hash(document) for document in documents if document.strip())
    )
