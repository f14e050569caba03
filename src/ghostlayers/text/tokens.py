"""From documents to windows of tokens.

Documents are joined, tokenised without special tokens as a whole (`tokenizing`), and cut into
windows that do not overlap. Where a tokenizer puts a beginning-of-sequence token before every text,
each window starts with one and holds one token less of text: such models fall apart without it.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import WindowError
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.draws import draw_documents, draw_grid, draw_offsets
from ghostlayers.text.token_streams import count_windows, hashes_of, owners_at, tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BosPolicy = Literal["auto", "always", "never"]


Sampling = Literal["grid", "random", "single-document"]
"""Which stretches of a text random windows are; see `draw_windows`."""


PREVIEW = 200
"""Characters shown of what is calibrated on."""


_EDGE = 64
"""Tokens at the end of a text that goes on: what follows might change them."""


@dataclass(frozen=True)
class Windows:
    """Windows of one corpus.

    Attributes:
        input_ids: [windows, sequence].
        bos: whether each starts with a beginning-of-sequence token.
        available: how many windows the corpus gives; None if not all of it was read.
        documents: hashes of the documents that any window touches, in order.
        preview: how the text of the first window begins.
    """

    input_ids: Int[Tensor, "windows sequence"]
    bos: bool
    available: int | None
    documents: tuple[str, ...]
    preview: str = ""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens a window, the beginning-of-sequence token included."""
        return self.input_ids.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the token ids and their shape."""
        shape = str(tuple(self.input_ids.shape)).encode()
        return hashlib.sha256(shape + self.input_ids.contiguous().numpy().tobytes()).hexdigest()

    def describe_bos(self) -> str:
        """The policy in words, to stand beside every perplexity."""
        return "BOS before each window" if self.bos else "no BOS"

    def split_at(self, count: int) -> "tuple[Windows, Windows]":
        """The first windows, and the others; both keep naming the documents of all."""
        first, others = self.input_ids[:count], self.input_ids[count:]
        return replace(self, input_ids=first), replace(self, input_ids=others)

    def joined_with(self, others: "Windows") -> "Windows":
        """Both, these first."""
        return replace(self, input_ids=torch.cat([self.input_ids, others.input_ids]))

    def first(self, count: int) -> "Windows":
        """The first windows."""
        return self.split_at(count)[0]


def uses_bos(tokenizer: "PreTrainedTokenizerBase", policy: BosPolicy) -> bool:
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


def make_windows(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    bos: BosPolicy = "auto",
    count: int | None = None,
    seed: int | None = None,
) -> Windows:
    """The first windows of a corpus, in order; with a seed, so many random ones of them.

    Args:
        corpus: the text.
        tokenizer: the model's tokenizer.
        sequence_length: tokens a window.
        bos: beginning-of-sequence policy.
        count: how many at most; all if not given. Fewer are an error only with a seed.
        seed: see `draw_windows`.

    Raises:
        CorpusError: no tokens.
        WindowError: the text is too short.
    """
    if seed is not None:
        assert count is not None
        return draw_windows(
            corpus, tokenizer, sequence_length=sequence_length, count=count, bos=bos, seed=seed
        )[0]
    stream = tokenize(corpus, tokenizer)
    if not corpus.complete and len(stream.ids) > _EDGE:
        stream = replace(stream, ids=stream.ids[:-_EDGE])
    token = tokenizer.bos_token_id if uses_bos(tokenizer, bos) else None
    body = sequence_length - (token is not None)
    available = count_windows(stream, body, sequence_length)
    chosen = available if count is None else min(count, available)
    ids = stream.ids[: chosen * body].view(chosen, body).long()
    documents = hashes_of(corpus, owners_at(stream, range(0, chosen * body, body), body))
    return _windows(ids, token, available if corpus.complete else None, documents)


def _windows(
    body: Tensor,
    bos: int | None,
    available: int | None,
    documents: tuple[str, ...],
    preview: str = "",
) -> Windows:
    """Windows of some text, each with a beginning-of-sequence token before it if there is one."""
    ids = body if bos is None else torch.cat([torch.full((len(body), 1), bos), body], dim=1)
    return Windows(ids, bos is not None, available, documents, preview)


def draw_windows(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    count: int,
    held_out: int = 0,
    spare: int = 0,
    bos: BosPolicy = "auto",
    seed: int = 0,
    sampling: Sampling = "grid",
) -> tuple[Windows, Windows]:
    """Random windows to calibrate on, and others that share no token with them.

    Args:
        corpus: the text.
        tokenizer: the model's tokenizer.
        sequence_length: tokens a window.
        count: windows to calibrate on.
        held_out: further windows.
        spare: held-out windows beyond these, as far as the text goes.
        bos: beginning-of-sequence policy.
        seed: of the draw.
        sampling: ``grid`` cuts the joined documents into windows that do not overlap, and draws
            without repetition; ``random`` draws offsets in the joined documents, those of the
            held-out windows in the last tenth; ``single-document`` draws a document at a time, and
            an offset in each that is longer than a window; where they run out, each serves again.

    Returns:
        Both name the documents that any of the windows touches.

    Raises:
        CorpusError: no tokens.
        WindowError: too short a text for what is asked.
    """
    token = tokenizer.bos_token_id if uses_bos(tokenizer, bos) else None
    body = sequence_length - (token is not None)
    generator = torch.Generator().manual_seed(seed)
    if sampling == "single-document":
        drawn = draw_documents(corpus, tokenizer, body, (count, held_out, spare), generator)
    else:
        stream = tokenize(corpus, tokenizer)
        draw = draw_grid if sampling == "grid" else draw_offsets
        drawn = draw(stream, body, (count, held_out, spare), generator)
    ids = drawn.ids.long()
    preview = str(tokenizer.decode(ids[0]))[:PREVIEW] if len(ids) else ""
    available = drawn.available if corpus.complete else None
    documents = hashes_of(corpus, drawn.documents)
    return _windows(ids, token, available, documents, preview).split_at(count)


def check_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *drawn: Windows
) -> None:
    """Refuse windows with tokens that the model has no embedding for.

    Args:
        model: a causal language model.
        tokenizer: the one that made the windows.
        drawn: the windows.

    Raises:
        WindowError: the message names the first such token, and both sizes.
    """
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    rows = len(embedding)
    largest = max(int(windows.input_ids.max()) for windows in drawn if windows.input_ids.numel())
    if largest >= rows:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise WindowError(
            f"the tokenizer makes token {largest} ({name!r}) of the text, but the model's "
            f"embedding has {rows} rows, and the tokenizer {len(tokenizer)} tokens: they do not "
            "belong together. Give the tokenizer that the model was trained with, or enlarge the "
            "embedding (resize_token_embeddings) and train it."
        )


def check_sequence_length(
    config: "PretrainedConfig",
    sequence_length: int,
    option: str = "--sequence-length",
    what: str = "windows",
) -> None:
    """Refuse windows, or what else has so many tokens, that the model has no positions for.

    Raises:
        WindowError: the window is too long, or too short to predict anything.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if sequence_length < 2:
        raise WindowError(f"a window of {sequence_length} tokens predicts nothing; use at least 2.")
    if longest is not None and sequence_length > longest:
        raise WindowError(
            f"{what} of {sequence_length} tokens exceed the model's {longest} positions; "
            f"the longest that works is {option} {longest}."
        )
