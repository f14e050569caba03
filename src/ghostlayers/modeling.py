"""Decoder layers that carry a boundary repair, for transformers' Auto classes.

A repair acts on the residual stream where decoder layers were removed: x -> x + x M. It lives
inside the decoder layer before (or, at the very start, after) the gap, as one bare parameter. This
file needs torch and transformers only, because a copy of it travels inside every repaired
checkpoint.
"""

import json
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class RepairedConfigMixin:
    """A config that knows its repaired boundaries and that no other class can read by mistake.

    In the file, ``num_hidden_layers`` is an object instead of a number. A loader that ignores the
    model type, such as the stock class called by name, then stops with an error instead of
    running the model without its repairs.
    """

    repaired_boundaries: list[int]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config from the dictionary in the file."""
        config_dict = dict(config_dict)
        layers = config_dict.get("num_hidden_layers")
        if isinstance(layers, dict):
            config_dict["num_hidden_layers"] = layers["kept"]
            config_dict["repaired_boundaries"] = list(layers["repaired_boundaries"])
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        """Write the config as it stands in the file."""
        content = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        content.pop("repaired_boundaries", None)
        content["num_hidden_layers"] = {
            "kept": self.num_hidden_layers,  # type: ignore[attr-defined]
            "repaired_boundaries": list(getattr(self, "repaired_boundaries", [])),
            "note": "repaired by Ghostlayers: load with trust_remote_code=True, "
            "or import ghostlayers first",
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


class RepairedLayerMixin:
    """A decoder layer that may repair the stream before it, after it, or not at all.

    ``repair_before`` and ``repair_after`` hold M transposed, [hidden, hidden], as ``F.linear``
    wants it. They are bare parameters so that quantisers and adapters, which take every
    ``nn.Linear``, leave them alone.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the family's own layer between the repairs."""
        before = getattr(self, "repair_before", None)
        after = getattr(self, "repair_after", None)
        if before is not None:
            hidden_states = hidden_states + F.linear(hidden_states, before)
        output = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if after is None:
            return output
        stream = output[0] if isinstance(output, tuple) else output
        stream = stream + F.linear(stream, after)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream


class RepairedInitMixin:
    """Refuses to make up a repair that a checkpoint should have held."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if not getattr(module, "repair_comes_from_file", False):
            return
        for name in ("repair_before", "repair_after"):
            repair = getattr(module, name, None)
            if repair is not None and not getattr(repair, "_is_hf_initialized", False):
                raise RuntimeError(
                    f"the checkpoint lacks '{name}' of a repaired decoder layer: expected the "
                    "weights that Ghostlayers wrote. The folder is incomplete or was edited; "
                    "download it again, or make it again."
                )


class RepairedModelMixin(RepairedInitMixin):
    """A base model whose layers next to a gap carry repairs."""

    repaired_layer_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for boundary in getattr(config, "repaired_boundaries", []):
            index, name = repair_place(boundary)
            layer = self.layers[index]  # type: ignore[attr-defined]
            layer.__class__ = self.repaired_layer_class
            like = next(layer.parameters())
            size = (config.hidden_size, config.hidden_size)
            setattr(layer, name, nn.Parameter(like.new_zeros(size)))
            layer.repair_comes_from_file = like.is_meta  # so from_pretrained builds a model


class RepairedForCausalLMMixin(RepairedInitMixin):
    """A causal language model over a repaired base model."""

    repaired_model_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.repaired_model_class(config)
        self.post_init()  # type: ignore[attr-defined]


def repair_place(boundary: int) -> tuple[int, str]:
    """The layer (in the pruned model) that carries the repair of a boundary, and the name in it."""
    return (boundary - 1, "repair_after") if boundary > 0 else (0, "repair_before")


def repaired_classes(
    model_type: str,
    config_class: type,
    layer_class: type,
    model_class: type,
    causal_lm_class: type,
    module: str,
) -> tuple[type, type, type, type]:
    """Derive the four classes of a repaired family from the family's own.

    Returns:
        Config, decoder layer, base model and causal language model, named ``Repaired...``.
    """

    def derive(mixin: type, parent: type, **attributes: Any) -> type:
        name = f"Repaired{parent.__name__}"
        return type(name, (mixin, parent), {"__module__": module, **attributes})

    config = derive(RepairedConfigMixin, config_class, model_type=model_type)
    layer = derive(RepairedLayerMixin, layer_class)
    own = {"config_class": config, "_no_split_modules": [layer_class.__name__, layer.__name__]}
    model = derive(RepairedModelMixin, model_class, repaired_layer_class=layer, **own)
    causal_lm = derive(RepairedForCausalLMMixin, causal_lm_class, repaired_model_class=model, **own)
    return config, layer, model, causal_lm
