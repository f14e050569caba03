"""From documents to windows of tokens.

Documents are joined, tokenised as a whole without special tokens, and cut into windows that do not
overlap. Where a tokenizer puts a beginning-of-sequence token before every text, each window starts
with one and holds one token less of text: such models fall apart without it.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import CorpusError, WindowError
from ghostlayers.text import Corpus, document_hash

BosPolicy = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Windows:
    """Windows of one corpus.

    Attributes:
        input_ids: [windows, sequence].
        bos: whether each starts with a beginning-of-sequence token.
        available: how many windows the corpus gives.
        documents: hashes of the documents that any window touches, in order.
    """

    input_ids: Int[Tensor, "windows sequence"]
    bos: bool
    available: int
    documents: tuple[str, ...]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens a window, the beginning-of-sequence token included."""
        return self.input_ids.shape[1]

    def describe_bos(self) -> str:
        """The policy in words, to stand beside every perplexity."""
        return "BOS before each window" if self.bos else "no BOS"

    def split_at(self, count: int) -> "tuple[Windows, Windows]":
        """The first windows, and the others; both keep naming the documents of all."""
        first, others = self.input_ids[:count], self.input_ids[count:]
        return replace(self, input_ids=first), replace(self, input_ids=others)

    def first(self, count: int) -> "Windows":
        """The first windows."""
        return self.split_at(count)[0]


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


def tokenize(corpus: Corpus, tokenizer: Any) -> TokenStream:
    """Tokenise the joined documents, without special tokens.

    Raises:
        CorpusError: the tokenizer makes no tokens of the text.
    """
    encoded = tokenizer(
        corpus.joined(),
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    if ids.numel() == 0:
        raise CorpusError(f"the tokenizer makes no tokens of corpus '{corpus.name}'.")
    if not tokenizer.is_fast:
        return TokenStream(ids, None, corpus)
    lengths = [len(document) + len(corpus.separator) for document in corpus.documents]
    starts = [0, *accumulate(lengths)][:-1]
    owners = [bisect_right(starts, offset) - 1 for offset, _ in encoded["offset_mapping"]]
    return TokenStream(ids, torch.tensor(owners, dtype=torch.long), corpus)


def uses_bos(tokenizer: Any, policy: BosPolicy) -> bool:
    """Whether each window starts with a beginning-of-sequence token.

    ``auto`` asks the tokenizer: yes if it puts one before a plain text by itself.

    Raises:
        WindowError: ``always``, but the tokenizer has no such token.
    """
    bos = tokenizer.bos_token_id
    if policy == "never":
        return False
    if policy == "always":
        if bos is None:
            raise WindowError("the tokenizer has no beginning-of-sequence token; use --bos auto.")
        return True
    plain = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos is not None and len(plain) > 0 and plain[0] == bos


def cut_windows(stream: TokenStream, sequence_length: int, bos_token_id: int | None) -> Windows:
    """All windows of a token stream, in order; what is left at the end is dropped.

    Args:
        stream: the tokens.
        sequence_length: tokens a window, a beginning-of-sequence token included.
        bos_token_id: put before each window; None for none.

    Raises:
        WindowError: the text is shorter than one window.
    """
    body = sequence_length - (0 if bos_token_id is None else 1)
    available = stream.ids.numel() // body
    if available == 0:
        raise WindowError(
            f"corpus '{stream.corpus.name}' has {stream.ids.numel()} tokens, less than one window "
            f"of {sequence_length}; give more text or a shorter --sequence-length."
        )
    ids = stream.ids[: available * body].view(available, body)
    if bos_token_id is not None:
        ids = torch.cat([torch.full((available, 1), bos_token_id), ids], dim=1)
    return Windows(ids, bos_token_id is not None, available, ())


def _touched(
    stream: TokenStream, sequence_length: int, bos: bool, chosen: Int[Tensor, " windows"]
) -> tuple[str, ...]:
    """Hashes of the documents that the chosen windows touch."""
    documents = stream.corpus.documents
    indices = range(len(documents))
    if stream.owners is not None:
        body = sequence_length - int(bos)
        owned = stream.owners[: stream.owners.numel() // body * body].view(-1, body)[chosen]
        indices = sorted(set(owned.flatten().tolist()))  # type: ignore[assignment]
    return tuple(
        dict.fromkeys(document_hash(documents[i]) for i in indices if documents[i].strip())
    )


def make_windows(
    corpus: Corpus,
    tokenizer: Any,
    *,
    sequence_length: int,
    bos: BosPolicy = "auto",
    count: int | None = None,
    seed: int | None = None,
) -> Windows:
    """Windows of a corpus: the first ones, or random ones.

    Args:
        corpus: the text.
        tokenizer: the model's tokenizer.
        sequence_length: tokens a window.
        bos: beginning-of-sequence policy.
        count: how many; all if not given. Fewer are an error only with a seed.
        seed: draw them at random without repetition; the first ones if not given.

    Raises:
        CorpusError: no tokens.
        WindowError: too short a text for what is asked.
    """
    stream = tokenize(corpus, tokenizer)
    token = tokenizer.bos_token_id if uses_bos(tokenizer, bos) else None
    windows = cut_windows(stream, sequence_length, token)
    count = len(windows) if count is None else count
    if seed is None:
        chosen = torch.arange(min(count, len(windows)))
    else:
        if count > len(windows):
            raise WindowError(
                f"corpus '{corpus.name}' gives {len(windows)} windows of {sequence_length} tokens, "
                f"{count} are needed; give more text, fewer --windows, or a shorter "
                "--sequence-length."
            )
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        chosen = order[:count]
    documents = _touched(stream, sequence_length, token is not None, chosen)
    return Windows(windows.input_ids[chosen], windows.bos, windows.available, documents)


def check_sequence_length(config: Any, sequence_length: int) -> None:
    """Refuse windows that the model has no positions for.

    Raises:
        WindowError: the window is too long, or too short to predict anything.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if sequence_length < 2:
        raise WindowError(f"a window of {sequence_length} tokens predicts nothing; use at least 2.")
    if longest is not None and sequence_length > longest:
        raise WindowError(
            f"windows of {sequence_length} tokens exceed the model's {longest} positions; "
            f"the longest that works is --sequence-length {longest}."
        )
