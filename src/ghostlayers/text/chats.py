"""Chats as a model's template writes them: what it is asked, and what it answers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostlayers.errors import CorpusError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Mapping[str, Any]]
"""Each with a role and a content."""


def prompt_of(tokenizer: "PreTrainedTokenizerBase", turns: Turns) -> str:
    """Turns, and what begins the model's answer; a model that can think aloud is told not to.

    Raises:
        CorpusError: the tokenizer has no template, or it refuses the turns.
    """
    return _render(tokenizer, turns, add_generation_prompt=True, enable_thinking=False)


def split_answer(tokenizer: "PreTrainedTokenizerBase", turns: Turns) -> tuple[str, str]:
    """What stands before the last turn's words, and these with what ends the turn.

    Raises:
        CorpusError: the template writes the turns before in another way where an answer follows.
    """
    before = prompt_of(tokenizer, turns[:-1])
    whole = _render(tokenizer, turns, enable_thinking=False)
    if not whole.startswith(before):
        raise CorpusError(
            f"the chat template of '{tokenizer.name_or_path}' does not tell where an answer "
            "begins: expected a chat to start with what the template writes of its turns before "
            f"the answer, got other text from {_parting(before, whole)!r} on. Train on whole "
            "chats: leave out --completions."
        )
    return before, whole[len(before) :]


def _parting(one: str, other: str) -> str:
    """The first of one text that the other has not."""
    pairs = zip(one, other, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[place : place + 40]


def _render(tokenizer: "PreTrainedTokenizerBase", turns: Turns, **how: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            f"the tokenizer '{tokenizer.name_or_path}' has no template for chats. Take the model "
            "that was tuned on chats, or put a chat_template into the tokenizer."
        )
    try:
        return str(tokenizer.apply_chat_template([*map(dict, turns)], tokenize=False, **how))
    except Exception as error:  # templates raise what they like
        raise CorpusError(
            f"the model's chat template refuses a chat: "
            f"{shortened(str(error).strip() or type(error), 500)}"
        ) from error
