"""The weights of a kept layer after repairs were folded into them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.model.anatomy import Anatomy, is_transposed, mapped_writers, writers
from ghostlayers.model.dense import DenseModel
from ghostlayers.repairs.base import Fold, Repair, rounded_once
from ghostlayers.spans import Span


def folded_weights(
    anatomy: Anatomy, layer: nn.Module, folds: Iterable[Fold], stored_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Changed parameters of a layer by name, in its own type, rounded once to the stored one."""
    if anatomy.experts:
        total = torch.stack([fold.delta for fold in folds]).sum(dim=0)
        mapped = mapped_writers(anatomy, layer, total / anatomy.write_scale)
        return {n: rounded_once(weight, stored_dtype) for n, weight in mapped.items()}
    deltas: dict[str, Tensor] = {}
    for fold in folds:
        path = anatomy.mlp_output
        delta = fold.delta / anatomy.write_scale
        transposed = is_transposed(layer.get_submodule(path))
        _add(deltas, f"{path}.weight", delta if transposed else delta.T)
        if fold.bias is not None:
            _add(deltas, f"{path}.bias", fold.bias / anatomy.write_scale)
        if fold.gain is not None:
            assert anatomy.mlp_post_norm is not None
            name = f"{anatomy.mlp_post_norm}.weight"
            gain = layer.get_parameter(name).detach()
            _add(deltas, name, fold.gain - anatomy.gain_offset - gain.to(fold.gain))
    changed = {}
    for name, delta in deltas.items():
        own = layer.get_parameter(name).detach()
        whole = own.double() + delta.to(own.device)
        changed[name] = rounded_once(whole, stored_dtype).to(own.dtype)
    return changed


def _add(deltas: dict[str, Tensor], name: str, delta: Tensor) -> None:
    deltas[name] = deltas[name] + delta if name in deltas else delta


def layer_weights(model: DenseModel, span: Span, repair: Repair) -> dict[int, dict[str, Tensor]]:
    """Changed parameters of the kept layers before one gap, by layer of the original model."""
    if not repair.folds:
        return {}
    changed = {}
    for back in sorted({fold.layers_back for fold in repair.folds}):
        folds = [fold for fold in repair.folds if fold.layers_back == back]
        index = span.start - back
        layer = model.layer(index)
        changed[index] = folded_weights(model.anatomy, layer, folds, model.stored_dtype)
    return changed


def scaled_writes(anatomy: Anatomy, layer: nn.Module, scale: float) -> dict[str, Tensor]:
    """Parameters of a layer whose writes into the stream are divided by a scale."""
    if anatomy.post_norms:  # the norm in front of the stream has the last word
        return {
            f"{path}.weight": _scale_gain(layer, f"{path}.weight", scale, anatomy.gain_offset)
            for path in anatomy.post_norms
        }
    changed, paths = {}, [anatomy.attention_output]
    if anatomy.experts:
        changed = {n: weight / scale for n, weight in writers(layer).items()}
    else:
        paths.append(anatomy.mlp_output)
    for path in paths:
        assert path is not None
        projection: Any = layer.get_submodule(path)
        changed[f"{path}.weight"] = projection.weight.detach() / scale
        if projection.bias is not None:
            changed[f"{path}.bias"] = projection.bias.detach() / scale
    return changed


def _scale_gain(layer: nn.Module, name: str, scale: float, offset: float) -> Tensor:
    stored: Tensor = layer.get_parameter(name).detach()
    return (offset + stored) / scale - offset
