"""What a user wishes instead of a number of layers: a share of bytes, a speed, a size, a loss."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ghostlayers.errors import RecipeError, shortened, suggest
from ghostlayers.runtime.sizes import parse_memory

if TYPE_CHECKING:
    from ghostlayers.recipe.recipe import Recipe

Kind = Literal["smaller", "faster", "fits", "max_loss"]
KINDS: tuple[Kind, ...] = ("smaller", "faster", "fits", "max_loss")
"""Fields of a recipe that hold a wish."""

FIXED = ("layers", "remove")
"""Fields that say what goes by number or by name."""

HOW_MANY = (*FIXED, *KINDS)
"""Fields one of which says how many layers go."""

DETAILS = ("at", "speed", "context", "as_type")
"""Fields that say how a budget is counted."""

FLOATS = ("float32", "bfloat16", "float16")
PACKED = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0"),
)
"""Types of GGUF files whose sizes are known beforehand."""

CONTEXT = 4096
"""Tokens whose caches ``fits`` counts, unless it is told otherwise."""

AT = "1x512"
"""Where ``faster`` is measured, unless it is told otherwise: batch and tokens of the prompt."""

LEAST_WINDOWS = 4
"""Held-out windows that ``max_loss`` needs, so that there is an error to speak of."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?|\.[0-9]+")
_AT = re.compile(r"\s*([0-9]{1,6})\s*[xX]\s*([0-9]{1,9})\s*")


@dataclass(frozen=True)
class Wish:
    """A budget, from which the number of layers follows.

    Attributes:
        kind: the field of the recipe that holds it.
        text: as it was given.
        value: the share of the bytes that goes; the factor of the speed; bytes; nats a token.
    """

    kind: Kind
    text: str
    value: float

    def __str__(self) -> str:
        return f"--{self.kind.replace('_', '-')} {self.text}"


def wish_of(recipe: "Recipe") -> Wish | None:
    """The budget of a recipe; None where layers are given by number or name, or not at all.

    Raises:
        RecipeError: it is none of its kind.
    """
    for kind, read in _READERS.items():
        given = getattr(recipe, kind)
        if given is not None:
            text = f"{given:g}" if isinstance(given, float) else str(given)
            return Wish(kind, text, read(given))
    return None


def share_in(text: str) -> float:
    """A share of the bytes that is to go, ``20%`` as 0.2.

    Raises:
        RecipeError: no percentage between 0 and 100; a bare number could mean either.
    """
    number, sign, rest = text.strip().partition("%")
    value = _positive(number)
    if not sign and value is not None:
        raise RecipeError(
            f"--smaller {_short(text)}: is that a share or a percentage? Write it as a percentage "
            "of the model's bytes, such as 20%."
        )
    if rest or value is None or not value < 100:
        raise RecipeError(
            f"--smaller: expected a percentage of the model's bytes above 0% and below 100%, such "
            f"as 20%, got '{_short(text)}'."
        )
    return value / 100


def factor_in(text: str) -> float:
    """How many times as fast, ``1.25x`` or ``1.25``.

    Raises:
        RecipeError: no finite number above 1.
    """
    bare = text.strip().removesuffix("x").removesuffix("X")
    value = _positive(bare)
    if value is None or not value > 1:
        hint = ""
        if text.strip().endswith("%"):
            share = _positive(text.strip()[:-1])
            hint = "" if share is None else f" (a quarter faster is 1.25x, not {_short(text)})"
        raise RecipeError(
            f"--faster: expected how many times as fast, a number above 1 such as 1.25x, got "
            f"'{_short(text)}'{hint}."
        )
    return value


def bytes_in(text: str) -> float:
    """A size, ``6GiB``, in bytes.

    Raises:
        RecipeError: it is none.
    """
    try:
        size = parse_memory(text)
    except RecipeError as error:
        raise RecipeError(f"--fits: {error}") from None
    assert size is not None
    return float(size)


def nats_in(value: float) -> float:
    """Nats a token above the dense model.

    Raises:
        RecipeError: no positive, finite number.
    """
    try:
        nats = float(value)
    except OverflowError:  # an integer of hundreds of digits
        nats = math.inf
    if not 0 < nats < math.inf:
        raise RecipeError(
            "--max-loss: expected nats a token above the dense model, a positive number such as "
            f"0.1, got {_short(str(value))}."
        )
    return nats


_READERS: dict[Kind, Callable[[Any], float]] = {
    "smaller": share_in,
    "faster": factor_in,
    "fits": bytes_in,
    "max_loss": nats_in,
}


def place_in(text: str) -> tuple[int, int]:
    """Batch and length, ``1x512``.

    Raises:
        RecipeError: they are none.
    """
    match = _AT.fullmatch(text)
    batch, length = (int(match[1]), int(match[2])) if match else (0, 0)
    if batch < 1 or length < 1:
        raise RecipeError(
            "--at: expected sequences at a time and tokens of each prompt, such as 1x512, got "
            f"'{_short(text)}'."
        )
    return batch, length


def check_wish(recipe: "Recipe") -> None:
    """Refuse a budget that is none, two of them, or one beside what fixes the layers.

    Raises:
        RecipeError: the message names what was given.
    """
    wished = [kind for kind in KINDS if getattr(recipe, kind) is not None]
    named = [*(f for f in FIXED if getattr(recipe, f) is not None), *wished]
    if wished and len(named) > 1:
        listed = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise RecipeError(
            f"{listed} are given, but each of them settles how many layers go: give one of them."
        )
    wish_of(recipe)
    _check_details(recipe)


_BELONGS: dict[str, Kind] = dict(zip(DETAILS, ("faster", "faster", "fits", "fits"), strict=True))


def _check_details(recipe: "Recipe") -> None:
    """Refuse details of a budget that is not asked for."""
    for name, kind in _BELONGS.items():
        if getattr(recipe, name) is not None and getattr(recipe, kind) is None:
            option = "--as" if name == "as_type" else f"--{name}"
            raise RecipeError(f"{option} belongs to --{kind}, which is not given; drop it.")
    if recipe.at is not None:
        place_in(recipe.at)
    if recipe.context is not None and recipe.context < 1:
        raise RecipeError(f"'context' must be at least 1, got {recipe.context}.")
    if recipe.as_type is not None and recipe.as_type.lower() not in (*FLOATS, *PACKED):
        known = (*FLOATS, *PACKED)
        raise RecipeError(
            f"--as: the size of a model in '{_short(recipe.as_type)}' is not known beforehand. "
            f"{suggest(recipe.as_type.lower(), known)}"
        )
    if is_packed(recipe.as_type) and not _is_stock(recipe):
        raise RecipeError(
            f"--as {recipe.as_type} is a type of GGUF files, which have no place for the operators "
            f"of '{recipe.repair}'. Take a repair that folds: --repair refit:3:ridge=auto."
        )
    if recipe.max_loss is not None and recipe.num_held_out_windows < LEAST_WINDOWS:
        raise RecipeError(
            "--max-loss is settled by differences between held-out windows, "
            f"{LEAST_WINDOWS} of them at the least; raise --held-out-windows."
        )


def is_packed(as_type: str | None) -> bool:
    """Whether it is a type of GGUF files."""
    return as_type is not None and as_type.lower() in PACKED


def _is_stock(recipe: "Recipe") -> bool:
    """Whether what is left of the repair is a stock model."""
    return recipe.method.form == "fold" or recipe.export == "stock-layer"


def _positive(text: str) -> float | None:
    """A plain positive number; None for anything else, such as nan, 1e400 or -2."""
    text = text.strip()
    if not text.isascii() or _NUMBER.fullmatch(text) is None:
        return None
    value = float(text)
    return value if 0 < value < math.inf else None


def _short(text: str) -> str:
    return shortened(text.strip())
