"""What is typed of a training run, as numbers: amounts, budgets, learning rates, shares of text."""

import math
import re
from collections.abc import Sequence
from typing import Any

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.runtime.documents import brief

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMbB]?)")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|sec|m|min|h)?")
_MINUTES = {"s": 1 / 60, "sec": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0, None: 1.0}


def read_amount(text: str) -> int:
    """A number of tokens: ``25000``, ``400k``, ``1M``.

    Raises:
        RecipeError: it is no amount.
    """
    match = _AMOUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    amount = 0.0
    if match:
        amount = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]
    if not 1 <= amount <= 1e12:
        raise RecipeError(
            "--tokens: expected an amount from 1 to 1000B, such as 25000, 400k or 1M, got "
            f"'{text[:60]}'."
        )
    return math.ceil(amount)


def read_budget(text: str) -> dict[str, Any]:
    """A budget in one word, ``5min``, ``90s``, ``1M`` or ``400k``, as fields of a recipe.

    Raises:
        RecipeError: it is none.
    """
    match = _DURATION.fullmatch(text.strip())
    if match and match[2]:
        return {"minutes": float(match[1]) * _MINUTES[match[2]]}
    if _AMOUNT.fullmatch(text.strip().replace(",", "")) and not text.strip().isdigit():
        return {"tokens": text.strip()}
    raise RecipeError(
        f"'{text[:60]}' is no budget for training: expected a time such as 5min or 90s, or tokens "
        "such as 400k or 1M (in capitals; 1m is a minute)."
    )


def read_rates(text: str, parts: Sequence[str]) -> dict[str, float]:
    """Learning rates of a comma-separated list, by part; that without one under the empty name.

    Raises:
        RecipeError: an unknown part, or no positive number.
    """
    rates: dict[str, float] = {}
    for entry in text.split(","):
        part, named, rate = entry.rpartition("=")
        part = part.strip()
        if named and part not in parts:
            raise RecipeError(
                f"--learning-rate: nothing is called '{part}'. {suggest(part, parts)}"
            )
        rates[part] = _rate(rate)
    return rates


def _rate(text: str) -> float:
    rate = _number(text)
    if not 0 < rate < 10:
        raise RecipeError(
            "--learning-rate: expected a number above 0 and below 10, such as 1e-4, got "
            f"{brief(text)}."
        )
    return rate


def read_mix(text: str) -> tuple[tuple[str, float], ...]:
    """Corpora of a comma-separated list, each with its share behind a colon, or all without.

    Raises:
        RecipeError: a share is no positive number, or only some have one.
    """
    from ghostlayers.runtime.files import exists
    from ghostlayers.text.corpora import split_names

    named: list[tuple[str, float | None]] = []
    for entry in split_names(text, ","):
        name, colon, share = entry.rpartition(":")
        is_share = colon and re.fullmatch(r"[\d.eE+-]+", share) and not exists(entry)
        named.append((name.strip(), _share(share, entry)) if is_share else (entry, None))
    if not all(name for name, _ in named):
        raise RecipeError("--data names an empty corpus.")
    shares = [share for _, share in named]
    if any(share is None for share in shares) and any(share is not None for share in shares):
        raise RecipeError(f"--data {text[:60]}: give every corpus a share (c4:0.7), or none.")
    weights = [1.0 if share is None else share for share in shares]
    return tuple((name, w / sum(weights)) for (name, _), w in zip(named, weights, strict=True))


def _share(text: str, entry: str) -> float:
    share = _number(text)
    if not 0 < share < 1e9:
        raise RecipeError(
            f"--data: expected a share above 0 and below 1e9 behind the colon of '{entry[:60]}', "
            f"got '{text[:60]}'."
        )
    return share


def _number(text: str) -> float:
    """A number as it is typed; 0, which nothing here may be, where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0
