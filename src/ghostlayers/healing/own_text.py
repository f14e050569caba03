"""Training text that the dense model writes for a run, behind the beginnings of real windows."""

import math
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe.healing import OWN, HealingRecipe
from ghostlayers.recipe.writing import WritingRecipe
from ghostlayers.text.corpora import Corpus
from ghostlayers.writing.authors import author_in_memory
from ghostlayers.writing.composing import compose
from ghostlayers.writing.orders import Order

PREFIX = 64
"""Tokens of a real window that are continued, or half of it where it is short."""

MORE = 1.25
"""Texts that are written for each window: some end early, some are dropped."""


def write_own(
    dense: DenseModel,
    recipe: HealingRecipe,
    real: Int[Tensor, "windows sequence"],
    wanted: int,
    keep: Path | None = None,
) -> Corpus:
    """Text for about so many windows, written by the dense model.

    Only windows that are trained on are continued, so none that is held out leaks into it.

    Args:
        dense: the model.
        recipe: the run's.
        real: windows that are trained on.
        wanted: windows.
        keep: a folder in which a killed run finds what it has written.

    Raises:
        ResumeError: what is kept was written for other windows.
        CorpusError: nothing that was written is any good.
    """
    length = recipe.sequence_length
    prefix, rows = min(PREFIX, length // 2), math.ceil(MORE * wanted)
    writing = WritingRecipe(
        prefixes=recipe.data,
        rows=rows,
        prefix_tokens=max(2, prefix),
        new_tokens=length - prefix,
        engine="transformers",
        seed=recipe.seed,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(real), generator=generator)
    greedy = round(writing.greedy * rows)
    # What is greedy comes first, so that a window that comes again is drawn, and not repeated.
    orders = [
        Order(tuple(real[order[n % len(order)], :prefix].tolist()), greedy=n < greedy)
        for n in range(rows)
    ]
    draft = None if keep is None else keep / "written.jsonl"
    written = compose(author_in_memory(dense), writing, orders, draft=draft)
    texts = tuple(row["text"] for row in written.rows)
    return Corpus(OWN, texts, recipe.separator, f"written by {dense.base.name}")
