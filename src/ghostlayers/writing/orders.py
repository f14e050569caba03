"""What is to be written: prompts with or without a reference answer, and prefixes of real text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ghostlayers.errors import CorpusError
from ghostlayers.recipe.writing import ROWS, WritingRecipe
from ghostlayers.text import tokens
from ghostlayers.text.chats import Turns, prompt_of
from ghostlayers.text.corpora import MAX_CHARACTERS, Corpus, characters_for, load_corpus
from ghostlayers.text.rows import turns_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESTATE = (
    "{question}\n\n"
    "An answer to this is given below. Answer yourself, as you would have put it: keep its facts "
    "and what it comes to, choose the words and the order. Write nothing but the answer, and "
    "mention neither the one below nor this request.\n\n"
    "Answer given:\n{answer}"
)
"""How a model is shown a reference answer."""


@dataclass(frozen=True)
class Order:
    """One text that is to be written.

    Attributes:
        ids: tokens that the model goes on from.
        turns: of the chat that it answers, as they are kept; None of a prefix.
        reference: an answer that is known, which stands in where the model's is no good.
        greedy: the most likely token is taken, whatever the temperature.
        fault: why it cannot be written at all.
    """

    ids: tuple[int, ...]
    turns: tuple[dict[str, Any], ...] | None = None
    reference: dict[str, Any] | None = None
    greedy: bool = False
    fault: str | None = None

    @property
    def asked(self) -> str | None:
        """The words of the prompt and of the reference answer; None of a prefix."""
        if self.turns is None:
            return None
        turns = [*self.turns, *([self.reference] if self.reference else ())]
        return "\n".join(str(turn.get("content") or "") for turn in turns)


def read_orders(recipe: WritingRecipe, tokenizer: "PreTrainedTokenizerBase") -> list[Order]:
    """All that a recipe wants written, in the order of its text.

    Raises:
        CorpusError: the text cannot be read, or there is no template for chats.
        WindowError: it has too few prefixes.
    """
    if recipe.prompts is not None:
        return _prompts(recipe, tokenizer)
    assert recipe.prefixes is not None
    rows = ROWS if recipe.rows is None else recipe.rows
    corpus = _corpus_for(recipe, rows * recipe.prefix_tokens)
    return prefix_orders(recipe, corpus, rows, tokenizer)


def _corpus_for(recipe: WritingRecipe, num_tokens: int) -> Corpus:
    """Enough of a corpus; what its tokenizer turns out to need more of is refused further on."""
    assert recipe.prefixes is not None
    return load_corpus(
        recipe.prefixes,
        use="calibration",
        text_column=recipe.text_column,
        separator=recipe.separator,
        max_characters=min(2 * characters_for(recipe.prefixes, num_tokens), MAX_CHARACTERS),
        seed=recipe.seed,
    )


def prefix_orders(
    recipe: WritingRecipe,
    corpus: Corpus,
    rows: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Order]:
    """Prefixes at random places of a corpus, a share of them to be continued greedily.

    Raises:
        WindowError: the text has too few.
    """
    windows = tokens.make_windows(
        corpus,
        tokenizer,
        sequence_length=recipe.prefix_tokens,
        bos=recipe.bos,
        count=rows,
        seed=recipe.seed,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    greedy = set(torch.randperm(rows, generator=generator)[: round(recipe.greedy * rows)].tolist())
    ids = windows.input_ids.tolist()
    return [Order(tuple(row), greedy=number in greedy) for number, row in enumerate(ids)]


def _prompts(recipe: WritingRecipe, tokenizer: "PreTrainedTokenizerBase") -> list[Order]:
    assert recipe.prompts is not None
    corpus = load_corpus(
        recipe.prompts, use="calibration", text_column=recipe.text_column, turns=True
    )
    filled = [document for document in corpus.documents if document.strip()]
    orders = [_order(_turns(document), tokenizer) for document in filled[: recipe.rows]]
    if all(order.fault for order in orders):
        raise CorpusError(
            f"'{recipe.prompts}' holds no prompt: expected chats whose last question is a user's, "
            "got none. Name the column of prompts with --text-column."
        )
    return orders


def _turns(document: str) -> list[dict[str, Any]]:
    """The chat of a row; a plain text is a question."""
    turns = turns_in(document)
    return [{"role": "user", "content": document}] if turns is None else turns


def _order(turns: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Order:
    """A prompt, with its reference answer in it if there is one."""
    reference = turns[-1] if turns and turns[-1].get("role") == "assistant" else None
    prompt = tuple(turns if reference is None else turns[:-1])
    if reference is not None and not str(reference.get("content") or "").strip():
        reference = None
    if not prompt or prompt[-1].get("role") != "user":
        return Order((), prompt, reference, fault="form")
    shown: Turns = prompt
    if reference is not None:
        question = RESTATE.format(question=prompt[-1]["content"], answer=reference["content"])
        shown = [*prompt[:-1], {**prompt[-1], "content": question}]
    ids = tokenizer(prompt_of(tokenizer, shown), add_special_tokens=False)["input_ids"]
    return Order(tuple(ids), prompt, reference)
