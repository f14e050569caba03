"""What llama.cpp knows of each family: a row of facts, and what it takes for granted.

llama.cpp decides some things by the family's name, and a few by the number of layers, instead of
reading them from the file. A file that contradicts them loads and then computes something else, so
every such assumption is checked here, against the checkpoint as it is after the cut.

Facts about llama.cpp are from its sources (`src/models`, `src/llama-model.cpp`), as built into
llama-cpp-python 0.3.36.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from gguf import MODEL_ARCH

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.configs import head_width, kv_heads, slides

Entry = tuple[str, Any]
"""The end of the name of a method of `gguf.GGUFWriter` (after ``add_``), and what it is given."""

INPUTS = frozenset({"q_proj", "k_proj", "v_proj"})
EVERYWHERE = INPUTS | {"o_proj", "gate_proj", "up_proj", "down_proj"}
SILU = frozenset({"silu", "swish"})
TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new"})


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp holds and computes one family.

    Attributes:
        architecture: its name there.
        activations: those of transformers that llama.cpp's activation equals.
        pairs: it rotates neighbouring channels where transformers rotates halves, so the rows of
            queries and keys are reordered.
        shifted: transformers' norms multiply by one plus the weight.
        head: ``any``; ``tied`` where it takes the embedding in any case; ``own`` where it asks for
            a head of its own.
        biases: of linear layers, those that it reads.
        windows: it reads which layers attend over how long a window.
        default_window: it gives some layers one where the file names none.
        local_base: layers with a window have a base of their own for their positions.
        long_factors: it reads factors for short and for long texts.
        stretched: `dynamic` positions do not move with the text; their base is stretched once.
        factors: it reads a factor for each frequency of the positions.
        partial: a part of the channels may stay unrotated.
        square: heads times their width is the hidden size.
        largest: layers of the family's largest model, in which it scales attention otherwise; None
            where it reads the scale, or the family has none of its own.
        scaled: the part of attention that takes up the difference between the two scales.
        renamed: parts of names of weights, and what they are called in families that `gguf` knows.
        settings: what the file says beyond what all families say.
        refusal: why this config cannot be written; None where it can.
    """

    architecture: Any
    activations: frozenset[str] = SILU
    pairs: bool = False
    shifted: bool = False
    head: str = "any"
    biases: frozenset[str] = INPUTS
    windows: bool = False
    default_window: bool = False
    local_base: bool = False
    long_factors: bool = False
    stretched: bool = False
    factors: bool = False
    partial: bool = False
    square: bool = False
    largest: int | None = None
    scaled: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    settings: Callable[[Any], list[Entry]] = lambda _: []
    refusal: Callable[[Any], str | None] = lambda _: None


def _soft_caps(config: Any) -> list[Entry]:
    caps = [
        ("attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None)),
        ("final_logit_softcapping", getattr(config, "final_logit_softcapping", None)),
    ]
    return [entry for entry in caps if entry[1] is not None]


def _without_caps(config: Any) -> str | None:
    if None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        return "llama.cpp always caps this family's logits, but the config does not"
    return None


def _capped_attention(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "llama.cpp does not cap the attention logits of this family"
    if getattr(config, "use_bidirectional_attention", False):
        return "llama.cpp computes this family with causal attention"
    return None


def _multipliers(config: Any) -> list[Entry]:
    return [
        ("attention_scale", float(config.attention_multiplier)),
        ("embedding_scale", float(config.embedding_multiplier)),
        ("residual_scale", float(config.residual_multiplier)),
        ("logit_scale", float(config.logits_scaling)),
    ]


def _logit_scale(config: Any) -> list[Entry]:
    return [("logit_scale", float(config.logit_scale))]


def _every_fourth_without_positions(config: Any) -> str | None:
    """`no_rope_layers` holds 1 where positions are used."""
    here = [bool(rotates) for rotates in config.no_rope_layers]
    there = [(index + 1) % 4 != 0 for index in range(config.num_hidden_layers)]
    if here == there:
        return None
    wrong = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
    return (
        "llama.cpp leaves positions out of every fourth layer, wherever the layers come from, and "
        f"layer {wrong} of this checkpoint does otherwise; remove whole groups of four layers"
    )


def _normed_heads_by_depth(config: Any) -> str | None:
    if bool(config.use_qk_norm) != (config.num_hidden_layers >= 64):
        return (
            "llama.cpp norms queries and keys of this family in models of 64 and more layers only, "
            f"and this one, of {config.num_hidden_layers}, does otherwise"
        )
    return None


def _windows_by_depth(config: Any) -> str | None:
    """With windows, the layers without one have no positions either, even where none is left."""
    if config.sliding_window is not None or config.num_hidden_layers == 64:
        return (
            "llama.cpp gives this family sliding windows in models of 64 layers only, so neither "
            "those of 64 nor those with windows and fewer layers are written"
        )
    return None


def _no_window_left(config: Any) -> str | None:
    """Layers without a window have no positions in this family, so none can stand in."""
    if slides(config):
        return None
    return "llama.cpp asks for layers with sliding windows in this family, and none is left"


def _experts(config: Any) -> list[Entry]:
    """How many experts there are and how wide they are; those beside all tokens, too."""
    count = getattr(config, "num_experts", None) or config.num_local_experts
    widths = {
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": (
            "shared_expert_intermediate_size", "shared_intermediate_size",
        ),
    }  # fmt: skip
    return [
        ("expert_count", count),
        ("expert_used_count", config.num_experts_per_tok),
        *(
            (entry, getattr(config, name))
            for entry, names in widths.items()
            for name in names
            if getattr(config, name, None)
        ),
    ]


def _multiplied_experts(config: Any) -> list[Entry]:
    return [*_multipliers(config), *_experts(config)]


def _experts_everywhere(config: Any, *, normed: bool) -> str | None:
    """Of Qwen's families: every layer has experts, whose weights sum to one or do not."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "llama.cpp expects experts in every layer of this family, but some have none"
    return _expert_weights(config, normed=normed)


def _expert_weights(config: Any, *, normed: bool) -> str | None:
    if bool(config.norm_topk_prob) == normed:
        return None
    verb = "normalises" if normed else "does not normalise"
    return f"llama.cpp {verb} the weights of this family's chosen experts, but the config says else"


def _olmoe_facts(config: Any) -> str | None:
    if getattr(config, "clip_qkv", None) is not None:
        return "llama.cpp does not clamp queries, keys and values of this family"
    if kv_heads(config) != config.num_attention_heads:
        return "llama.cpp expects as many heads of keys as of queries in this family"
    return _expert_weights(config, normed=False)


_GRANITE_EXPERTS = (
    ("block_sparse_moe.router.", "block_sparse_moe.router.layer."),
    ("block_sparse_moe.experts.", "mlp.experts."),
    ("shared_mlp.input_linear.", "mlp.shared_expert.input_linear."),
)


def _clamp(config: Any) -> list[Entry]:
    clip = config.clip_qkv
    return [] if clip is None else [("clamp_kqv", float(clip))]


_MLP_OF_STARCODER = INPUTS | {"o_proj", "c_fc", "c_proj"}

GGUF_FAMILIES = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, pairs=True, biases=EVERYWHERE, factors=True),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, pairs=True, factors=True),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, activations=TANH_GELU, shifted=True, head="tied"),
    "gemma2": GgufFamily(
        MODEL_ARCH.GEMMA2, activations=TANH_GELU, shifted=True, head="tied", windows=True,
        default_window=True, largest=46, scaled="q_proj",
        settings=_soft_caps, refusal=_without_caps,
    ),
    "gemma3_text": GgufFamily(
        MODEL_ARCH.GEMMA3, activations=TANH_GELU, shifted=True, windows=True, local_base=True,
        largest=62, scaled="q_norm", settings=_soft_caps, refusal=_capped_attention,
    ),
    "granite": GgufFamily(
        MODEL_ARCH.GRANITE, pairs=True, biases=EVERYWHERE, factors=True, settings=_multipliers
    ),
    "smollm3": GgufFamily(
        MODEL_ARCH.SMOLLM3, pairs=True, refusal=_every_fourth_without_positions
    ),
    "olmo": GgufFamily(MODEL_ARCH.OLMO, pairs=True, square=True, settings=_clamp),
    "olmo2": GgufFamily(MODEL_ARCH.OLMO2, head="own", square=True),
    "olmo3": GgufFamily(MODEL_ARCH.OLMO2, head="own", square=True, windows=True),
    "cohere": GgufFamily(
        MODEL_ARCH.COMMAND_R, head="tied", square=True, settings=_logit_scale,
        refusal=_normed_heads_by_depth,
    ),
    "cohere2": GgufFamily(
        MODEL_ARCH.COHERE2, head="tied", square=True, windows=True, settings=_logit_scale,
        refusal=_no_window_left,
    ),
    "stablelm": GgufFamily(MODEL_ARCH.STABLELM, head="own", partial=True, square=True),
    "starcoder2": GgufFamily(
        MODEL_ARCH.STARCODER2, activations=TANH_GELU, biases=_MLP_OF_STARCODER, square=True
    ),
    "phi3": GgufFamily(MODEL_ARCH.PHI3, partial=True, square=True, long_factors=True),
    "exaone4": GgufFamily(
        MODEL_ARCH.EXAONE4, factors=True, square=True, refusal=_windows_by_depth
    ),
    "seed_oss": GgufFamily(MODEL_ARCH.SEED_OSS),
    "glm4": GgufFamily(MODEL_ARCH.GLM4, partial=True),
    "ernie4_5": GgufFamily(MODEL_ARCH.ERNIE4_5, biases=INPUTS | {"o_proj"}),
    "hunyuan_v1_dense": GgufFamily(MODEL_ARCH.HUNYUAN_DENSE, stretched=True),
    "mixtral": GgufFamily(MODEL_ARCH.LLAMA, pairs=True, factors=True, settings=_experts),
    "qwen2_moe": GgufFamily(
        MODEL_ARCH.QWEN2MOE, head="own", square=True, settings=_experts,
        refusal=partial(_experts_everywhere, normed=False),
    ),
    "qwen3_moe": GgufFamily(
        MODEL_ARCH.QWEN3MOE, settings=_experts, refusal=partial(_experts_everywhere, normed=True)
    ),
    "olmoe": GgufFamily(
        MODEL_ARCH.OLMOE, head="own", square=True, settings=_experts, refusal=_olmoe_facts
    ),
    "granitemoe": GgufFamily(
        MODEL_ARCH.GRANITE_MOE, pairs=True, factors=True, renamed=_GRANITE_EXPERTS,
        settings=_multiplied_experts,
    ),
    "granitemoeshared": GgufFamily(
        MODEL_ARCH.GRANITE_MOE, pairs=True, factors=True, renamed=_GRANITE_EXPERTS,
        settings=_multiplied_experts,
    ),
    "arcee": GgufFamily(
        MODEL_ARCH.ARCEE, activations=frozenset({"relu2"}), pairs=True, factors=True
    ),
}  # fmt: skip
"""By `model_type`: the families with one uniform stack that are written as GGUF."""


def check_facts(config: Any) -> GgufFamily:
    """Refuse what llama.cpp takes for granted otherwise: no entry of the file could say it.

    Args:
        config: of the checkpoint, after the cut.

    Returns:
        The family's row.

    Raises:
        UnsupportedModelError: with the reason.
    """
    kind = str(config.model_type)
    row = family_of(config)
    for reason in (
        _other_activation(config, row),
        _other_window(config, row),
        _other_head(config, row),
        _other_width(config, row),
        row.refusal(config),
    ):
        if reason is not None:
            raise UnsupportedModelError(
                f"this checkpoint of type '{kind}' cannot be written as GGUF: {reason}."
            )
    return row


def family_of(config: Any) -> GgufFamily:
    """The row of a model's family.

    Raises:
        UnsupportedModelError: it has none.
    """
    kind = str(config.model_type)
    if kind not in GGUF_FAMILIES:
        raise UnsupportedModelError(
            f"models of type '{kind}' are not written as GGUF here; supported: "
            f"{', '.join(sorted(GGUF_FAMILIES))}. llama.cpp's own converter takes the folder too."
        )
    return GGUF_FAMILIES[kind]


def _other_activation(config: Any, row: GgufFamily) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation in row.activations:
        return None
    return (
        f"the model's activation is '{activation}', but llama.cpp computes "
        f"{' or '.join(sorted(row.activations))} in models of this type"
    )


def _other_window(config: Any, row: GgufFamily) -> str | None:
    window = getattr(config, "sliding_window", None)
    if row.windows or not slides(config):
        return None
    if window is not None and window >= config.max_position_embeddings:
        return None
    return (
        f"the model's attention slides over {window} tokens, but llama.cpp attends to all in "
        "models of this type; texts longer than that would come out differently"
    )


def _other_head(config: Any, row: GgufFamily) -> str | None:
    if row.head == "tied" and not config.tie_word_embeddings:
        return "llama.cpp takes this family's embedding for its head, but the head is another one"
    return None


def _other_width(config: Any, row: GgufFamily) -> str | None:
    width = head_width(config) * config.num_attention_heads
    if row.square and width != config.hidden_size:
        return (
            f"llama.cpp expects heads of {config.hidden_size} channels in all, the hidden size, "
            f"but they have {width}"
        )
    return None


def window_entries(config: Any, row: GgufFamily) -> list[Entry]:
    """Which layers see how many tokens back, a flag a layer.

    Always said where windows are left, because llama.cpp otherwise takes the family's period, which
    a cut may break. Where none is left it stops at a window that no layer has; a family with one by
    default then gets one in every layer, as long as the context.
    """
    if not row.windows:
        return []
    flags = [kind == "sliding_attention" for kind in config.layer_types]
    window = config.sliding_window
    if not any(flags):
        if not row.default_window:
            return []
        flags, window = [True] * len(flags), config.max_position_embeddings
    return [("sliding_window", window), ("sliding_window_pattern", flags)]


def assumed_width(config: Any, row: GgufFamily) -> int:
    """Of whose root llama.cpp divides the queries of a family with a scale of its own.

    The width of a head, except in models that are as deep as the largest of the family: a cut
    changes the depth.
    """
    if config.num_hidden_layers == row.largest:
        return int(config.hidden_size // config.num_attention_heads)
    return head_width(config)


def query_factor(config: Any, row: GgufFamily) -> float:
    """By what queries are multiplied so that attention has the config's scale in llama.cpp."""
    if row.largest is None:
        return 1.0
    return float((assumed_width(config, row) / config.query_pre_attn_scalar) ** 0.5)
