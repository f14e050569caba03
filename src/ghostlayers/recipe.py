"""What to do (`Recipe`) and how to do it (`RunOptions`).

A recipe determines the result; run options change it by rounding at most.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.presets import find_preset
from ghostlayers.repairs import REPAIR_REGISTRY, RepairMethod, find_method
from ghostlayers.runtime.documents import brief
from ghostlayers.selection.choices import Selection, find_selection, parse_keep
from ghostlayers.selection.cosine import CosineAxis
from ghostlayers.selection.methods import SELECTION_REGISTRY
from ghostlayers.spans import parse_layers
from ghostlayers.text.tokens import BosPolicy, Sampling

Inputs = Literal["repaired", "original"]
Refit = Literal["all", "none"]
Export = Literal["auto", "fold", "stock-layer", "custom"]
Save = Literal["checkpoint", "adapter"]
Offload = Literal["auto", "none", "cpu", "disk"]
TokenWeight = Literal["auto", "uniform", "balanced", "relative"]


CHOOSING = frozenset(
    {"select", "iterative", "refit", "keep_layers", "cosine_axis", "search_windows"}
)
"""Fields that say how layers are chosen."""

RACE_BUDGET = 4
RACE_WINDOWS = 32
"""Held-out windows that a race may use: so many times those of the losses, and at least so many.

Eight still take the wrong one of two close spans, 0.2 nats apart on other text
(``benchmarks/regret.py``); most candidates leave after the first four."""


@dataclass(frozen=True)
class Recipe:
    r"""What is removed, how it is repaired, and on what text.

    Attributes:
        layers: how many decoder layers to remove.
        remove: which to remove instead, such as ``10-12,14``.
        select: how to choose them: a name, or an object such as ``Recoverable(greedy=True)``.
        iterative: choose one layer at a time, each on the model that is repaired so far.
        refit: what an iterated choice does with its repairs: ``all`` fits every gap anew after each
            layer, to the dense model's stream; ``none`` fits one repair across the layer that goes,
            in the model as it is then, and leaves it alone (Prune&Comp, arXiv:2507.18212).
        repair: how to repair each gap: a name, or an object such as ``Ghost(rank=64)``, whose text
            is what the recipe holds.
        data: named corpus, file or folder; None for documents given in memory.
        text_column: the column that holds the text.
        separator: joins the documents.
        sampling: how windows are drawn: from a ``grid`` over the joined documents, at ``random``
            offsets in them, or each from a ``single-document`` (`tokens.draw_windows`).
        windows: calibration windows for the scores.
        fit_windows: calibration windows that the repair is fitted on, from the same first one on;
            32, or as many as ``windows`` if these are fewer.
        search_windows: calibration windows that ``perplexity``, ``taylor`` and
            ``recoverable:greedy`` measure on; 8, or as many as ``windows`` if these are fewer.
        held_out_windows: further windows, for losses; one for every sixteen windows, at least 4.
        race_windows: held-out windows that ``recoverable`` may measure on in all, as far as the
            text goes, before the lowest loss wins; four times ``held_out_windows``, at least 32.
        sequence_length: tokens a window.
        bos: whether windows start with a beginning-of-sequence token.
        seed: chooses the windows.
        cosine_axis: of the cosine criteria; ``tokens`` reproduces the released code.
        keep_layers: layers that are never removed, such as ``first:4,last:2``; None for what the
            selection's own paper protects.
        inputs: the stream each gap is fitted on: the ``repaired`` one that it will receive, or
            the ``original`` one of the dense model, as published.
        token_weight: how much each token counts in a fit: ``uniform`` as published, ``relative``
            1/||y||^2, ``balanced`` 1/||y||; ``auto`` is what suits the repair.
        ridge: relative ridge on equilibrated columns.
        absolute_ridge: added to the Gram matrix as it is, as published.
        preset: the method whose choices these are, but for those that were given otherwise; see
            `from_dict`.
        export: in what form the checkpoint holds the repair: ``fold`` into existing weights,
            ``stock-layer`` as one ordinary decoder layer, ``custom`` as an operator with its code;
            ``auto`` takes the first that is exact and costs nothing beside the repair itself.
    """

    layers: int | None = None
    remove: str | None = None
    select: str = "recoverable"
    iterative: bool = False
    refit: Refit = "all"
    repair: str = "ghost"
    data: str | None = None
    text_column: str | None = None
    separator: str = "\n\n"
    sampling: Sampling = "grid"
    windows: int = 128
    fit_windows: int | None = None
    search_windows: int | None = None
    held_out_windows: int | None = None
    race_windows: int | None = None
    sequence_length: int = 2048
    bos: BosPolicy = "auto"
    seed: int = 0
    cosine_axis: CosineAxis = "hidden"
    keep_layers: str | None = None
    inputs: Inputs = "repaired"
    token_weight: TokenWeight = "auto"
    ridge: float = 1e-6
    absolute_ridge: float = 0.0
    export: Export = "auto"
    preset: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "select", SELECTION_REGISTRY.text_of(self.select))
        object.__setattr__(self, "repair", REPAIR_REGISTRY.text_of(self.repair))
        _check_types(self)
        if self.preset is not None:
            find_preset(self.preset)
        _check_choices(self)
        _check_numbers(self)

    @property
    def num_calibration_windows(self) -> int:
        """Windows that are scored, fitted or searched on, which all begin with the first."""
        return max(self.windows, self.num_fit_windows, self.num_search_windows)

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

    @property
    def num_race_windows(self) -> int:
        """Held-out windows that candidates may be measured on, those of the losses included."""
        choice = find_selection(self.select)
        if self.remove is not None or "held-out losses" not in choice.needs:
            return self.num_held_out_windows
        if self.race_windows is not None:
            return max(self.race_windows, self.num_held_out_windows)
        return max(RACE_WINDOWS, RACE_BUDGET * self.num_held_out_windows)

    @property
    def kept_edges(self) -> tuple[int, int] | None:
        """Layers at the start and at the end that are never removed; None for the method's own."""
        return None if self.keep_layers is None else parse_keep(self.keep_layers)

    def removed(self) -> list[int] | None:
        """The layers named by the caller, if any."""
        return None if self.remove is None else parse_layers(self.remove)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from a mapping such as a YAML file's; a ``preset`` fills in what is not given.

        Raises:
            RecipeError: an unknown key or preset; the message names near ones.
        """
        if values.get("preset") is not None:
            preset = find_preset(values["preset"])
            chosen = dict(preset.choices)
            if values.get("remove") is not None or values.get("iterative") is False:
                for key in ("iterative", "refit"):
                    chosen.pop(key, None)
            if values.get("remove") is not None:  # nothing is chosen
                chosen = {key: value for key, value in chosen.items() if key not in CHOOSING}
            values = {**chosen, **values, "preset": preset.name}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise RecipeError(f"unknown key '{key}' in a recipe. {suggest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunOptions:
    """How to run: nothing here changes a result beyond rounding.

    Attributes:
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``. ``auto`` computes in the type of
            the checkpoint, or on a processor that is slow at it, in float32.
        preset: with dtype ``auto``, the type of this method's code instead of the checkpoint's.
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
    preset: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.batch_size <= MOST:
            raise RecipeError(
                f"'batch_size' must lie between 0 and {MOST:,}, got {brief(self.batch_size)}."
            )


def _check_types(recipe: Recipe) -> None:
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        allowed = _plain_types(hints[field.name])
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            expected = " or ".join(each.__name__ for each in allowed)
            raise RecipeError(f"'{field.name}' must be {expected}, got {brief(value)}.")
        if isinstance(value, str) and "\0" in value:
            raise RecipeError(f"'{field.name}' holds a NUL character, which no name or text has.")


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
        "refit": Refit,
        "sampling": Sampling,
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


def unmoved_score(choice: Selection, method: RepairMethod) -> str:
    """Why every step of an iterated selection would find the same scores; empty if it would not."""
    if choice.scores_only_weights and not method.writes_weights:
        return (
            "it scores weights alone, and that repair changes none that stay, so that every step "
            "would rank the layers as the first did. Take --repair magnitude, replaceme or "
            "refit:k, another selection, or leave out 'iterative'."
        )
    return ""


def _check_iterative(recipe: Recipe) -> None:
    choice, method = find_selection(recipe.select), find_method(recipe.repair)
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
    unmoved = unmoved_score(choice, method)
    if unmoved:
        raise RecipeError(f"'{recipe.select}' cannot be iterated with '{recipe.repair}': {unmoved}")
    if choice.not_iterated:
        raise RecipeError(
            f"'{recipe.select}' cannot be combined with 'iterative': {choice.not_iterated}. Drop "
            "'iterative', or take shortgpt, streamline, angular, recoverable, perplexity:one-shot, "
            "taylor or magnitude."
        )


MOST = 10**9
"""Of what is counted: more is a slip, and overflows what counts it further on."""

_COUNTS = (
    *("windows", "fit_windows", "search_windows", "held_out_windows", "race_windows"),
    "sequence_length",
)


def _check_numbers(recipe: Recipe) -> None:
    for name in ("windows", "fit_windows", "search_windows", "race_windows", "sequence_length"):
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
    for name in ("layers", *_COUNTS):
        value = getattr(recipe, name)
        if value is not None and value > MOST:
            raise RecipeError(f"'{name}' must be at most {MOST:,}, got {brief(value)}.")
    if recipe.keep_layers is not None:
        parse_keep(recipe.keep_layers)
    if not 0 <= recipe.seed < 2**63:
        raise RecipeError(f"'seed' must lie in [0, 2**63), got {brief(recipe.seed)}.")
    by_loss = "held-out losses" in find_selection(recipe.select).needs
    if by_loss and recipe.remove is None and recipe.num_held_out_windows < 1:
        raise RecipeError("'recoverable' measures losses: 'held_out_windows' must be at least 1.")
