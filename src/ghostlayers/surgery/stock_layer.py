"""A repair written as one ordinary decoder layer, for engines that know stock families only.

x + norm(x) M is what a gated MLP with biases computes when its gate is held open: gate weight 0 and
bias 32, so that silu(gate) is 32 exactly in every float type; up-projection the identity; down-
projection M / 32. Its attention writes nothing. All other layers get biases of zero. The layer
costs what a layer costs, its key-value cache included.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostlayers.errors import UnsupportedModelError, VerificationError
from ghostlayers.model.configs import slides
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.families import find_family
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.model.weights import like
from ghostlayers.repairs.base import Repair
from ghostlayers.runtime.machine import input_device
from ghostlayers.spans import Span, pruned_boundary
from ghostlayers.surgery import removal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPEN_GATE = 32.0
"""silu(32) is 32 in float32 and below, and dividing by a power of two rounds nothing."""

BIASED = frozenset({"llama", "granite", "smollm3"})
"""Families whose MLP has biases where the config says so."""

SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
)  # fmt: skip
"""What Mistral and Qwen 2 have in common with Llama."""

ATTENTION_BIASED = {"mistral": False, "qwen2": True}
"""Families that become Llama, and whether their attention has biases (of q, k and v)."""

LARGEST_DIFFERENCE = 1e-3
"""Of a logit, relative to the largest, between the layer and the operator that it stands for."""


def check_stock_layer(model: "PreTrainedModel") -> None:
    """Refuse a model whose family has no such layer, before anything is computed.

    Raises:
        UnsupportedModelError: the message says what is missing.
    """
    config = model.config
    kind = config.model_type
    reason = None
    if kind not in BIASED | set(ATTENTION_BIASED):
        reason = f"the MLP of '{kind}' has no biases"
    elif config.hidden_act not in ("silu", "swish"):
        reason = f"its activation is {config.hidden_act}, not silu"
    elif config.intermediate_size < config.hidden_size:
        reason = "its MLP is narrower than the residual stream"
    elif kind in ATTENTION_BIASED and slides(config):
        reason = f"'{kind}' with a sliding window is not a Llama"
    if reason:
        raise UnsupportedModelError(
            f"--export stock-layer writes a repair as one decoder layer, but {reason}. Use "
            "--export custom, or a repair that folds (refit, replaceme)."
        )


@torch.no_grad()
def with_stock_layers(
    pruned: "PreTrainedModel",
    spans: Sequence[Span],
    repairs: Mapping[Span, Repair],
    stored_dtype: torch.dtype,
) -> Any:
    """A stock model with one layer more a gap.

    Args:
        pruned: the bare cut, as `removal.prune_layers` gives it; unchanged.
        spans: its gaps, in the dense model's numbering.
        repairs: x + norm(x) M at each gap.
        stored_dtype: what changed weights are rounded to once.

    Returns:
        A new model that shares the surviving weights.
    """
    before = {pruned_boundary(span, spans): repairs[span] for span in spans}
    places = _places(pruned.config.num_hidden_layers, before)
    config = _config(pruned.config, places)
    family = find_family(config.model_type)
    assert family is not None
    made: Any = family.causal_lm
    with torch.device("meta"):
        model = made(config)
    path = _layers_path(pruned)
    state = _state(pruned, model, path, places, before, stored_dtype)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    _keep_types(pruned, model, path, places)
    buffers = dict(pruned.named_buffers())
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise VerificationError(f"the stock layer's model lacks {left[0]}; please report this.")
    embedding: Any = pruned.get_input_embeddings()
    model.requires_grad_(embedding.weight.requires_grad)
    model.generation_config = copy.deepcopy(pruned.generation_config)
    return model.eval()


def _places(count: int, before: Mapping[int, Repair]) -> list[int | None]:
    """Which layer of the bare cut stands where; None for a made one."""
    places: list[int | None] = []
    for index in range(count + 1):
        places += [None] if index in before else []
        places += [index] if index < count else []
    return places


def _config(config: Any, places: Sequence[int | None]) -> Any:
    if config.model_type in ATTENTION_BIASED:
        from transformers import LlamaConfig

        fields = {name: getattr(config, name) for name in SHARED_FIELDS if hasattr(config, name)}
        changed: Any = LlamaConfig(
            **fields,
            num_hidden_layers=len(places),
            attention_bias=ATTENTION_BIASED[config.model_type],
        )
        changed.architectures = ["LlamaForCausalLM"]
    else:
        changed = copy.deepcopy(config)
        for name, plain in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
            values = getattr(config, name, None)
            if values is not None:
                new = [plain if place is None else values[place] for place in places]
                setattr(changed, name, new)
        changed.num_hidden_layers = len(places)
    changed.mlp_bias = True
    return changed


def _layers_path(model: "PreTrainedModel") -> str:
    layers = find_decoder_layers(model)
    return str(next(name for name, module in model.named_modules() if module is layers))


def _state(
    pruned: "PreTrainedModel",
    model: "PreTrainedModel",
    path: str,
    places: Sequence[int | None],
    before: Mapping[int, Repair],
    stored_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Weights of the new model by name; those that are not listed are tied to others."""
    old = pruned.state_dict()
    state = {name: tensor for name, tensor in old.items() if not name.startswith(f"{path}.")}
    like: Any = pruned.get_input_embeddings().weight
    repairs = iter(sorted(before.items()))
    for new, place in enumerate(places):
        prefix = f"{path}.{new}."
        shapes = {
            name.removeprefix(prefix): tensor.shape
            for name, tensor in model.state_dict().items()
            if name.startswith(prefix)
        }
        if place is None:
            made = _layer(shapes, next(repairs)[1], pruned.config, stored_dtype)
        else:
            made = {name: old.get(f"{path}.{place}.{name}") for name in shapes}
        for name, shape in shapes.items():
            value = made.get(name)
            state[prefix + name] = (like.new_zeros(shape) if value is None else value).to(like)
    return state


def _keep_types(
    pruned: "PreTrainedModel", model: "PreTrainedModel", path: str, places: Sequence[int | None]
) -> None:
    """Let surviving weights remember what their files hold."""
    old = dict(pruned.named_parameters(remove_duplicate=False))
    for name, tensor in model.named_parameters(remove_duplicate=False):
        new, _, end = name.removeprefix(f"{path}.").partition(".")
        inside = name.startswith(f"{path}.")
        source = f"{path}.{places[int(new)]}.{end}" if inside else name
        if source in old:
            like(old[source], tensor)


def _layer(
    shapes: Mapping[str, torch.Size], repair: Repair, config: Any, stored_dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """The parameters of the made layer that are not zero."""
    assert repair.operator is not None
    mapped = repair.operator.parameters["normed"].double()  # M transposed, [hidden, hidden]
    constant = repair.operator.parameters.get("bias")
    written = 1.0 / float(getattr(config, "residual_multiplier", None) or 1.0)
    hidden = mapped.shape[0]
    up = torch.zeros(shapes["mlp.up_proj.weight"])
    up[:hidden] = torch.eye(hidden)
    gate = torch.zeros(shapes["mlp.gate_proj.bias"])
    gate[:hidden] = OPEN_GATE
    down = torch.zeros(shapes["mlp.down_proj.weight"], dtype=torch.float64)
    down[:, :hidden] = mapped.cpu() * (written / OPEN_GATE)
    return {
        "input_layernorm.weight": torch.ones(hidden),
        "post_attention_layernorm.weight": torch.ones(hidden),
        "mlp.gate_proj.bias": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": down.to(stored_dtype).float(),
        "mlp.down_proj.bias": None if constant is None else constant.cpu().double() * written,
    }


@torch.no_grad()
def check_same(model: "PreTrainedModel", operator_model: "PreTrainedModel") -> float:
    """The largest difference of a logit between the two forms of one repaired model.

    Raises:
        VerificationError: they are not the same model.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 32), generator=generator)
    ids = ids.to(input_device(model))
    got, want = (
        network(input_ids=ids, use_cache=False).logits for network in (model, operator_model)
    )
    size = float(want.float().abs().max())
    difference = float((got.float() - want.float()).abs().max())
    # Half precision rounds a logit by half an eps a layer or so.
    allowed = max(LARGEST_DIFFERENCE, 4.0 * float(torch.finfo(got.dtype).eps)) * max(1.0, size)
    if not (math.isfinite(difference) and difference <= allowed):
        raise VerificationError(
            f"the layer does not compute what the repair does: logits differ by {difference:.3g}. "
            "Use --export custom, and please report this with the model's name."
        )
    return difference


def as_stock_layers(
    dense: DenseModel,
    operator_model: "PreTrainedModel",
    spans: tuple[Span, ...],
    repairs: Mapping[Span, Repair],
) -> Any:
    """The repaired model with its operators written as ordinary decoder layers, and compared."""
    bare = removal.prune_layers(dense, spans)
    model = with_stock_layers(bare, spans, repairs, dense.stored_dtype)
    check_same(model, operator_model)
    return model
