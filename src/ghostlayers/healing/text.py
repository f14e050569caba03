"""Training text: windows of several corpora in given shares, and held-out windows of another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import RecipeError, WindowError
from ghostlayers.healing.completions import Counts, chat_windows, holds_chats
from ghostlayers.healing.own_text import write_own
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import Documents
from ghostlayers.recipe.healing import OWN, HealingRecipe
from ghostlayers.text import tokens
from ghostlayers.text.corpora import MAX_CHARACTERS, Corpus, characters_for, load_corpus
from ghostlayers.text.finding import Use
from ghostlayers.text.tokens import Windows

Source = tuple[Documents, float]
"""A corpus and its share."""


@dataclass(frozen=True)
class Text:
    """What is trained and measured on.

    Attributes:
        input_ids: every window that is trained on, in the order of training, [windows, sequence].
        corpora: where they are from.
        shares: of each, as asked for.
        repeats: how often the text of each is gone through.
        documents: hashes of the documents that were read to train on.
        held_out: windows that are measured on.
        held_out_name: the corpus that these are of.
        other: whether that is another text than is trained on.
        counts: which tokens are learnt to be predicted, [windows, sequence]; None for all.
    """

    input_ids: Int[Tensor, "windows sequence"]
    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]
    repeats: tuple[float, ...]
    documents: tuple[str, ...]
    held_out: Windows
    held_out_name: str
    other: bool
    counts: Counts | None = None

    @property
    def num_tokens(self) -> int:
        """That are trained on, repetitions counted."""
        return self.input_ids.numel()

    def distinct(self) -> Int[Tensor, "windows sequence"]:
        """Every window that is trained on once, in the order of training."""
        return self.input_ids[sorted(set(first_occurrences(self.input_ids)))]

    def first(self, count: int) -> "Text":
        """The first so many windows, of those that were read."""
        share = count / len(self.input_ids)
        return replace(
            self,
            input_ids=self.input_ids[:count],
            repeats=tuple(times * share for times in self.repeats),
            counts=None if self.counts is None else self.counts[:count],
        )


def read_text(
    dense: DenseModel,
    recipe: HealingRecipe,
    count: int,
    data: Documents | None = None,
    keep: Path | None = None,
) -> Text:
    """Windows to train on, and others to measure on.

    A corpus that is too short for its share is gone through again, in another order.

    Args:
        dense: the model, for its tokenizer.
        recipe: names corpora and shares.
        count: windows to train on.
        data: one corpus instead of the recipe's.
        keep: a folder for what the dense model writes, which is then found there.

    Raises:
        CorpusError: a text cannot be read.
        WindowError: it gives not even one window.
        RecipeError: no text is named.
    """
    mix: Sequence[Source] = recipe.mix if data is None else [(data, 1.0)]
    if not mix:
        raise RecipeError("no training text: give --data a corpus name or a file.")
    mix = sorted(mix, key=_is_own)  # what is written goes on from what is read
    real = sum(share for source, share in mix if not _is_own((source, share)))
    apart = recipe.num_held_out_windows if recipe.held_out is None else 0
    generator = torch.Generator().manual_seed(recipe.seed)
    counts = _shared_out(count, [share for _, share in mix])
    rows: list[Tensor] = []
    corpora, counted, repeats, apart_rows = [], [], [], []
    documents: dict[str, None] = {}
    for (source, share), wanted in zip(mix, counts, strict=True):
        own = math.ceil(apart * share / real)
        if _is_own((source, share)):
            source, own = write_own(dense, recipe, torch.cat(rows), wanted, keep), 0
        corpus, windows, learnt = _read(dense, recipe, source, wanted + own)
        order = torch.randperm(len(windows), generator=generator)
        own = min(own, len(order) // 4)
        apart_rows.append(windows.input_ids[order[:own]])
        chosen, times = _repeated(order[own:], wanted, generator)
        corpora.append(corpus)
        documents.update(dict.fromkeys(windows.documents))
        rows.append(windows.input_ids[chosen])
        counted.append(None if learnt is None else learnt[chosen])
        repeats.append(times)
    ids = torch.cat(rows)
    mixed = torch.randperm(len(ids), generator=generator)
    ids, learnt = ids[mixed], _joined(recipe, counted, rows)
    held_out, name = _held_out(dense, recipe, torch.cat(apart_rows), windows, corpora)
    tokens.check_tokens(dense.network, dense.tokenizer, held_out, _as_windows(ids, windows))
    shares = tuple(share for _, share in mix)
    return Text(
        ids,
        tuple(corpora),
        shares,
        tuple(repeats),
        tuple(documents),
        held_out,
        name,
        other=recipe.held_out is not None,
        counts=None if learnt is None else learnt[mixed],
    )


def first_occurrences(input_ids: Int[Tensor, "windows sequence"]) -> list[int]:
    """For every window the number of the first one that equals it."""
    seen: dict[bytes, int] = {}
    rows = input_ids.contiguous().numpy()
    return [seen.setdefault(row.tobytes(), number) for number, row in enumerate(rows)]


def _joined(
    recipe: HealingRecipe, counted: Sequence[Counts | None], rows: Sequence[Tensor]
) -> Counts | None:
    """Which tokens count, of all corpora: of those without chats, all.

    Raises:
        RecipeError: answers are to count, and no corpus has any.
    """
    if not recipe.completions:
        return None
    if all(count is None for count in counted):
        raise RecipeError(
            "--completions trains on the answers of chats, and the training text holds none: "
            "expected rows with messages, or with prompt and completion. Leave --completions "
            "out (beside a preset: --no-completions)."
        )
    pairs = zip(counted, rows, strict=True)
    return torch.cat(
        [torch.ones_like(row, dtype=torch.bool) if c is None else c for c, row in pairs]
    )


def _is_own(source: Source) -> bool:
    """Whether the dense model writes it."""
    return isinstance(source[0], str) and source[0] == OWN


def _as_windows(ids: Tensor, like: Windows) -> Windows:
    return Windows(ids, like.bos, None, ())


def _shared_out(count: int, shares: Sequence[float]) -> list[int]:
    """Windows of each corpus by its share, at least one: together as many as are wanted, or more.

    What rounding down leaves goes to the largest remainders.
    """
    counts = [math.floor(count * share) for share in shares]
    remainders = [count * share - whole for share, whole in zip(shares, counts, strict=True)]
    for place in sorted(range(len(shares)), key=lambda n: -remainders[n])[: count - sum(counts)]:
        counts[place] += 1
    return [max(1, whole) for whole in counts]


def _read(
    dense: DenseModel,
    recipe: HealingRecipe,
    source: Documents,
    wanted: int,
    use: Use = "calibration",
) -> tuple[Corpus, Windows, Counts | None]:
    """A corpus and its windows, in order: enough of them, if it has so many.

    Of chats whose answers alone are trained on, also which tokens count.
    """
    turns = recipe.completions and use == "calibration"
    characters = characters_for(source, wanted * recipe.sequence_length)
    while True:
        corpus = load_corpus(
            source,
            use=use,
            text_column=recipe.text_column,
            separator=recipe.separator,
            max_characters=min(characters, MAX_CHARACTERS * 16),
            seed=recipe.seed,
            tokenizer=dense.tokenizer,
            turns=turns,
        )
        counts = None
        whole = corpus.complete or corpus is source or characters > MAX_CHARACTERS * 4
        if turns and holds_chats(corpus):
            corpus, windows, counts = chat_windows(
                corpus, dense.tokenizer, sequence_length=recipe.sequence_length, bos=recipe.bos
            )
        else:
            windows = tokens.make_windows(
                corpus,
                dense.tokenizer,
                sequence_length=recipe.sequence_length,
                bos=recipe.bos,
            )
        if whole or len(windows) >= wanted:
            return corpus, windows, counts
        characters *= 4


def _repeated(order: Tensor, wanted: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """So many windows: each once, then each again in another order."""
    if not len(order):
        raise WindowError(
            "the training text gives no window beside those that are held out; give more text, a "
            "shorter --sequence-length, or another text as --held-out."
        )
    rounds = [order]
    while sum(map(len, rounds)) < wanted:
        rounds.append(order[torch.randperm(len(order), generator=generator)])
    return torch.cat(rounds)[:wanted], wanted / len(order)


def _held_out(
    dense: DenseModel,
    recipe: HealingRecipe,
    apart: Tensor,
    like: Windows,
    corpora: Sequence[Corpus],
) -> tuple[Windows, str]:
    """What is measured on: of a text of its own, or what was set apart of the training text."""
    if recipe.held_out is not None:
        return read_held_out(dense, recipe)
    if not len(apart):
        raise WindowError(
            "the training text is too short to hold any of it out; give more text, a shorter "
            "--sequence-length, or another text as --held-out."
        )
    names = [corpus.name for corpus in corpora if corpus.name != OWN]  # none of it is held out
    return _as_windows(apart, like), ", ".join(names)


def read_held_out(dense: DenseModel, recipe: HealingRecipe) -> tuple[Windows, str]:
    """Windows of the recipe's held-out text, drawn by its seed, and the text's name.

    Raises:
        CorpusError: the text cannot be read.
        WindowError: it gives no window.
    """
    assert recipe.held_out is not None
    corpus, windows, _ = _read(
        dense, recipe, recipe.held_out, recipe.num_held_out_windows, "evaluation"
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(windows), generator=generator)[: recipe.num_held_out_windows]
    return _as_windows(windows.input_ids[chosen], windows), corpus.name
