"""What a model is to write to train on: `WritingRecipe`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ghostlayers.errors import RecipeError
from ghostlayers.recipe.checks import check_bounds, check_keys, check_types
from ghostlayers.runtime.settings import TEXT, WHAT, documented, setting
from ghostlayers.text.tokens import BosPolicy

Engine = Literal["auto", "transformers", "vllm"]

ROWS = 1000
"""Prefixes that are continued, if nothing is said."""

ANSWER_TOKENS, CONTINUATION_TOKENS = 512, 448
"""Tokens written at most, if nothing is said."""

COLDEST, HOTTEST = 0.01, 100
"""Of temperatures: scores divided by less leave the range of their type."""


@documented
@dataclass(frozen=True)
class WritingRecipe:
    """What the dense model writes: answers to prompts, or continuations of real text."""

    prompts: str | None = setting(
        None,
        "A file of prompts: chats (messages), or columns such as prompt and response. Where an "
        "answer stands there, the model is asked to restate it in its own manner.",
        WHAT,
        metavar="FILE",
    )
    prefixes: str | None = setting(
        None,
        "A corpus, named as for prune, whose beginnings are continued.",
        WHAT,
        metavar="CORPUS",
    )
    rows: int | None = setting(
        None, "Write so many.", WHAT, least=1, says=f"every prompt; of prefixes {ROWS:,}"
    )
    prefix_tokens: int = setting(
        64, "Tokens of a prefix, at the model's BOS policy.", WHAT, least=2
    )
    new_tokens: int | None = setting(
        None,
        "Tokens written at most.",
        WHAT,
        least=1,
        says=f"{ANSWER_TOKENS} of an answer, {CONTINUATION_TOKENS} behind a prefix",
    )
    temperature: float | None = setting(
        None,
        f"Of what is drawn, {COLDEST} to {HOTTEST}; 0 takes the most likely token.",
        WHAT,
        says="0 for answers, 1 behind prefixes",
    )
    greedy: float = setting(
        0.25, "Share of the prefixes that are continued by the most likely token.", WHAT
    )
    engine: Engine = setting(
        "auto",
        "What runs the model: transformers, or vllm; 'auto' takes vllm where it is installed and "
        "there is an accelerator.",
    )
    text_column: str | None = setting(
        None, "Column that holds the text.", TEXT, says="a chat, else text, as for heal"
    )
    separator: str = setting(
        "\n\n", r"Joins documents; \n is a line break.", TEXT, says="a blank line", read="separator"
    )
    bos: BosPolicy = setting("auto", "BOS before each prefix; 'auto' asks the tokenizer.", TEXT)
    seed: int = setting(0, "Chooses prefixes, and draws.", TEXT)

    def __post_init__(self) -> None:
        check_types(self)
        if (self.prompts is None) == (self.prefixes is None):
            raise RecipeError(
                "say what is to be written: answers to --prompts FILE, or continuations of "
                f"--prefixes CORPUS; got {'neither' if self.prompts is None else 'both'}."
            )
        if not 0 <= self.greedy <= 1:
            raise RecipeError(f"'greedy' must lie between 0 and 1, got {self.greedy:g}.")
        heat = self.temperature
        if heat is not None and heat != 0 and not COLDEST <= heat <= HOTTEST:
            raise RecipeError(
                f"'temperature' must be 0, for the most likely token, or lie between {COLDEST} and "
                f"{HOTTEST}, got {heat:g}."
            )
        check_bounds(self, {"rows": 1, "prefix_tokens": 2, "new_tokens": 1})

    @property
    def most_tokens(self) -> int:
        """Tokens written at most."""
        usual = CONTINUATION_TOKENS if self.prompts is None else ANSWER_TOKENS
        return usual if self.new_tokens is None else self.new_tokens

    @property
    def heat(self) -> float:
        """The temperature of what is not greedy."""
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.prompts is None else 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WritingRecipe":
        """A recipe from a mapping such as a YAML file's.

        Raises:
            RecipeError: an unknown key; the message names near ones.
        """
        check_keys(cls, values, "for writing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)
