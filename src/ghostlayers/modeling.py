"""Decoder layers that carry a boundary repair, for transformers' Auto classes.

A repair acts on the residual stream where decoder layers were removed: x -> x + x M. It lives
inside the decoder layer before (or, at the very start, after) the gap, as one bare parameter. This
file needs torch and transformers only, because a copy of it travels inside every repaired
checkpoint.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def repair_stream(
    stream: torch.Tensor, parameters: Mapping[str, torch.Tensor], eps: float
) -> torch.Tensor:
    """The repaired stream: x plus the terms whose parameters are given.

    Args:
        stream: x, [..., hidden].
        parameters: ``weight`` (M transposed, as `F.linear` wants it) and ``bias``; ``reduce`` and
            ``expand`` (a map of low rank); ``normed`` (a map of x / rms(x)); ``centroids``
            [pieces, hidden] and ``pieces`` [pieces, hidden, hidden] (the map of the nearest).
        eps: of the norm.
    """
    repaired = stream
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is not None:
        repaired = repaired + F.linear(stream, weight, bias)
    elif bias is not None:
        repaired = repaired + bias
    if "reduce" in parameters:
        repaired = repaired + F.linear(F.linear(stream, parameters["reduce"]), parameters["expand"])
    if "normed" in parameters:
        repaired = repaired + F.linear(unit_rms(stream, eps), parameters["normed"])
    if "pieces" in parameters:
        repaired = repaired + nearest_piece(stream, parameters["centroids"], parameters["pieces"])
    return repaired


def unit_rms(stream: torch.Tensor, eps: float) -> torch.Tensor:
    """X / rms(x), without gains, computed in float32 as the families' norms do."""
    wide = stream.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return scaled.to(stream.dtype)


def nearest_piece(
    stream: torch.Tensor, centroids: torch.Tensor, pieces: torch.Tensor
) -> torch.Tensor:
    """Each token times the map of the centroid nearest to its direction."""
    tokens = stream.reshape(-1, stream.shape[-1])
    nearest = F.linear(tokens, centroids).argmax(dim=-1)
    if tokens.shape[0] <= pieces.shape[0]:  # decoding: fetch each token's own map
        products = torch.bmm(pieces[nearest], tokens[:, :, None])[:, :, 0]
        return products.reshape(stream.shape)
    products = torch.empty_like(tokens)
    for index in range(pieces.shape[0]):
        members = nearest == index
        products[members] = F.linear(tokens[members], pieces[index])
    return products.reshape(stream.shape)


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The outermost list of so many modules in a model; None if there is none."""
    for _, module in model.named_modules():  # outer modules come before those inside them
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return None


def child_of(model: nn.Module, kind: type) -> str:
    """The name under which a causal language model holds its base model."""
    return next(name for name, child in model.named_children() if type(child) is kind)


def guarded_key(config_class: Any) -> str:
    """The entry of the config file that stands guard: no stock class can do without its number.

    It is the number of layers, except where a family counts the entries of a list instead.
    """
    counted = isinstance(getattr(config_class, "num_hidden_layers", None), property)
    name = "hidden_size" if counted else "num_hidden_layers"
    return str(getattr(config_class, "attribute_map", {}).get(name, name))


class RepairedConfigMixin:
    """A config that knows its repaired boundaries and that no other class can read by mistake.

    In the file, one number (see `guarded_key`) is an object instead. A loader that ignores the
    model type, such as the stock class called by name, then stops with an error instead of
    running the model without its repairs.
    """

    repaired_boundaries: list[int]
    repair_shapes: dict[str, dict[str, list[int]]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config from the dictionary in the file."""
        config_dict = dict(config_dict)
        key = guarded_key(cls)
        guard = config_dict.get(key)
        if isinstance(guard, dict):
            config_dict[key] = guard["value"]
            config_dict["repaired_boundaries"] = list(guard["repaired_boundaries"])
            config_dict["repair_shapes"] = dict(guard["repair_shapes"])
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        """Write the config as it stands in the file."""
        content = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        content.pop("repaired_boundaries", None)
        content.pop("repair_shapes", None)
        key = guarded_key(type(self))
        content[key] = {
            "value": getattr(self, key),
            "repaired_boundaries": list(getattr(self, "repaired_boundaries", [])),
            "repair_shapes": dict(getattr(self, "repair_shapes", {})),
            "note": "repaired by Ghostlayers: load with trust_remote_code=True, "
            "or import ghostlayers first",
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


class RepairedLayerMixin:
    """A decoder layer that may repair the stream before it, after it, or not at all.

    The parameters of `repair_stream` are bare parameters called ``repair_before_weight``,
    ``repair_after_bias`` and so on, so that quantisers and adapters, which take every
    ``nn.Linear``, leave them alone.
    """

    repair_eps: float = 1e-6

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the family's own layer between the repairs."""
        before, after = repairs_of(self, "repair_before"), repairs_of(self, "repair_after")
        if before:
            hidden_states = repair_stream(hidden_states, before, self.repair_eps)
        output = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if not after:
            return output
        stream = output[0] if isinstance(output, tuple) else output
        stream = repair_stream(stream, after, self.repair_eps)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream


def repairs_of(layer: Any, place: str) -> dict[str, torch.Tensor]:
    """The parameters of the repair at one place of a layer, by their names in `repair_stream`."""
    names = getattr(layer, f"{place}_names", ())
    return {name: getattr(layer, f"{place}_{name}") for name in names}


def add_repair(layer: Any, place: str, parameters: Mapping[str, nn.Parameter], eps: float) -> None:
    """Put the parameters of a repair into a layer of the repaired class."""
    for name, parameter in parameters.items():
        layer.register_parameter(f"{place}_{name}", parameter)
    setattr(layer, f"{place}_names", tuple(parameters))
    layer.repair_eps = eps


def norm_eps(config: Any) -> float:
    """The eps of a config's norms."""
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 1e-6


class RepairedInitMixin:
    """Refuses to make up a repair that a checkpoint should have held."""

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # As for the family's own class: of code from elsewhere, transformers expects that it would
        # overwrite loaded weights, and so leaves out buffers that no checkpoint holds.
        super()._initialize_weights(module)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if not getattr(module, "repair_comes_from_file", False):
            return
        for place in ("repair_before", "repair_after"):
            for name, repair in repairs_of(module, place).items():
                # What the file lacks is made before it is initialised; what is offloaded is not.
                made_up = not (repair.is_meta or getattr(repair, "_is_hf_initialized", False))
                if made_up:
                    raise RuntimeError(
                        f"the checkpoint lacks '{place}_{name}' of a repaired decoder layer: "
                        "expected the weights that Ghostlayers wrote. The folder is incomplete or "
                        "was edited; download it again, or make it again."
                    )


class RepairedModelMixin(RepairedInitMixin):
    """A base model whose layers next to a gap carry repairs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        layers = decoder_layers(self, config.num_hidden_layers)  # type: ignore[arg-type]
        assert layers is not None
        for boundary in getattr(config, "repaired_boundaries", []):
            index, place = repair_place(boundary)
            layer: Any = layers[index]
            layer.__class__ = repaired_layer_class(type(layer))
            like = next(layer.parameters())
            shapes = config.repair_shapes[str(boundary)]
            made = {n: nn.Parameter(like.new_zeros(shape)) for n, shape in shapes.items()}
            add_repair(layer, place, made, norm_eps(config))
            layer.repair_comes_from_file = like.is_meta  # so from_pretrained builds a model


class RepairedForCausalLMMixin(RepairedInitMixin):
    """A causal language model over a repaired base model."""

    stock_model_class: type[nn.Module]
    repaired_model_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        name = child_of(self, self.stock_model_class)  # type: ignore[arg-type]
        setattr(self, name, self.repaired_model_class(config))
        self.post_init()  # type: ignore[attr-defined]


def repair_place(boundary: int) -> tuple[int, str]:
    """The layer (in the pruned model) that carries the repair of a boundary, and the name in it."""
    return (boundary - 1, "repair_after") if boundary > 0 else (0, "repair_before")


_LAYER_CLASSES: dict[type, type] = {}


def repaired_layer_class(layer_class: type) -> type:
    """The same decoder layer with room for repairs; a class that has it already is left alone."""
    if issubclass(layer_class, RepairedLayerMixin):
        return layer_class
    if layer_class not in _LAYER_CLASSES:
        parents = (RepairedLayerMixin, layer_class)
        _LAYER_CLASSES[layer_class] = type(f"Repaired{layer_class.__name__}", parents, {})
    return _LAYER_CLASSES[layer_class]


def repaired_classes(
    model_type: str,
    config_class: Any,
    model_class: Any,
    causal_lm_class: Any,
    module: str,
) -> tuple[Any, Any, Any]:
    """Derive the classes of a repaired family from the family's own.

    Returns:
        Config, base model and causal language model, named ``Repaired...``.
    """

    def derive(mixin: type, parent: type, **attributes: Any) -> Any:
        name = f"Repaired{parent.__name__}"
        return type(name, (mixin, parent), {"__module__": module, **attributes})

    config = derive(RepairedConfigMixin, config_class, model_type=model_type)
    whole = list(getattr(model_class, "_no_split_modules", None) or [])
    own = {
        "config_class": config,
        "_no_split_modules": [*whole, *(f"Repaired{name}" for name in whole)],
    }
    model = derive(RepairedModelMixin, model_class, **own)
    both = {"stock_model_class": model_class, "repaired_model_class": model}
    causal_lm = derive(RepairedForCausalLMMixin, causal_lm_class, **both, **own)
    return config, model, causal_lm
