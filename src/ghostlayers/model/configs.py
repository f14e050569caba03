"""What a config says of single layers, and what it must say after some of them went.

A config speaks of layers in four ways: lists with one entry a layer, lists of layer indices,
counts of layers at the start, and formulas of the index. The first three can always be rewritten. A
formula is turned into a list where the family has one for it, or into another formula with the same
result where there is one; otherwise the cut is refused.

These tables are by attribute, not by family: a name means the same wherever it occurs. What they
miss is caught by `agreement`, which builds the model anew from the rewritten config.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostlayers.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "activation_sparsity_pattern",
)
"""One entry a layer (or more entries than layers, where a family allows that)."""

INDEX_LISTS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "local_layer_ids",
    "hybrid_layer_ids",
)
"""Indices of the layers that are of some kind."""

LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""So many layers at the start are of some kind."""

PERIODS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)
"""Layers are of some kind where index modulo period equals offset, and no list says so."""

EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Layers behind the last one, for predicting several tokens at once. transformers does not load
them, so the checkpoint that we write does not have them."""


def slice_config(config: Any, kept: Sequence[int]) -> None:
    """Make a config describe the surviving layers, in place.

    Args:
        config: of a causal language model.
        kept: the layers that stay, in the dense model's numbering.

    Raises:
        UnsupportedModelError: a formula of the layer index has no counterpart after this cut.
    """
    values = vars(config)
    depth = config.num_hidden_layers
    for name in PER_LAYER_LISTS:
        if isinstance(values.get(name), (list, tuple)) and len(values[name]) >= depth:
            setattr(config, name, [values[name][index] for index in kept])
    _write_sparse_step(config, values, kept)
    for name in INDEX_LISTS:
        if isinstance(values.get(name), (list, tuple)):
            setattr(config, name, [new for new, old in enumerate(kept) if old in values[name]])
    for name in LEADING_COUNTS:
        if isinstance(values.get(name), int):
            setattr(config, name, sum(index < values[name] for index in kept))
    for period, offset in PERIODS:
        if values.get(period) is not None:
            places = _periodic(values[period], values[offset], kept, period)
            setattr(config, period, places[0])
            setattr(config, offset, places[1])
    if values.get("attention_types") is not None:  # GPT-Neo: pairs of kinds and repetitions
        kinds = [values["attention_layers"][index] for index in kept]
        config.attention_layers = kinds
        config.attention_types = [[[kind], 1] for kind in kinds]
    for name in EXTRA_LAYERS:
        if values.get(name):
            setattr(config, name, 0)
    config.num_hidden_layers = len(kept)


def say_what_is(model: "PreTrainedModel") -> None:
    """Make a cut model's config say whether its head is its embedding, and name no code of others.

    Args:
        model: a causal language model, whose own config this is.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and hasattr(head, "weight"):
        model.config.tie_word_embeddings = head.weight is embedding.weight
    for name in FOREIGN:
        vars(model.config).pop(name, None)
    answer_in_full(model.config)


FOREIGN = ("auto_map", "custom_pipelines")
"""Entries that name code in a model's folder, or in a repository on the hub."""


def without_code(content: Any) -> Any:
    """Take out of a config, in place, what names code: none of the base's is in the folder."""
    if isinstance(content, dict):
        for name in FOREIGN:
            content.pop(name, None)
    for part in content.values() if isinstance(content, dict) else content:
        if isinstance(part, (dict, list)):
            without_code(part)
    return content


ANSWERS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
"""Entries that choose what a model hands out, not what it computes."""


def answer_in_full(config: Any) -> None:
    """Have a model hand out what every other one does, in place.

    Without ``return_dict`` some families of transformers 5 do not run at all; with
    ``output_attentions`` they are not saved.
    """
    for name, value in ANSWERS.items():
        if getattr(config, name, value) != value:
            setattr(config, name, value)


def _write_sparse_step(config: Any, values: Mapping[str, Any], kept: Sequence[int]) -> None:
    """Qwen's MoE families: every n-th layer has experts, unless a list names it as plain.

    The step becomes 1, and the list names every layer that the step left plain.
    """
    step = values.get("decoder_sparse_step")
    if not isinstance(step, int) or step < 1:
        return
    listed = values.get("mlp_only_layers") or []
    plain = [index for index in kept if index in listed or (index + 1) % step]
    config.mlp_only_layers = plain
    config.decoder_sparse_step = 1


def _periodic(period: int, offset: int, kept: Sequence[int], name: str) -> tuple[int, int]:
    """A period and offset under which the kept layers are of the kinds that they are."""
    kinds = [index % period == offset for index in kept]
    candidates = [(period, offset)] + [
        (other, shift) for other in range(1, len(kept) + 2) for shift in range(other)
    ]
    for other, shift in candidates:
        if kinds == [index % other == shift for index in range(len(kept))]:
            return other, shift
    raise UnsupportedModelError(
        f"the config places layers by a formula ('{name}' = {period}), and after this cut no such "
        f"formula gives the kinds of the layers that stay. Remove {period} layers in a row, or a "
        "multiple of that."
    )


def head_width(config: Any) -> int:
    """Channels of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def kv_heads(config: Any) -> int:
    """Heads that keys and values have."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def slides(config: Any) -> bool:
    """Whether some layers attend to the last tokens only."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return any(kind != "full_attention" for kind in types)
    return getattr(config, "sliding_window", None) is not None
