"""Three ways to draw random windows: from a grid, from anywhere, or a document at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import WindowError
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.token_streams import TokenStream, count_windows, owners_at
from ghostlayers.text.tokenizing import tokenize_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.1
"""The end of a text, where `random` windows are taken from that nothing is fitted on."""


@dataclass(frozen=True)
class Drawn:
    """Windows without beginning-of-sequence tokens, and which documents they touch."""

    ids: Int[Tensor, "windows body"]
    available: int
    documents: Iterable[int]


Counts = tuple[int, int, int]
"""Windows to calibrate on, held-out ones, and those that are taken beside if there are some."""


def draw_grid(stream: TokenStream, body: int, counts: Counts, generator: torch.Generator) -> Drawn:
    """Of windows that do not overlap, each once.

    Raises:
        WindowError: too few.
    """
    needed, available = sum(counts[:2]), count_windows(stream, body)
    if needed > available:
        raise WindowError(_too_few(stream.corpus, f"gives {available} windows", body, needed))
    chosen = torch.randperm(available, generator=generator)[: sum(counts)]
    starts = (chosen * body).tolist()
    return Drawn(_rows_at(stream, starts, body), available, owners_at(stream, starts, body))


def _rows_at(stream: TokenStream, starts: Sequence[int], body: int) -> Tensor:
    return torch.stack([stream.ids[start : start + body] for start in starts])


def draw_offsets(
    stream: TokenStream, body: int, counts: Counts, generator: torch.Generator
) -> Drawn:
    """From anywhere; held-out ones from the last tenth.

    Raises:
        WindowError: too short a text.
    """
    total = stream.ids.numel()
    border = int((1.0 - HELD_OUT_SHARE) * total) if counts[1] else total
    rooms = border - body, total - border - body
    if rooms[0] < 0 or (counts[1] and rooms[1] < 0):
        where = f"has {total} tokens, the last {total - border} of them for held-out windows"
        raise WindowError(_too_few(stream.corpus, where, body, sum(counts[:2])))
    extra = counts[1] + (counts[2] if counts[1] else 0)
    first = torch.randint(rooms[0] + 1, (counts[0],), generator=generator).tolist()
    later = torch.randint(max(rooms[1], 0) + 1, (extra,), generator=generator).tolist()
    starts = [*first, *(border + start for start in later)]
    return Drawn(_rows_at(stream, starts, body), total // body, owners_at(stream, starts, body))


def draw_documents(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    body: int,
    counts: Counts,
    generator: torch.Generator,
) -> Drawn:
    """Each window from a document of its own, while there are some that are long enough.

    Then documents serve again, at other offsets; those of held-out windows serve only for these.

    Raises:
        WindowError: too few documents are long enough.
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
    return Drawn(torch.stack(rows), len(documents), owners)


def _long_documents(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    body: int,
    wanted: int,
    generator: torch.Generator,
) -> list[tuple[int, Tensor]]:
    """Documents longer than a window in random order, each with its number and tokens."""
    chosen: list[tuple[int, Tensor]] = []
    for index in torch.randperm(len(corpus.documents), generator=generator).tolist():
        if len(chosen) == wanted:
            break
        document = corpus.documents[index]
        if len(document) < body:  # a token is a character at least, in nearly every tokenizer
            continue
        ids = tokenize_texts([document], tokenizer, name=corpus.name).ids
        if len(ids) > body:
            chosen.append((index, ids))
    return chosen


def _too_few(corpus: Corpus, has: str, body: int, needed: int) -> str:
    return (
        f"corpus '{corpus.name}' {has} of {body} tokens, {needed} are needed; give more text, "
        "fewer --windows, or a shorter --sequence-length."
    )
