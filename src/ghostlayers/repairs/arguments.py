"""Arguments that ride on a name: ``ghost:rank=64``, ``joint:x+z``, ``perplexity:one-shot``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.spans import small_number
from ghostlayers.statistics.moments import TokenWeight


@dataclass(frozen=True)
class Tuning:
    """How one repair is fitted, where its name says so.

    Attributes:
        ridge: relative ridge, ``auto``, or None for the recipe's.
        weight: how much each token counts, or None for the recipe's.
    """

    ridge: float | Literal["auto"] | None = None
    weight: TokenWeight | None = None


class Arguments:
    """The parts behind a method's name, each taken once.

    Args:
        text: the whole name, such as ``ghost:affine:rank=64``.
        kind: what is named, for messages.
    """

    def __init__(self, text: str, kind: str = "repair") -> None:
        self.text = text
        self.name, *parts = [part.strip() for part in text.split(":")]
        self._words = [part for part in parts if "=" not in part]
        pairs = [part.split("=", 1) for part in parts if "=" in part]
        self._values = {key.strip(): value.strip() for key, value in pairs}
        if len(self._values) < len(pairs) or "" in parts:
            raise RecipeError(f"cannot read the {kind} '{text}': expected name:argument:key=value.")
        self._known: list[str] = []

    def word(self, default: str | None = None) -> str | None:
        """The next argument that is not a pair."""
        return self._words.pop(0) if self._words else default

    def flag(self, name: str) -> bool:
        """Whether a word is among the arguments."""
        self._known.append(name)
        if name not in self._words:
            return False
        self._words.remove(name)
        return True

    def value(self, name: str) -> str | None:
        """The value of a pair."""
        self._known.append(name)
        return self._values.pop(name, None)

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """The value of a pair that takes one of a few words; the first where it is not given.

        Raises:
            RecipeError: it is another word.
        """
        word = self.value(name)
        if word is None:
            return allowed[0]
        if word not in allowed:
            raise RecipeError(
                f"'{self.text}': {name} must be {' or '.join(allowed)}, not '{word}'."
            )
        return word

    def whole_number(self, text: str | None, what: str, most: int = 100_000) -> int | None:
        """A positive whole number, up to a bound that is far above what can be of use.

        Raises:
            RecipeError: it is something else.
        """
        if text is None:
            return None
        number = small_number(text)
        if not number or number > most:
            up = f" to {most:,}" if text.isdecimal() and number != 0 else ""
            raise RecipeError(
                f"'{self.text[:60]}': {what} must be a whole number from 1{up}, got '{text[:60]}'."
            )
        return number

    def ridge(self) -> "Tuning":
        """The pairs that every least-squares repair takes: ``ridge`` and ``weight``."""
        weight = self.value("weight")
        if weight is not None and weight not in get_args(TokenWeight):
            raise RecipeError(
                f"'{self.text}': weight must be {', '.join(get_args(TokenWeight))}, not '{weight}'."
            )
        return Tuning(self._ridge(), weight)  # type: ignore[arg-type]

    def _ridge(self) -> "float | Literal['auto'] | None":
        text = self.value("ridge")
        if text is None or text == "auto":
            return text  # type: ignore[return-value]
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0.0 <= number < math.inf:
            raise RecipeError(
                f"'{self.text}': ridge must be auto or a number >= 0 (and finite), not '{text}'."
            )
        return number

    def finish(self) -> None:
        """Refuse what nobody took.

        Raises:
            RecipeError: an argument that the method does not know.
        """
        left = [*self._words, *self._values]
        if not left:
            return
        hint = suggest(left[0], self._known) if self._known else "It takes none."
        raise RecipeError(f"'{self.text}': unknown argument '{left[0]}'. {hint}")
