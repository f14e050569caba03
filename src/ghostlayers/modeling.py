"""Decoder layers that carry a boundary repair, for transformers' Auto classes.

A repair acts on the residual stream where layers were removed: x -> x + x M. It lives inside the
decoder layer before (or, at the very start, after) the gap, as one bare parameter. This file needs
torch and transformers only, because a copy of it travels inside every repaired checkpoint.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

CODE = "modeling_ghostlayers.py"
"""What this file is called in a checkpoint."""

PREFIX = "ghostlayers_"
"""Before the model type of a checkpoint that carries operators."""


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
        return torch.bmm(pieces[nearest], tokens[:, :, None])[:, :, 0].reshape(stream.shape)
    products = torch.empty_like(tokens)
    for index in range(pieces.shape[0]):
        members = nearest == index
        # Under autocast the product is of another type than the stream.
        products[members] = F.linear(tokens[members], pieces[index]).to(products.dtype)
    return products.reshape(stream.shape)


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The outermost list of so many modules in a model; None if there is none."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    # Outer modules come before those inside them.
    return next((layers for layers in lists if len(layers) == count), None)


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
    running the model without its repairs. With every file goes the code that reads it, whoever
    saves: a model, a trainer, an adapter that was merged, a push to a hub.
    """

    repaired_boundaries: list[int]
    repair_shapes: dict[str, dict[str, list[int]]]
    stock_classes: tuple[type, type, type]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config from the dictionary in the file."""
        key = guarded_key(cls)
        guard = config_dict.get(key)
        if isinstance(guard, dict):
            repairs = {name: guard[name] for name in ("repaired_boundaries", "repair_shapes")}
            config_dict = {**config_dict, **repairs, key: guard["value"]}
        elif "repaired_boundaries" not in config_dict:
            raise ValueError(
                f"'{key}' of a config of type '{cls.model_type}' should be the object that "  # type: ignore[attr-defined]
                f"Ghostlayers wrote, which says where repairs are, but is {guard!r}: config.json "
                "was edited. Get it again."
            )
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
        content["auto_map"] = auto_map(self.stock_classes)
        content.update(old_spellings(content))
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write the config's file, and beside it the code that it names."""
        super().to_json_file(json_file_path, use_diff=use_diff)  # type: ignore[misc]
        code = travelling_code(self.stock_classes, self.__class__.__module__)
        (Path(json_file_path).parent / CODE).write_text(code, encoding="utf-8")


def auto_map(stock_classes: Iterable[type]) -> dict[str, str]:
    """Where the code of operators is, for ``trust_remote_code``."""
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    names = (f"{CODE.removesuffix('.py')}.Repaired{stock.__name__}" for stock in stock_classes)
    return dict(zip(autos, names, strict=True))


def travelling_code(stock_classes: tuple[type, type, type], module: str) -> str:
    """The one file of code that a repaired checkpoint carries: this one, and a family's classes.

    ``module`` is where its repaired classes are; a copy that travelled has them here, and is whole.
    """
    source = Path(__file__).read_text(encoding="utf-8").rstrip() + "\n"
    if module == __name__:
        return source
    names = [stock.__name__ for stock in stock_classes]
    imports = [f"from {c.__module__} import {c.__name__}  # noqa: E402" for c in stock_classes]
    made = ", ".join(f"Repaired{name}" for name in names)
    call = f"{made} = repaired_classes(\n    {', '.join(names)},\n    __name__,\n)"
    return "\n".join([source, "", *imports, "", call, ""])


OLD_LAYER_TYPES = {"granitemoehybrid": "layer_types", "zamba2": "layers_block_type"}
"""Families with lists of kinds of layers for which transformers 5 has other words."""
OLD_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}


def old_spellings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What older readers than transformers 5 call some entries of a config's file.

    Transformers 4, llama.cpp's converter and engines beside them read these; without them they
    take their own default for a model's positions and say nothing. Transformers 5 reads both.
    """
    kind = str(content.get("model_type")).removeprefix(PREFIX)
    dtype, listed = content.get("dtype"), OLD_LAYER_TYPES.get(kind, "")
    old = {
        "torch_dtype": dtype if isinstance(dtype, str) else None,
        "num_experts": content.get("num_local_experts"),
        listed: [OLD_WORDS.get(word, word) for word in content.get(listed) or ()] or None,
    }
    rope = content.get("rope_parameters") or {}
    return {n: value for n, value in old.items() if value is not None} | old_positions(rope, kind)


TWO_BASES = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "olmo3")
"""Families whose kinds of layers have positions of their own in transformers 4 already."""


def old_positions(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What older readers call the entries of ``rope_parameters``."""
    layered = any(isinstance(part, dict) for part in rope.values())
    full = (rope.get("full_attention") or {}) if layered else rope
    local = (rope.get("sliding_attention") or {}) if layered else {}
    theta, share = full.get("rope_theta"), full.get("partial_rotary_factor")
    if theta is None or (layered and kind not in TWO_BASES):  # no older reader knows these
        return {}
    old = {"partial_rotary_factor": share, "rope_local_base_freq": local.get("rope_theta")}
    if kind.startswith("gpt_neox"):
        old.update(rotary_emb_base=theta, rotary_pct=1.0 if share is None else share)
    given = {name: value for name, value in old.items() if value is not None}
    return {"rope_theta": theta, **old_scaling(full, kind), **given}


STRICT_READERS = {
    ("phi3", "longrope"): {"short_factor", "long_factor"},
    **{(kind, how): {"factor"} for kind in ("olmo", "olmo2") for how in ("linear", "dynamic")},
}
"""What families allow beside ``type`` in transformers 4, which refuses any other entry."""


def old_scaling(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """``rope_scaling``, and what belongs to it.

    What an old reader has no words for stays as it is: then it refuses the model by name.
    """
    method, length = rope.get("rope_type", "default"), "original_max_position_embeddings"
    if method == "default":
        return {"rope_scaling": None}
    elsewhere = {"rope_theta", "partial_rotary_factor", "type"}
    scaling = {name: value for name, value in rope.items() if name not in elsewhere}
    numbers = {name: value for name, value in scaling.items() if name not in {"rope_type", length}}
    if numbers.keys() == STRICT_READERS.get((kind, method)):
        scaling = {"type": method, **numbers}
    more = {length: rope[length]} if method == "longrope" and rope.get(length) is not None else {}
    return {"rope_scaling": scaling, **more}


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
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    values = (getattr(config, name, None) for name in names)
    return float(next((value for value in values if value is not None), 1e-6))


class RepairedLoadingMixin:
    """Refuses to make up weights that a checkpoint should have held, and to drop a repair."""

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # As for the family's own class: of code from elsewhere, transformers expects that it would
        # overwrite loaded weights, and so leaves out buffers that no checkpoint holds.
        super()._initialize_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, all of it."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        check_loaded(info["missing_keys"], info["unexpected_keys"])
        return (model, info) if wanted else model


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a model with made-up weights, or one that has no place for a repair in its files."""
    if lacking := sorted(missing):
        raise RuntimeError(
            f"the checkpoint lacks {some(lacking)}: expected the weights that Ghostlayers wrote. "
            "The folder is incomplete or was edited; download it again, or make it again."
        )
    if dropped := sorted(name for name in unexpected if "repair_" in name.rpartition(".")[2]):
        raise RuntimeError(
            f"the checkpoint holds {some(dropped)}, but its config.json knows no such repair: it "
            "was edited. Download it again, or make it again."
        )


def some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


class RepairedModelMixin(RepairedLoadingMixin):
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


class RepairedForCausalLMMixin(RepairedLoadingMixin):
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


def repaired_layer_class(layer_class: type) -> type:
    """The same decoder layer with room for repairs; a class that has it already is left alone."""
    for made in (layer_class, *layer_class.__subclasses__()):
        if issubclass(made, RepairedLayerMixin):
            return made
    return type(f"Repaired{layer_class.__name__}", (RepairedLayerMixin, layer_class), {})


def repaired_classes(
    config_class: Any, model_class: Any, causal_lm_class: Any, module: str
) -> tuple[Any, Any, Any]:
    """A family's config, base model and causal language model with room for repairs.

    They are called ``Repaired...``, and ``module`` is where they can be found by name.
    """

    def derive(mixin: type, parent: type, **attributes: Any) -> Any:
        name = f"Repaired{parent.__name__}"
        return type(name, (mixin, parent), {"__module__": module, **attributes})

    stock = (config_class, model_class, causal_lm_class)
    kind = f"{PREFIX}{config_class.model_type}"
    config = derive(RepairedConfigMixin, config_class, model_type=kind, stock_classes=stock)
    whole = list(getattr(model_class, "_no_split_modules", None) or [])
    whole += [f"Repaired{name}" for name in whole]
    own = {"config_class": config, "_no_split_modules": whole}
    model = derive(RepairedModelMixin, model_class, **own)
    both = {"stock_model_class": model_class, "repaired_model_class": model}
    causal_lm = derive(RepairedForCausalLMMixin, causal_lm_class, **both, **own)
    share_conversions(config_class.model_type, kind)
    for one, other in ((model_class, model), (causal_lm_class, causal_lm)):
        share_conversions(one.__name__, other.__name__)
    return config, model, causal_lm


def share_conversions(stock: str, repaired: str) -> None:
    """Let repaired checkpoints name and split weights as those of their family do.

    Both are model types, or names of classes. Transformers 5 packs experts and renames weights as
    it loads; version 4 knows checkpoints in the family's own form alone.
    """
    try:
        from transformers import conversion_mapping as conversions
    except ImportError:
        return
    known = conversions.get_checkpoint_conversion_mapping(stock)
    if known is not None:
        conversions.register_checkpoint_conversion_mapping(repaired, known, overwrite=True)
