"""What to do (`Recipe`) and how to do it (`RunOptions`).

A recipe determines the result; run options change it by rounding at most.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.repairs import find_method
from ghostlayers.scores.cosine import CosineAxis
from ghostlayers.selection import Edges, find_selection
from ghostlayers.spans import parse_layers
from ghostlayers.tokens import BosPolicy

Inputs = Literal["repaired", "original"]
Export = Literal["auto", "fold", "stock-layer", "custom"]
Save = Literal["checkpoint", "adapter"]
Offload = Literal["auto", "none", "cpu", "disk"]
TokenWeight = Literal["auto", "uniform", "balanced", "relative"]


@dataclass(frozen=True)
class Recipe:
    r"""What is removed, how it is repaired, and on what text.

    Attributes:
        layers: how many decoder layers to remove.
        remove: which to remove instead, such as ``10-12,14``.
        select: how to choose them.
        iterative: choose one layer at a time, each on the model that is repaired so far.
        repair: how to repair each gap.
        data: named corpus, file or folder; None for documents given in memory.
        text_column: the column that holds the text.
        separator: joins the documents.
        windows: calibration windows for the scores.
        fit_windows: how many of them the repair is fitted on; 32, or all if there are fewer.
        search_windows: how many of the calibration windows ``perplexity``, ``taylor`` and
            ``recoverable:greedy`` measure on; 8, or all if there are fewer.
        held_out_windows: further windows, for losses; one for every sixteen windows, at least 4.
        sequence_length: tokens a window.
        bos: whether windows start with a beginning-of-sequence token.
        seed: chooses the windows.
        cosine_axis: of the cosine criteria; ``tokens`` reproduces the released code.
        edges: ``protect`` never removes the first and the last layer, as the released code.
        inputs: the stream each gap is fitted on: the ``repaired`` one that it will receive, or
            the ``original`` one of the dense model, as published.
        token_weight: how much each token counts in a fit: ``uniform`` as published, ``relative``
            1/||y||^2, ``balanced`` 1/||y||; ``auto`` is what suits the repair.
        ridge: relative ridge on equilibrated columns.
        absolute_ridge: added to the Gram matrix as it is, as published.
        export: in what form the checkpoint holds the repair: ``fold`` into existing weights,
            ``stock-layer`` as one ordinary decoder layer, ``custom`` as an operator with its code;
            ``auto`` takes the first that is exact and costs nothing beside the repair itself.
    """

    layers: int | None = None
    remove: str | None = None
    select: str = "recoverable"
    iterative: bool = False
    repair: str = "ghost"
    data: str | None = None
    text_column: str | None = None
    separator: str = "\n\n"
    windows: int = 128
    fit_windows: int | None = None
    search_windows: int | None = None
    held_out_windows: int | None = None
    sequence_length: int = 2048
    bos: BosPolicy = "auto"
    seed: int = 0
    cosine_axis: CosineAxis = "hidden"
    edges: Edges = "allow"
    inputs: Inputs = "repaired"
    token_weight: TokenWeight = "auto"
    ridge: float = 1e-6
    absolute_ridge: float = 0.0
    export: Export = "auto"

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        _check_numbers(self)

    @property
    def num_fit_windows(self) -> int:
        """Windows that the repair is fitted on."""
        return min(32, self.windows) if self.fit_windows is None else self.fit_windows

    @property
    def num_search_windows(self) -> int:
        """Calibration windows that searches measure losses and gradients on."""
        return min(8, self.windows) if self.search_windows is None else self.search_windows

    @property
    def num_held_out_windows(self) -> int:
        """Windows that losses are measured on."""
        if self.held_out_windows is None:
            return max(4, self.windows // 16)
        return self.held_out_windows

    def removed(self) -> list[int] | None:
        """The layers named by the caller, if any."""
        return None if self.remove is None else parse_layers(self.remove)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from a mapping such as a YAML file's.

        Raises:
            RecipeError: an unknown key; the message names near ones.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise RecipeError(f"unknown key '{key}' in a recipe. {suggest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "select": "streamline",
        "repair": "ghost",
        "cosine_axis": "tokens",
        "edges": "protect",
        "inputs": "original",
        "token_weight": "uniform",
        "ridge": 0.0,
        "absolute_ridge": 1e-6,
        "windows": 128,
        "fit_windows": 32,
        "sequence_length": 2048,
        "data": "c4",
    }
}
"""All choices of a publication at once. Explicit choices still win."""


@dataclass(frozen=True)
class RunOptions:
    """How to run: nothing here changes a result beyond rounding.

    Attributes:
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``. ``auto`` computes in the type of
            the checkpoint, or on a processor that is slow at it, in float32.
        device: where to compute; ``auto`` takes an accelerator if there is one.
        batch_size: windows at a time; 0 chooses.
        trust_remote_code: let a model's own code run.
        offload: where decoder layers lie while they are not needed: ``disk``, ``cpu`` (beside an
            accelerator), ``none``, or ``auto``: elsewhere only if they do not fit.
        max_memory: how much the process may hold where it computes, such as ``4GiB``; None for what
            is free.
    """

    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 0
    trust_remote_code: bool = False
    offload: Offload = "auto"
    max_memory: str | None = None


def _check_types(recipe: Recipe) -> None:
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        allowed = _plain_types(hints[field.name])
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            expected = " or ".join(each.__name__ for each in allowed)
            raise RecipeError(f"'{field.name}' must be {expected}, got {value!r}.")


def _plain_types(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) is Literal:
        return (str,)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(each for part in typing.get_args(hint) for each in _plain_types(part))
    return (int, float) if hint is float else (hint,)


def _check_choices(recipe: Recipe) -> None:
    if recipe.layers is not None and recipe.remove is not None:
        raise RecipeError("give either the number of layers or which to remove, not both.")
    _check_iterative(recipe)
    check_export(recipe.export, recipe.repair)
    choices = {
        "cosine_axis": CosineAxis,
        "edges": Edges,
        "inputs": Inputs,
        "token_weight": TokenWeight,
        "bos": BosPolicy,
        "export": Export,
    }
    for name, kind in choices.items():
        value, allowed = getattr(recipe, name), typing.get_args(kind)
        if value not in allowed:
            raise RecipeError(f"'{name}' must be one of {', '.join(allowed)}, got '{value}'.")


def check_export(export: str, repair: str) -> None:
    """Refuse a form that a repair cannot be written in; the message names repairs that can.

    Raises:
        RecipeError: the two do not go together.
    """
    form = find_method(repair).form
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


def _check_iterative(recipe: Recipe) -> None:
    choice = find_selection(recipe.select)
    if not recipe.iterative:
        return
    if recipe.remove is not None:
        raise RecipeError(
            "'iterative' chooses layers one at a time, but 'remove' names them all; drop one of "
            "the two."
        )
    if choice.not_iterated:
        raise RecipeError(
            f"'{recipe.select}' cannot be combined with 'iterative': {choice.not_iterated}. Drop "
            "'iterative', or take shortgpt, streamline, angular, recoverable, perplexity:one-shot, "
            "taylor or magnitude."
        )


def _check_numbers(recipe: Recipe) -> None:
    for name in ("windows", "fit_windows", "search_windows", "sequence_length"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise RecipeError(f"'{name}' must be at least 1, got {value}.")
    for name in ("held_out_windows", "ridge", "absolute_ridge"):
        value = getattr(recipe, name)
        if value is not None and not value >= 0:
            raise RecipeError(f"'{name}' must not be negative, got {value}.")
    if not 0 <= recipe.seed < 2**63:
        raise RecipeError(f"'seed' must lie in [0, 2**63), got {recipe.seed}.")
    for name in ("fit_windows", "search_windows"):
        value = getattr(recipe, name)
        if value is not None and value > recipe.windows:
            raise RecipeError(f"'{name}' ({value}) must not exceed 'windows' ({recipe.windows}).")
    by_loss = "held-out losses" in find_selection(recipe.select).selection.needs
    if by_loss and recipe.remove is None and recipe.num_held_out_windows < 1:
        raise RecipeError("'recoverable' measures losses: 'held_out_windows' must be at least 1.")
