"""What a recipe refuses: values of another type, choices that contradict each other."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.presets import find_preset
from ghostlayers.repairs import RepairMethod
from ghostlayers.runtime.documents import brief
from ghostlayers.runtime.run_options import MOST
from ghostlayers.selection.choices import Selection, parse_keep

if TYPE_CHECKING:
    from ghostlayers.recipe.recipe import Recipe


def check(recipe: "Recipe") -> None:
    """Refuse a recipe that cannot be carried out on any model.

    Raises:
        RecipeError: a field has a wrong type or value, or two of them contradict each other.
    """
    check_types(recipe)
    if recipe.preset is not None:
        find_preset(recipe.preset)
    _check_choices(recipe)
    _check_numbers(recipe)


def check_keys(owner: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are no fields of a request.

    Args:
        owner: the request's class, a dataclass.
        values: from a file or a call.
        where: what the keys stand in, as the message says it.

    Raises:
        RecipeError: an unknown key; the message names near ones.
    """
    known = [field.name for field in dataclasses.fields(owner)]
    for key in values:
        if key not in known:
            raise RecipeError(f"unknown key '{key}' {where}. {suggest(str(key), known)}")


def check_bounds(request: Any, least: Mapping[str, int]) -> None:
    """Refuse counts that are too small or too large, where they are given, and seeds that are none.

    Args:
        request: with a ``seed``.
        least: the smallest number that each field may hold.

    Raises:
        RecipeError: one lies outside.
    """
    for name, smallest in least.items():
        value = getattr(request, name)
        if value is not None and not smallest <= value <= MOST:
            raise RecipeError(f"'{name}' must lie between {smallest} and {MOST:,}, got {value}.")
    check_seed(request.seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        RecipeError: it is negative, or too large.
    """
    if not 0 <= seed < 2**63:
        raise RecipeError(f"'seed' must lie in [0, 2**63), got {brief(seed)}.")


def check_types(recipe: Any) -> None:
    """Refuse a request whose fields have other types or words than they are declared with.

    Args:
        recipe: a dataclass.

    Raises:
        RecipeError: a field has a wrong type, or a word that means nothing.
    """
    hints = typing.get_type_hints(type(recipe))
    for field in dataclasses.fields(recipe):
        value, hint = getattr(recipe, field.name), hints[field.name]
        allowed = _plain_types(hint)
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise RecipeError(f"'{field.name}' must be {expected}, got {brief(value)}.")
        if isinstance(value, str) and "\0" in value:
            raise RecipeError(f"'{field.name}' holds a NUL character, which no name or text has.")
        words = typing.get_args(hint) if typing.get_origin(hint) is Literal else (value,)
        if value not in words:
            raise RecipeError(f"'{field.name}' must be one of {', '.join(words)}, got '{value}'.")


def _plain_types(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) is Literal:
        return (str,)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _plain_types(part))
    return (int, float) if hint is float else (hint,)


def _check_choices(recipe: "Recipe") -> None:
    if recipe.layers is not None and recipe.remove is not None:
        raise RecipeError("give either the number of layers or which to remove, not both.")
    _check_iterative(recipe)
    _check_export(recipe)
    _check_engine(recipe)
    _check_contest(recipe)


def _check_export(recipe: "Recipe") -> None:
    """Refuse a form that a repair cannot be written in; the message names repairs that can."""
    export, repair, form = recipe.export, recipe.repair, recipe.method.form
    if export == "fold" and form != "fold":
        raise RecipeError(
            f"--export fold: repair '{repair}' is a map of the stream and folds into no existing "
            "weight. Those that fold: refit:3:ridge=auto (nearest to ghost), refit:k, replaceme, "
            "magnitude."
        )
    if export == "stock-layer" and form != "norm map":
        raise RecipeError(
            f"--export stock-layer: repair '{repair}' cannot be written as an ordinary decoder "
            "layer. The one that can: normed."
        )
    if export == "custom" and form == "fold":
        raise RecipeError(
            f"--export custom: repair '{repair}' folds into existing weights, so that nothing is "
            "left for custom code to do. Use --export fold; or ghost, normed, piecewise."
        )


def _check_engine(recipe: "Recipe") -> None:
    """Refuse a repair that what must load the result has no place for."""
    stock = recipe.method.form == "fold" or recipe.export == "stock-layer"
    if recipe.engine == "llama.cpp" and not stock:
        raise RecipeError(
            f"--for llama.cpp: repair '{recipe.repair}' adds an operator, which llama.cpp has no "
            "place for. Take --repair auto, or one that folds: refit:3:ridge=auto (nearest to "
            "ghost), replaceme, magnitude, none."
        )


def _check_contest(recipe: "Recipe") -> None:
    """Refuse what leaves ``auto`` no choice, or asks it for what it cannot choose."""
    if not recipe.contested:
        if recipe.overhead is not None:
            raise RecipeError(
                f"'overhead' is for repair 'auto', but the repair is '{recipe.repair}'; drop one."
            )
        return
    read_share("overhead", recipe.overhead or "0")
    if recipe.export not in ("auto", "fold"):
        raise RecipeError(
            f"--repair auto may choose a repair that folds, or none, which --export "
            f"{recipe.export} is not for. Leave --export out, or name the repair."
        )
    if recipe.refit == "none":
        raise RecipeError(
            "refit 'none' keeps the repairs that are fitted while layers are chosen, so 'auto' "
            "has nothing left to choose. Name a repair, or take refit 'all'."
        )
    if recipe.iterative and recipe.selection.scores_only_weights:
        raise RecipeError(
            f"'{recipe.select}' scores the weights that each repair leaves, so that it cannot be "
            "iterated before a repair is chosen. Name one instead of 'auto'."
        )


_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%?)")


def read_share(name: str, given: str) -> float:
    """A share such as ``2%`` or ``0.02``, between 0 and 1.

    Raises:
        RecipeError: it is none; names the field.
    """
    match = _SHARE.fullmatch(given.strip())
    share = math.nan if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0 <= share <= 1:
        raise RecipeError(
            f"'{name}' must be a share such as 2% or 0.02, from 0 to 1, got '{given[:60]}'."
        )
    return share


def _unmoved_score(choice: Selection, method: RepairMethod) -> str:
    """Why every step of an iterated selection would find the same scores; empty if it would not."""
    if choice.scores_only_weights and not method.writes_weights:
        return (
            "it scores weights alone, and that repair changes none that stay, so that every step "
            "would rank the layers as the first did. Take --repair magnitude, replaceme or "
            "refit:k, another selection, or leave out 'iterative'."
        )
    return ""


def _check_iterative(recipe: "Recipe") -> None:
    choice, method = recipe.selection, recipe.method
    if recipe.refit == "none" and not recipe.iterative:
        raise RecipeError(
            "refit 'none' says what an iterated choice does with its repairs, but nothing is "
            "iterated: add 'iterative', or leave it out."
        )
    if recipe.refit == "none" and not (method.stacks or method.name == "none"):
        raise RecipeError(
            "refit 'none' leaves each removed layer its own repair, and those of "
            f"'{recipe.repair}' cannot stand one behind the other where neighbouring layers go. "
            "Take magnitude, linearpatch-diag, linearpatch-hadamard or ghost, or refit 'all'."
        )
    if not recipe.iterative:
        return
    if recipe.remove is not None:
        raise RecipeError(
            "'iterative' chooses layers one at a time, but 'remove' names them all; drop one of "
            "the two."
        )
    unmoved = _unmoved_score(choice, method)
    if unmoved:
        raise RecipeError(f"'{recipe.select}' cannot be iterated with '{recipe.repair}': {unmoved}")
    if choice.not_iterated:
        raise RecipeError(
            f"'{recipe.select}' cannot be combined with 'iterative': {choice.not_iterated}. Drop "
            "'iterative', or take shortgpt, streamline, angular, recoverable, perplexity:one-shot, "
            "taylor or magnitude."
        )


_POSITIVE = ("windows", "fit_windows", "search_windows", "race_windows", "sequence_length")


def _check_numbers(recipe: "Recipe") -> None:
    for name in _POSITIVE:
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise RecipeError(f"'{name}' must be at least 1, got {value}.")
    for name in ("held_out_windows", "ridge", "absolute_ridge"):
        value = getattr(recipe, name)
        if value is not None and not value >= 0:
            raise RecipeError(f"'{name}' must not be negative, got {value}.")
    for name in ("ridge", "absolute_ridge"):
        if not getattr(recipe, name) < math.inf:
            raise RecipeError(f"'{name}' must be a finite number, got {getattr(recipe, name)}.")
    for name in ("layers", "held_out_windows", *_POSITIVE):
        value = getattr(recipe, name)
        if value is not None and value > MOST:
            raise RecipeError(f"'{name}' must be at most {MOST:,}, got {brief(value)}.")
    if recipe.keep_layers is not None:
        parse_keep(recipe.keep_layers)
    check_seed(recipe.seed)
    by_loss = "held-out losses" in recipe.selection.needs
    if by_loss and recipe.remove is None and recipe.num_held_out_windows < 1:
        raise RecipeError("'recoverable' measures losses: 'held_out_windows' must be at least 1.")
    if recipe.contested and recipe.num_held_out_windows < 1:
        raise RecipeError("'auto' measures losses: 'held_out_windows' must be at least 1.")
