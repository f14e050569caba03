"""Whether a config describes a cut model: the model is built anew from it, and compared.

A checkpoint holds weights and a config; everything else about a layer (its kind, its window,
whether it rotates positions) is decided again when it is loaded. A family may decide that by the
index of the layer in a way that no table foresees. So the shell of the model is built again from
what the config file will say, without weights, and every layer has to be one that stayed.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.stream import find_decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = (bool, int, float, str, type(None))


TIES = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where a model keeps the names of weights that are one, numbers of layers among them."""


def check_agreement(model: "PreTrainedModel") -> None:
    """Refuse a model whose layers would come out differently when its checkpoint is loaded.

    Names of tied weights are taken over from the model that the config gives.

    Args:
        model: a stock model whose layers were removed and whose config was rewritten.

    Raises:
        UnsupportedModelError: the message names the first difference.
    """
    model = getattr(model, "text_part", model)  # the rest of a vision-language model stays
    try:
        rebuilt = _rebuild(model)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise _refusal(model, f"its config is refused then ({error})") from error
    mine, theirs = find_decoder_layers(model), find_decoder_layers(rebuilt)
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        difference = layer_difference(one, other)
        if difference:
            raise _refusal(model, f"layer {index} of those that stay would change: {difference}")
    modules = dict(rebuilt.named_modules())
    for path, module in model.named_modules():
        for name in TIES:
            if name in vars(module) and name in vars(modules[path]):
                setattr(module, name, vars(modules[path])[name])


def _rebuild(model: "PreTrainedModel") -> Any:
    config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
    with torch.device("meta"):
        return type(model)(config)


def _refusal(model: "PreTrainedModel", reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this cut of a model of type '{model.config.model_type}' could not be loaded again: "
        f"{reason}. Remove other layers, whole repetitions of the model's pattern for example."
    )


def layer_difference(one: nn.Module, other: nn.Module) -> str:
    """How two decoder layers differ, weights aside; empty if they do not."""
    if type(one) is not type(other):
        return f"{type(one).__name__} against {type(other).__name__}"
    shapes, others = _shapes(one), _shapes(other)
    if shapes != others:
        name = min(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        return f"'{name}' has shape {shapes.get(name)} against {others.get(name)}"
    modules = dict(other.named_modules())
    for path, module in one.named_modules():
        if path not in modules:
            return f"'{path}' is missing"
        values, known = _settings(module), _settings(modules[path])
        for name in sorted(values.keys() & known.keys()):
            if values[name] != known[name]:
                where = f"{path}.{name}" if path else name
                return f"'{where}' is {values[name]!r} against {known[name]!r}"
    return ""


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module remembers of its config: plain values, and lists and tables of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if _is_plain(value) and not name.startswith("_") and name != "training"
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in (*value.keys(), *value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)
