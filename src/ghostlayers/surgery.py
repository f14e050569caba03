"""Removing decoder layers and inserting repairs: the only file that changes a model.

The given model is never changed. The pruned model is a new object that shares the surviving
weights, so that both together need hardly more memory than one.
"""

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers import modeling
from ghostlayers.errors import InputError
from ghostlayers.families import FAMILIES, Family, find_family
from ghostlayers.spans import Span, check_layers, kept_layers, pruned_boundary
from ghostlayers.stream import find_decoder_layers


def family_of(model: Any) -> Family:
    """The family of a model, or a refusal that names the families that can be pruned.

    Raises:
        UnsupportedModelError: layers of this family cannot be removed correctly.
    """
    return find_family(model.config.model_type)


def prune_layers(
    model: Any, spans: Sequence[Span], deltas: Mapping[Span, Tensor] | None = None
) -> Any:
    """A new model without the layers of the spans, repaired by x -> x + x M at the given gaps.

    Layer indices in the attention caches are renumbered, per-layer config lists sliced, and tied
    weights stay tied. Weights are shared with the given model, not copied.

    Args:
        model: a causal language model of a supported family; unchanged.
        spans: the layers to remove, in the model's own numbering.
        deltas: M, [hidden, hidden], acting on row vectors, for each repaired span. It is rounded
            once, to the model's dtype. Without any, the result is a stock model.

    Raises:
        SpanError: the spans overlap, do not exist, or leave no layer.
        UnsupportedModelError: the family is not supported.
    """
    family = family_of(model)
    layers = find_decoder_layers(model)
    if spans:
        check_layers([layer for span in spans for layer in span.layers], len(layers))
    pruned = share_weights(model)
    kept = kept_layers(spans, len(layers))
    _keep_layers(find_decoder_layers(pruned), kept)
    slice_config(pruned.config, family, kept)
    if deltas:
        _insert_repairs(pruned, family, spans, deltas)
    return pruned


def share_weights(model: Any) -> Any:
    """A copy of the model's structure whose tensors are those of the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _keep_layers(layers: nn.ModuleList, kept: Sequence[int]) -> None:
    survivors = [layers[index] for index in kept]
    del layers[:]
    layers.extend(survivors)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]  # the KV cache's key


def slice_config(config: Any, family: Family, kept: Sequence[int]) -> None:
    """Make a config describe the surviving layers, its per-layer lists explicit."""
    for name in family.per_layer_lists:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _insert_repairs(
    model: Any, family: Family, spans: Sequence[Span], deltas: Mapping[Span, Tensor]
) -> None:
    config_class, layer_class, model_class, causal_lm_class = repaired_family(family)
    boundaries = {pruned_boundary(span, spans): delta for span, delta in deltas.items()}
    model.config.__class__ = config_class
    model.config.model_type = family.repaired_model_type
    model.config.repaired_boundaries = sorted(boundaries)
    model.config.architectures = [causal_lm_class.__name__]
    model.__class__ = causal_lm_class
    model.base_model.__class__ = model_class
    for boundary, delta in boundaries.items():
        index, name = modeling.repair_place(boundary)
        layer = find_decoder_layers(model)[index]
        layer.__class__ = layer_class
        weight = next(layer.parameters())
        _check_delta(delta, model.config.hidden_size)
        stored = delta.T.to(device=weight.device, dtype=weight.dtype).contiguous()
        layer.register_parameter(name, nn.Parameter(stored, requires_grad=weight.requires_grad))


def _check_delta(delta: Tensor, hidden_size: int) -> None:
    if tuple(delta.shape) != (hidden_size, hidden_size) or not bool(torch.isfinite(delta).all()):
        raise InputError(
            f"a repair must be a finite [{hidden_size}, {hidden_size}] matrix, "
            f"got shape {list(delta.shape)}."
        )


def repaired_family(family: Family) -> tuple[type, type, type, type]:
    """The repaired config, decoder layer, base model and causal model of a family.

    They are made once a process and found again as attributes of this package's
    ``modeling`` module, so that copying and saving find them by name.
    """
    name = f"Repaired{family.causal_lm}"
    home = sys.modules[modeling.__name__]
    if not hasattr(home, name):
        package = f"transformers.models.{family.package}"
        configs = importlib.import_module(f"{package}.configuration_{family.package}")
        models = importlib.import_module(f"{package}.modeling_{family.package}")
        classes = modeling.repaired_classes(
            family.repaired_model_type,
            getattr(configs, family.config),
            getattr(models, family.layer),
            getattr(models, family.model),
            getattr(models, family.causal_lm),
            modeling.__name__,
        )
        for made in classes:
            setattr(home, made.__name__, made)
    names = (family.config, family.layer, family.model, family.causal_lm)
    config, layer, model, causal_lm = (getattr(home, f"Repaired{each}") for each in names)
    return config, layer, model, causal_lm


def register_auto_classes() -> None:
    """Tell transformers' Auto classes about every repaired family; safe to call again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for family in FAMILIES.values():
        config, _, model, causal_lm = repaired_family(family)
        AutoConfig.register(family.repaired_model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
