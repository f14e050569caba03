"""Training text: windows of several corpora in given shares, and held-out windows of another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import RecipeError, WindowError
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import Documents
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.progress import Progress
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
    """

    input_ids: Int[Tensor, "windows sequence"]
    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]
    repeats: tuple[float, ...]
    documents: tuple[str, ...]
    held_out: Windows
    held_out_name: str
    other: bool

    @property
    def num_tokens(self) -> int:
        """That are trained on, repetitions counted."""
        return self.input_ids.numel()


def read_text(
    dense: DenseModel,
    recipe: HealingRecipe,
    count: int,
    data: Documents | None = None,
    progress: Progress | None = None,
) -> Text:
    """Windows to train on, and others to measure on.

    A corpus that is too short for its share is gone through again, in another order.

    Args:
        dense: the model, for its tokenizer.
        recipe: names corpora and shares.
        count: windows to train on.
        data: one corpus instead of the recipe's.
        progress: told what is being done, where it takes long.

    Raises:
        CorpusError: a text cannot be read.
        WindowError: it gives not even one window.
        RecipeError: no text is named.
    """
    mix: Sequence[Source] = recipe.mix if data is None else [(data, 1.0)]
    if not mix:
        raise RecipeError("no training text: give --data a corpus name or a file.")
    apart = recipe.held_out_windows if recipe.held_out is None else 0
    generator = torch.Generator().manual_seed(recipe.seed)
    counts = _shared_out(count, [share for _, share in mix])
    corpora, rows, repeats, kept = [], [], [], []
    documents: dict[str, None] = {}
    for (source, share), wanted in zip(mix, counts, strict=True):
        own = math.ceil(apart * share)
        corpus, windows = _read(dense, recipe, source, wanted + own, progress)
        order = windows.input_ids[torch.randperm(len(windows), generator=generator)]
        own = min(own, len(order) // 4)
        kept.append(order[:own])
        chosen, times = _repeated(order[own:], wanted, generator)
        corpora.append(corpus)
        documents.update(dict.fromkeys(windows.documents))
        rows.append(chosen)
        repeats.append(times)
    ids = torch.cat(rows)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    held_out, name = _held_out(dense, recipe, torch.cat(kept), windows, corpora, progress)
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
    )


def _as_windows(ids: Tensor, like: Windows) -> Windows:
    return Windows(ids, like.bos, None, ())


def _shared_out(count: int, shares: Sequence[float]) -> list[int]:
    """Windows of each corpus: their shares, and at least one."""
    return [max(1, round(count * share)) for share in shares]


def _read(
    dense: DenseModel,
    recipe: HealingRecipe,
    source: Documents,
    wanted: int,
    progress: Progress | None,
    use: Use = "calibration",
) -> tuple[Corpus, Windows]:
    """A corpus and its windows, in order: enough of them, if it has so many."""
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
        )
        windows = tokens.make_windows(
            corpus,
            dense.tokenizer,
            sequence_length=recipe.sequence_length,
            bos=recipe.bos,
            progress=progress,
        )
        whole = corpus.complete or corpus is source or characters > MAX_CHARACTERS * 4
        if whole or len(windows) >= wanted:
            return corpus, windows
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
    kept: Tensor,
    like: Windows,
    corpora: Sequence[Corpus],
    progress: Progress | None,
) -> tuple[Windows, str]:
    """What is measured on: of a text of its own, or what was kept of the training text."""
    if recipe.held_out is not None:
        corpus, windows = _read(
            dense, recipe, recipe.held_out, recipe.held_out_windows, progress, "evaluation"
        )
        generator = torch.Generator().manual_seed(recipe.seed)
        chosen = torch.randperm(len(windows), generator=generator)[: recipe.held_out_windows]
        return _as_windows(windows.input_ids[chosen], windows), corpus.name
    if not len(kept):
        raise WindowError(
            "the training text is too short to hold any of it out; give more text, a shorter "
            "--sequence-length, or another text as --held-out."
        )
    return _as_windows(kept, like), ", ".join(corpus.name for corpus in corpora)
