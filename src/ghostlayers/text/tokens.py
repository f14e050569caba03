"""From documents to windows of tokens.

Documents are joined, tokenised without special tokens as a whole (`tokenizing`), and cut into
windows that do not overlap. Where a tokenizer puts a beginning-of-sequence token before every text,
each window starts with one and holds one token less of text: such models fall apart without it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import CorpusError, WindowError
from ghostlayers.runtime.progress import Progress, Silent
from ghostlayers.text.corpora import Corpus, document_hash
from ghostlayers.text.tokenizing import Done, tokenize_texts

BosPolicy = Literal["auto", "always", "never"]

Sampling = Literal["grid", "random", "single-document"]
"""Which stretches of a text random windows are; see `draw_windows`."""

HELD_OUT_SHARE = 0.1
"""The end of a text, where `random` windows are taken from that nothing is fitted on."""


PREVIEW = 200
"""Characters shown of what is calibrated on."""

SHOWN_FROM = 2_000_000
"""Characters of text whose tokenising takes seconds, so that a bar is shown."""

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


def tokenize(corpus: Corpus, tokenizer: Any, progress: Progress | None = None) -> TokenStream:
    """Tokenise the joined documents, without special tokens.

    Raises:
        CorpusError: the tokenizer makes no tokens of the text, or cannot take so much of it.
    """
    characters = sum(map(len, corpus.documents))
    shown = progress if progress is not None and characters >= SHOWN_FROM else Silent()
    with shown.stage("Tokenising the text", characters) as advance:
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
    available = _count_windows(stream, body, sequence_length)
    ids = stream.ids[: available * body].view(available, body).long()
    if bos_token_id is not None:
        ids = torch.cat([torch.full((available, 1), bos_token_id), ids], dim=1)
    return Windows(ids, bos_token_id is not None, available, ())


def _count_windows(stream: TokenStream, body: int, sequence_length: int | None = None) -> int:
    available = stream.ids.numel() // body
    if available == 0:
        raise WindowError(
            f"corpus '{stream.corpus.name}' has {stream.ids.numel()} tokens, less than one window "
            f"of {sequence_length or body}; give more text or a shorter --sequence-length."
        )
    return available


def _touched(
    stream: TokenStream, sequence_length: int, bos: bool, chosen: Int[Tensor, " windows"]
) -> tuple[str, ...]:
    """Hashes of the documents that the chosen windows touch."""
    body = sequence_length - int(bos)
    return _hashes(stream.corpus, _owners_at(stream, (chosen * body).tolist(), body))


def _hashes(corpus: Corpus, indices: Iterable[int]) -> tuple[str, ...]:
    documents = [corpus.documents[index] for index in sorted(indices)]
    return tuple(dict.fromkeys(document_hash(each) for each in documents if each.strip()))


def make_windows(
    corpus: Corpus,
    tokenizer: Any,
    *,
    sequence_length: int,
    bos: BosPolicy = "auto",
    count: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Windows:
    """The first windows of a corpus, in order; with a seed, so many random ones of them.

    Args:
        corpus: the text.
        tokenizer: the model's tokenizer.
        sequence_length: tokens a window.
        bos: beginning-of-sequence policy.
        count: how many at most; all if not given. Fewer are an error only with a seed.
        seed: see `draw_windows`.
        progress: told what is being done, where it takes long.

    Raises:
        CorpusError: no tokens.
        WindowError: the text is too short.
    """
    if seed is not None:
        assert count is not None
        return draw_windows(
            corpus, tokenizer, sequence_length=sequence_length, count=count, bos=bos, seed=seed
        )[0]
    stream = tokenize(corpus, tokenizer, progress)
    if not corpus.complete and len(stream.ids) > _EDGE:
        stream = replace(stream, ids=stream.ids[:-_EDGE])
    token = tokenizer.bos_token_id if uses_bos(tokenizer, bos) else None
    windows = cut_windows(stream, sequence_length, token)
    chosen = torch.arange(min(len(windows) if count is None else count, len(windows)))
    documents = _touched(stream, sequence_length, token is not None, chosen)
    available = windows.available if corpus.complete else None
    return Windows(windows.input_ids[: len(chosen)], windows.bos, available, documents)


def draw_windows(
    corpus: Corpus,
    tokenizer: Any,
    *,
    sequence_length: int,
    count: int,
    held_out: int = 0,
    spare: int = 0,
    bos: BosPolicy = "auto",
    seed: int = 0,
    sampling: Sampling = "grid",
    progress: Progress | None = None,
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
        progress: told what is being done, where it takes long.

    Returns:
        Both name the documents that any of the windows touches.

    Raises:
        CorpusError: no tokens.
        WindowError: too short a text for what is asked.
    """
    token = tokenizer.bos_token_id if uses_bos(tokenizer, bos) else None
    body = sequence_length - (0 if token is None else 1)
    generator = torch.Generator().manual_seed(seed)
    if sampling == "single-document":
        drawn = _draw_documents(corpus, tokenizer, body, (count, held_out, spare), generator)
    else:
        stream = tokenize(corpus, tokenizer, progress)
        draw = _draw_grid if sampling == "grid" else _draw_offsets
        drawn = draw(stream, body, (count, held_out, spare), generator)
    ids = drawn.ids.long()
    preview = str(tokenizer.decode(ids[0]))[:PREVIEW] if len(ids) else ""
    if token is not None:
        ids = torch.cat([torch.full((len(ids), 1), token), ids], dim=1)
    available = drawn.available if corpus.complete else None
    documents = _hashes(corpus, drawn.documents)
    both = Windows(ids, token is not None, available, documents, preview)
    return both.split_at(count)


@dataclass(frozen=True)
class _Drawn:
    """Windows without beginning-of-sequence tokens, and which documents they touch."""

    ids: Int[Tensor, "windows body"]
    available: int
    documents: Iterable[int]


Counts = tuple[int, int, int]
"""Windows to calibrate on, held-out ones, and those that are taken beside if there are some."""


def _draw_grid(
    stream: TokenStream, body: int, counts: Counts, generator: torch.Generator
) -> _Drawn:
    needed, available = sum(counts[:2]), _count_windows(stream, body)
    if needed > available:
        raise WindowError(_too_few(stream.corpus, f"gives {available} windows", body, needed))
    chosen = torch.randperm(available, generator=generator)[: sum(counts)]
    starts = (chosen * body).tolist()
    return _Drawn(_rows_at(stream, starts, body), available, _owners_at(stream, starts, body))


def _rows_at(stream: TokenStream, starts: Sequence[int], body: int) -> Tensor:
    return torch.stack([stream.ids[start : start + body] for start in starts])


def _draw_offsets(
    stream: TokenStream, body: int, counts: Counts, generator: torch.Generator
) -> _Drawn:
    total = stream.ids.numel()
    border = int((1.0 - HELD_OUT_SHARE) * total) if counts[1] else total
    rooms = border - body, total - border - body
    if rooms[0] < 0 or (counts[1] and rooms[1] < 0):
        where = f"has {total} tokens, the last {total - border} of them for held-out windows"
        raise WindowError(_too_few(stream.corpus, where, body, sum(counts[:2])))
    extra = counts[1] + (counts[2] if counts[1] else 0)
    first = torch.randint(rooms[0] + 1, (counts[0],), generator=generator).tolist()
    later = torch.randint(max(rooms[1], 0) + 1, (extra,), generator=generator).tolist()
    starts = [*first, *(border + each for each in later)]
    return _Drawn(_rows_at(stream, starts, body), total // body, _owners_at(stream, starts, body))


def _draw_documents(
    corpus: Corpus, tokenizer: Any, body: int, counts: Counts, generator: torch.Generator
) -> _Drawn:
    """Each window from a document of its own, while there are some that are long enough.

    Then documents serve again, at other offsets; those of held-out windows serve only for these.
    """
    documents = _long_documents(corpus, tokenizer, body, sum(counts), generator)
    first, later = counts[0], counts[1] + (counts[2] if counts[1] else 0)
    if len(documents) < 1 + (counts[1] > 0):
        what = f"has {len(documents)} documents longer than a window"
        needed = "one is needed" if not counts[1] else "two are needed, one for held-out windows"
        raise WindowError(
            f"corpus '{corpus.name}' {what} of {body} tokens; {needed}. Give longer documents, a "
            "shorter --sequence-length, or another --sampling."
        )
    if len(documents) < sum(counts[:2]):
        apart = min(later, max(1, round(HELD_OUT_SHARE * len(documents)))) if later else 0
    else:
        apart = len(documents) - first
        later = min(later, apart)
    groups = ((documents[: len(documents) - apart], first), (documents[-apart:], later))
    rows, owners = [], []
    for group, count in groups:
        for number in range(count):
            index, ids = group[number % len(group)]
            offset = int(torch.randint(len(ids) - body + 1, (1,), generator=generator))
            rows.append(ids[offset : offset + body])
            owners.append(index)
    return _Drawn(torch.stack(rows), len(documents), owners)


def _long_documents(
    corpus: Corpus, tokenizer: Any, body: int, wanted: int, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Documents longer than a window in random order, each with its number and tokens."""
    found: list[tuple[int, Tensor]] = []
    for index in torch.randperm(len(corpus.documents), generator=generator).tolist():
        if len(found) == wanted:
            break
        document = corpus.documents[index]
        if len(document) < body:  # a token is a character at least, in nearly every tokenizer
            continue
        ids = tokenize_texts([document], tokenizer, name=corpus.name).ids
        if len(ids) > body:
            found.append((index, ids))
    return found


def _too_few(corpus: Corpus, has: str, body: int, needed: int) -> str:
    return (
        f"corpus '{corpus.name}' {has} of {body} tokens, {needed} are needed; give more text, "
        "fewer --windows, or a shorter --sequence-length."
    )


def _owners_at(stream: TokenStream, starts: Sequence[int], body: int) -> Iterable[int]:
    if stream.owners is None:
        return range(len(stream.corpus.documents))
    owners = [stream.owners[start : start + body].unique() for start in starts]
    return [int(each) for each in torch.cat(owners).unique()] if owners else []


def check_tokens(model: Any, tokenizer: Any, *drawn: Windows) -> None:
    """Refuse windows with tokens that the model has no embedding for.

    Args:
        model: a causal language model.
        tokenizer: the one that made the windows.
        drawn: the windows.

    Raises:
        WindowError: the message names the first such token, and both sizes.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(int(each.input_ids.max()) for each in drawn if each.input_ids.numel())
    if largest >= rows:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise WindowError(
            f"the tokenizer makes token {largest} ({name!r}) of the text, but the model's "
            f"embedding has {rows} rows, and the tokenizer {len(tokenizer)} tokens: they do not "
            "belong together. Give the tokenizer that the model was trained with, or enlarge the "
            "embedding (resize_token_embeddings) and train it."
        )


def check_sequence_length(
    config: Any, sequence_length: int, option: str = "--sequence-length"
) -> None:
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
            f"the longest that works is {option} {longest}."
        )
