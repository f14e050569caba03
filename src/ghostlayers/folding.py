"""The weights of a kept layer after repairs were folded into them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.families import FAMILIES, Family
from ghostlayers.repairs.base import Fold, Repair
from ghostlayers.spans import Span


def folded_weights(
    family: Family, layer: Any, folds: Iterable[Fold], stored_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Changed parameters of a layer by name, in its own type, rounded once to the stored one."""
    deltas: dict[str, Tensor] = {}
    for fold in folds:
        path = family.mlp_output if fold.place == "mlp_output" else family.attention_output
        _add(deltas, f"{path}.weight", fold.delta.T)
        if fold.bias is not None:
            _add(deltas, f"{path}.bias", fold.bias)
    changed = {}
    for name, delta in deltas.items():
        own = layer.get_parameter(name).detach()
        whole = own.double() + delta.to(own.device)
        changed[name] = whole.to(stored_dtype).to(own.dtype)
    return changed


def _add(deltas: dict[str, Tensor], name: str, delta: Tensor) -> None:
    deltas[name] = deltas[name] + delta if name in deltas else delta


def layer_weights(
    model: Any, layers: Any, span: Span, repair: Repair, stored_dtype: torch.dtype
) -> dict[int, dict[str, Tensor]]:
    """Changed parameters of the kept layers before one gap, by layer of the original model."""
    if not repair.folds:
        return {}
    family = FAMILIES[model.config.model_type]
    changed = {}
    for back in sorted({fold.layers_back for fold in repair.folds}):
        folds = [fold for fold in repair.folds if fold.layers_back == back]
        index = span.start - back
        changed[index] = folded_weights(family, layers[index], folds, stored_dtype)
    return changed


def scaled_writes(family: Family, layer: Any, scale: float) -> dict[str, Tensor]:
    """Parameters of a layer whose writes into the stream are divided by a scale.

    Raises:
        UnsupportedModelError: the family writes through something else.
    """
    if family.post_norms:  # the norm in front of the stream has the last word
        return {
            f"{path}.weight": _scale_gain(layer, f"{path}.weight", scale, family.gain_offset)
            for path in family.post_norms
        }
    changed = {}
    for path in (family.attention_output, family.mlp_output):
        projection = layer.get_submodule(path)
        if not hasattr(projection, "weight"):
            raise UnsupportedModelError(f"'{path}' of this model holds no weight to scale.")
        changed[f"{path}.weight"] = projection.weight.detach() / scale
        if projection.bias is not None:
            changed[f"{path}.bias"] = projection.bias.detach() / scale
    return changed


def _scale_gain(layer: Any, name: str, scale: float, offset: float) -> Tensor:
    stored: Tensor = layer.get_parameter(name).detach()
    return (offset + stored) / scale - offset
