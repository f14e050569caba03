"""What a GGUF file says and transformers' reader of such files leaves out.

The reader knows a family's names and sizes. It does not read scaled positions, which layers have
windows, caps, or biases that the family has by option only: a model read so runs, and computes
something else. Here the config is completed from the file, and a model that lacks some of its
numbers is refused.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.configs import head_width
from ghostlayers.model.gguf_families import GGUF_FAMILIES, assumed_width
from ghostlayers.model.gguf_file import GgufFile
from ghostlayers.model.gguf_positions import band_factors
from ghostlayers.runtime.shown import one_line

KNOWN_BANDS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""Factor, low and high frequency factor, and first length of Llama 3.1 and 3.2."""


def check_architecture(file: GgufFile) -> None:
    """Refuse a family that transformers does not read from such files.

    Raises:
        UnsupportedModelError: with those that it reads.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    readable = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    known = {name.replace("_", "") for name in readable}
    if file.architecture.replace("_", "").replace("-", "") not in known:
        raise UnsupportedModelError(
            f"'{file.path}' holds a model of the family '{one_line(file.architecture)}', which "
            "transformers does not read from GGUF files; expected one of "
            f"{', '.join(readable)}. Start from the checkpoint that the file was made of."
        )


def complete(config: Any, file: GgufFile) -> Any:
    """Change a config that transformers read from a file to what the file says.

    Raises:
        UnsupportedModelError: it says something that no config of the family can say.
    """
    _complete_windows(config, file)
    _complete_positions(config, file)
    if config.model_type in {"gemma2", "gemma3_text"}:
        _complete_gemma(config, file)
    if config.model_type == "stablelm":
        _complete_stablelm(config, file)
    if config.model_type in {"qwen2_moe", "qwen3_moe"}:
        _complete_experts(config, file)
    return config


def check_complete(model: PreTrainedModel, file: GgufFile) -> None:
    """Refuse a model that took fewer or more numbers than the file holds.

    Raises:
        UnsupportedModelError: with what the reader passed over, as far as it can be told.
    """
    held = sum(size for name, size in file.sizes.items() if not name.startswith("rope_"))
    taken = {id(tensor): tensor.numel() for tensor in model.parameters()}
    buffers = [tensor for name, tensor in model.named_buffers() if name in model.state_dict()]
    has = sum(taken.values()) + sum(tensor.numel() for tensor in buffers)
    if held == has:
        return
    biases = sorted({name.split(".")[-2] for name in file.sizes if name.endswith(".bias")})
    hint = f" The file has biases of {', '.join(biases)}." if biases else ""
    raise UnsupportedModelError(
        f"the GGUF file holds {held:,} numbers, but transformers reads a model of {has:,} from it, "
        f"so the two would compute differently.{hint} Start from the checkpoint that the file was "
        "made of."
    )


def _complete_windows(config: Any, file: GgufFile) -> None:
    flags = file.entry("attention.sliding_window_pattern")
    types = getattr(config, "layer_types", None)
    if types is None or "sliding_attention" not in types:
        return
    if file.entry("attention.sliding_window") is None and file.architecture == "gemma3":
        flags = [False] * len(types)
    if isinstance(flags, list) and len(flags) == len(types):
        config.layer_types = [
            "sliding_attention" if slides else "full_attention" for slides in flags
        ]


def _complete_positions(config: Any, file: GgufFile) -> None:
    said = _scaling(config, file)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        if said:
            raise UnsupportedModelError(
                f"the GGUF file scales its positions ({said['rope_type']}), which transformers "
                f"does not read for models of type '{config.model_type}'."
            )
        return
    rope = dict(rope)
    if "full_attention" in rope:  # layers with a window are never scaled
        rope["full_attention"] = dict(rope["full_attention"]) | said
        base = file.entry("rope.freq_base_swa")
        if base is not None:
            rope["sliding_attention"] = dict(rope["sliding_attention"]) | {"rope_theta": base}
    else:
        rope |= said
    config.rope_parameters = rope


def _scaling(config: Any, file: GgufFile) -> dict[str, Any]:
    """Entries of ``rope_parameters`` by which positions are scaled; none where they are not."""
    bands = file.vector("rope_freqs.weight")
    if bands is not None:
        return _bands(config, bands)
    kind = file.entry("rope.scaling.type")
    factor = file.entry("rope.scaling.factor") or file.entry("rope.scale_linear")
    length = file.entry("rope.scaling.original_context_length")
    if file.vector("rope_factors_long.weight") is not None:
        return _long(config, file, length)
    if kind in (None, "none") and not factor:
        return {}
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor and length:
        betas = {
            name: file.entry(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")
        }
        return {
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": int(length),
            **{name: value for name, value in betas.items() if value is not None},
        }
    raise UnsupportedModelError(
        f"the GGUF file scales its positions in a way that is not read here: {kind}. Start from "
        "the checkpoint that the file was made of."
    )


def _bands(config: Any, factors: Tensor) -> dict[str, Any]:
    """The parameters of Llama 3's scaling from its factors, one for each frequency."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = float(config.rope_parameters["rope_theta"])
    largest = float(factors.max())
    lengths = [config.max_position_embeddings // 2**power for power in range(8)]
    candidates = [*KNOWN_BANDS, *((largest, 1.0, 4.0, length) for length in lengths)]
    for factor, low, high, length in candidates:
        said = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": length,
        }  # fmt: skip
        rope = {"rope_theta": theta, **said}
        trial = type(config)(**{**config.to_dict(), "rope_parameters": rope})
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))
        if torch.allclose(band_factors(theta, frequencies), factors.double(), rtol=1e-4):
            return said
    raise UnsupportedModelError(
        "the GGUF file slows the frequencies of its positions down by factors that are not those "
        "of Llama 3.1 or 3.2. Start from the checkpoint that the file was made of."
    )


def _long(config: Any, file: GgufFile, length: int | None) -> dict[str, Any]:
    short, long = (file.vector(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
    if config.model_type != "phi3" or short is None or long is None or length is None:
        raise UnsupportedModelError(
            "the GGUF file has factors for long positions, which are read for Phi-3 only. Start "
            "from the checkpoint that the file was made of."
        )
    config.original_max_position_embeddings = int(length)
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": int(length),
        "attention_factor": float(file.entry("rope.scaling.attn_factor") or 1.0),
    }


def _complete_gemma(config: Any, file: GgufFile) -> None:
    """Caps; and the scale of attention, which llama.cpp takes from sizes."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = file.entry(name)
        if value is not None or config.model_type == "gemma3_text":
            setattr(config, name, value)
    config.query_pre_attn_scalar = assumed_width(config, GGUF_FAMILIES[config.model_type])
    config.tie_word_embeddings = "output.weight" not in file.sizes


def _complete_stablelm(config: Any, file: GgufFile) -> None:
    if "blk.0.attn_q_norm.weight" in file.sizes:
        raise UnsupportedModelError(
            "the GGUF file norms queries and keys, which transformers does not read for models of "
            "type 'stablelm'. Start from the checkpoint that the file was made of."
        )
    config.use_qkv_bias = "blk.0.attn_q.bias" in file.sizes
    config.use_parallel_residual = "blk.0.ffn_norm.weight" not in file.sizes
    rotated = file.entry("rope.dimension_count")
    if rotated is not None:
        part = rotated / head_width(config)
        config.rope_parameters = dict(config.rope_parameters) | {"partial_rotary_factor": part}


def _complete_experts(config: Any, file: GgufFile) -> None:
    """How wide experts are; and whether the chosen ones' weights sum to one, as in llama.cpp."""
    width = file.sizes["blk.0.ffn_gate_exps.weight"] // (config.num_experts * config.hidden_size)
    config.moe_intermediate_size = width
    config.norm_topk_prob = config.model_type == "qwen3_moe"
    beside = file.sizes.get("blk.0.ffn_gate_shexp.weight")
    if beside is not None:
        config.shared_expert_intermediate_size = beside // config.hidden_size
