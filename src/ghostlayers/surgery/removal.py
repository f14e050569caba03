"""Removing decoder layers and inserting repairs.

The given model is never changed. The pruned model is a new object that shares the surviving
weights, so that both together need hardly more memory than one.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostlayers import modeling
from ghostlayers.errors import InputError, UnsupportedModelError
from ghostlayers.model import multimodal, residency
from ghostlayers.model.agreement import check_agreement
from ghostlayers.model.configs import say_what_is, slice_config
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.families import Family, family_of
from ghostlayers.model.residency import execution_device
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.model.taps import attach_taps
from ghostlayers.repairs.base import Operator, Repair, rounded_once
from ghostlayers.spans import Span, check_layers, kept_layers, pruned_boundary
from ghostlayers.surgery.features import caught, reader, tap_places
from ghostlayers.surgery.folding import layer_weights, scaled_writes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_NUMBERS = ("layer_idx", "layer_id")
"""What modules call the number of their layer, which is their key in the attention cache."""


def prune_layers(
    model: DenseModel,
    spans: Sequence[Span],
    repairs: Mapping[Span, Repair] | None = None,
    *,
    folded: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Any:
    """A new model without the layers of the spans, repaired at the given gaps.

    Layer indices in the attention caches are renumbered, per-layer config lists sliced, and tied
    weights stay tied. Weights are shared with the given model, not copied, except those that a
    repair changes.

    Args:
        model: of a supported family; unchanged.
        spans: the layers to remove, in the model's own numbering.
        repairs: what to change at each gap. Where they all fold into existing weights, the result
            is a stock model.
        folded: changed parameters by layer, where they are known, instead of the repairs' folds.

    Raises:
        SpanError: the spans overlap, do not exist, or leave no layer.
        UnsupportedModelError: the family is not supported.
    """
    family = family_of(model.network)
    if spans:
        check_layers([layer for span in spans for layer in span.layers], model.num_layers)
    multimodal.check_spans(model.network, spans)
    repairs = dict(sorted((repairs or {}).items()))
    model.residency.release()
    pruned = share_weights(model.network)
    changed = _changed_weights(model, repairs, folded or {})
    for index, weights in changed.items():
        _replace_weights(find_decoder_layers(pruned)[index], weights)
    kept = kept_layers(spans, model.num_layers)
    _keep_layers(find_decoder_layers(pruned), kept)
    before = dict(vars(pruned.config))
    slice_config(pruned.config, kept)
    say_what_is(multimodal.whole_of(pruned))
    multimodal.adopt_config(pruned)
    _pass_on_lists(find_decoder_layers(pruned), before, pruned.config)
    if spans:
        check_agreement(pruned)
    operators = {
        span: repair.operator for span, repair in repairs.items() if repair.operator is not None
    }
    # A vision-language model has no place for operators in its checkpoint, as yet.
    hooked = operators if multimodal.whole_of(pruned) is not pruned else {}
    stored = {
        span: operator
        for span, operator in operators.items()
        if not operator.maps and span not in hooked
    }
    if stored:
        _insert_repairs(pruned, family, spans, stored)
    for span, operator in operators.items():
        if operator.maps or span in hooked:
            _hook_operator(model, pruned, spans, span, operator)
    return pruned


def check_cut(model: DenseModel, spans: Sequence[Span]) -> None:
    """Refuse a cut that a checkpoint could not hold, without computing anything.

    Raises:
        SpanError: see `prune_layers`.
        UnsupportedModelError: the same.
    """
    prune_layers(model, spans)


def loses_any_layer(model: DenseModel, behind: int = 0) -> bool:
    """Whether any layers can go: without its first one, every other layer has another number.

    Args:
        model: whose layers.
        behind: of those from this one on.
    """
    try:
        check_cut(model, (Span(behind, behind + 1),))
    except UnsupportedModelError:
        return False
    return True


def allowed_cuts(model: DenseModel, spans: Sequence[Span]) -> list[Span]:
    """Those of the spans that may go alone.

    Raises:
        UnsupportedModelError: none of them may.
    """
    if loses_any_layer(model):
        return list(spans)
    allowed, reason = [], None
    for span in spans:
        try:
            check_cut(model, (span,))
        except UnsupportedModelError as error:
            reason = error
        else:
            allowed.append(span)
    if not allowed and reason is not None:
        raise reason
    return allowed


def _changed_weights(
    model: DenseModel,
    repairs: Mapping[Span, Repair],
    folded: Mapping[int, Mapping[str, Tensor]],
) -> dict[int, dict[str, Tensor]]:
    """Changed parameters by layer of the original model: folds, and writes divided by scales."""
    changed: dict[int, dict[str, Tensor]] = {}
    for span, repair in repairs.items():
        changed.update(layer_weights(model, span, repair))
    for index, weights in folded.items():
        own = model.layer(index)
        changed[index] = {
            name: weight.to(own.get_parameter(name)) for name, weight in weights.items()
        }
    removed = {layer for span in repairs for layer in span.layers}
    scale = 1.0
    for index in range(model.num_layers):
        scale *= math.prod(repair.scale for span, repair in repairs.items() if span.stop == index)
        if scale != 1.0 and index not in removed:
            scaled = scaled_writes(model.anatomy, model.layer(index), scale)
            rounded = {
                name: rounded_once(weight, model.stored_dtype) for name, weight in scaled.items()
            }
            changed.setdefault(index, {}).update(rounded)
    return changed


def _replace_weights(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        module = layer.get_submodule(path)
        residency.keep(module)
        trains = module.get_parameter(leaf).requires_grad
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=trains))


def _hook_operator(
    model: DenseModel,
    pruned: "PreTrainedModel",
    spans: Sequence[Span],
    span: Span,
    operator: Operator,
) -> None:
    """Let an operator that no checkpoint can hold act in memory, through hooks."""
    layers = find_decoder_layers(pruned)
    boundary = pruned_boundary(span, spans)
    if boundary == 0:

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            fixed = operator.apply(stream, reader(model, stream, span, {}))
            return (
                ((fixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fixed})
            )

        layers[0].register_forward_pre_hook(enter, with_kwargs=True)
        return
    layer = layers[boundary - 1]
    taps = tap_places(model, operator.maps)
    attach_taps(layer, tuple(taps.values()))

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        del args
        stream = output[0] if isinstance(output, tuple) else output
        fixed = operator.apply(stream, reader(model, stream, span, caught(taps, stream)))
        return (fixed, *output[1:]) if isinstance(output, tuple) else fixed

    layer.register_forward_hook(leave)


def with_weights(network: "PreTrainedModel", weights: Mapping[str, Tensor]) -> Any:
    """A network that shares all weights with another but those of some names."""
    if not weights:
        return network
    other = share_weights(network)
    _replace_weights(other, weights)
    whole = multimodal.whole_of(other)
    if whole.config.tie_word_embeddings:
        whole.tie_weights()
    return other


def share_weights(network: "PreTrainedModel") -> Any:
    """A copy of a network's structure whose tensors are those of the original."""
    shared = [*network.parameters(), *network.buffers(), *residency.shared_maps(network)]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _keep_layers(layers: nn.ModuleList, kept: Sequence[int]) -> None:
    survivors = [layers[index] for index in kept]
    del layers[:]
    layers.extend(survivors)
    for new, (old, layer) in enumerate(zip(kept, layers, strict=True)):
        for module in layer.modules():
            for name in LAYER_NUMBERS:
                if getattr(module, name, None) == old:  # not where shared modules say -1
                    setattr(module, name, new)
    # Zamba 2: modules that several layers share keep a table of those layers.
    renumbered = {old: new for new, old in enumerate(kept)}
    shared: Any
    for shared in layers.modules():  # each once, also where layers share it
        if isinstance(getattr(shared, "layer_dic", None), dict):
            listed = [renumbered[old] for old in shared.layer_dic if old in renumbered]
            shared.layer_dic = {layer: place for place, layer in enumerate(listed)}


def _pass_on_lists(layers: nn.ModuleList, before: Mapping[str, Any], after: Any) -> None:
    """Give modules that remember a list of their config the rewritten one."""
    changes = [
        (old, getattr(after, name))
        for name, old in before.items()
        if isinstance(old, list) and old and getattr(after, name) != old
    ]
    for module in layers.modules():
        for name, value in list(vars(module).items()):
            for old, new in changes:
                if isinstance(value, list) and value == old:
                    setattr(module, name, new)


def _insert_repairs(
    model: "PreTrainedModel",
    family: Family,
    spans: Sequence[Span],
    operators: Mapping[Span, Operator],
) -> None:
    config_class, model_class, causal_lm_class = family.repaired_classes()
    boundaries = {pruned_boundary(span, spans): operator for span, operator in operators.items()}
    config: Any = model.config
    config.__class__ = config_class
    config.model_type = family.repaired_model_type
    config.repaired_boundaries = sorted(boundaries)
    config.repair_shapes = {
        str(boundary): {
            name: list(parameter.shape) for name, parameter in operator.parameters.items()
        }
        for boundary, operator in sorted(boundaries.items())
    }
    config.architectures = [causal_lm_class.__name__]
    with residency.without_hook(model):
        model.__class__ = causal_lm_class
    base: Any = getattr(model, modeling.child_of(model, family.model))
    with residency.without_hook(base):
        base.__class__ = model_class
    for boundary, operator in boundaries.items():
        index, place = modeling.repair_place(boundary)
        layer: Any = find_decoder_layers(model)[index]
        with residency.without_hook(layer):
            layer.__class__ = modeling.repaired_layer_class(type(layer))
        device = execution_device(layer)
        _check_operator(operator, model.config.hidden_size)
        stored = {
            name: nn.Parameter(
                value.to(device=device, dtype=model.dtype).contiguous(),
                requires_grad=next(layer.parameters()).requires_grad,
            )
            for name, value in operator.parameters.items()
        }
        modeling.add_repair(layer, place, stored, operator.eps)


def _check_operator(operator: Operator, hidden_size: int) -> None:
    for name, value in operator.parameters.items():
        if value.shape[-1] != hidden_size and name != "expand":
            raise InputError(
                f"a repair must act on {hidden_size} channels, got '{name}' of shape "
                f"{list(value.shape)}."
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"a repair must be finite, got NaN or infinity in '{name}'.")
