"""What has to be known about a model family to cut it: one row of data each, nothing else.

The sweep needs none of this. Removing layers and writing a checkpoint does: which classes build the
family, and which lists in its config run over the layers.
"""

from dataclasses import dataclass

from ghostlayers.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """A model family whose layers can be removed.

    Attributes:
        model_type: as in the config.
        package: the module below ``transformers.models`` that holds its classes.
        config: name of the config class.
        layer: name of the decoder-layer class.
        model: name of the base-model class.
        causal_lm: name of the causal-language-model class.
        per_layer_lists: config attributes with one entry a decoder layer.
        mlp: path of the MLP in a decoder layer.
        mlp_output: path of the projection by which the MLP writes into the stream.
        mlp_norm: path of the norm in front of the MLP.
        attention_output: path of the projection by which attention writes into the stream.
        post_norms: paths of norms between those projections and the stream; where there are any,
            nothing folds into the projections.
        gain_offset: what the norms add to their stored weight to get the gain.
    """

    model_type: str
    package: str
    config: str
    layer: str
    model: str
    causal_lm: str
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    mlp: str = "mlp"
    mlp_output: str = "mlp.down_proj"
    mlp_norm: str = "post_attention_layernorm"
    attention_output: str = "self_attn.o_proj"
    post_norms: tuple[str, ...] = ()
    gain_offset: float = 0.0

    @property
    def repaired_model_type(self) -> str:
        """The model type of a checkpoint that carries operators."""
        return f"ghostlayers_{self.model_type}"


def _plain(model_type: str, prefix: str) -> Family:
    """A family whose classes are all named after one prefix."""
    return Family(
        model_type=model_type,
        package=model_type,
        config=f"{prefix}Config",
        layer=f"{prefix}DecoderLayer",
        model=f"{prefix}Model",
        causal_lm=f"{prefix}ForCausalLM",
    )


FAMILIES: dict[str, Family] = {
    "llama": _plain("llama", "Llama"),
    "mistral": _plain("mistral", "Mistral"),
    "qwen2": _plain("qwen2", "Qwen2"),
    "qwen3": _plain("qwen3", "Qwen3"),
    "bitnet": _plain("bitnet", "BitNet"),
    "gemma3_text": Family(
        model_type="gemma3_text",
        package="gemma3",
        config="Gemma3TextConfig",
        layer="Gemma3DecoderLayer",
        model="Gemma3TextModel",
        causal_lm="Gemma3ForCausalLM",
        mlp_norm="pre_feedforward_layernorm",
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        gain_offset=1.0,
    ),
}


def find_family(model_type: str) -> Family:
    """The row of a family.

    Raises:
        UnsupportedModelError: there is none, or the model has been repaired already.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if any(model_type == family.repaired_model_type for family in FAMILIES.values()):
        raise UnsupportedModelError(
            f"the model is of type '{model_type}': its layers were removed and repaired before. "
            "Start from its base model instead, and remove all layers at once."
        )
    raise UnsupportedModelError(
        f"models of type '{model_type}' cannot be pruned yet; supported: "
        f"{', '.join(sorted(FAMILIES))}. Scores and evaluation work on other families too."
    )
