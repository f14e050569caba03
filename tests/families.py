"""Tiny random models of many families, for contract tests."""

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = [
    "sliding_attention",
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "full_attention",
]
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "ministral": {"sliding_window": 6, "layer_types": MIXED},
    "mixtral": MOE,
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "layer_types": MIXED},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "qwen3": {"sliding_window": 6, "use_sliding_window": True, "layer_types": MIXED},
    "qwen3_moe": MOE,
    "gemma": {},
    "gemma2": {"sliding_window": 6, "layer_types": MIXED, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "layer_types": MIXED, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": MIXED},
    "olmoe": MOE,
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "granitemoe": MOE,
    "smollm3": {},
    "cohere": {},
    "cohere2": {"sliding_window": 6, "layer_types": MIXED},
    "stablelm": {},
    "starcoder2": {},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"n_head": 4, "n_layer": 5},
    "gpt2": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_layers": 5, "n_heads": 4, "max_seq_len": 64},
    "glm4": {},
    "exaone4": {"sliding_window": 6, "layer_types": MIXED},
    "bitnet": {},
    "gpt_oss": {**MOE, "sliding_window": 6, "layer_types": MIXED},
    "ernie4_5": {},
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        **MLA,
    },
}


MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 2,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
FAMILIES.update(
    {
        "llama4_text": {
            "num_local_experts": 4,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layer_interval": 3,
            "pad_token_id": 0,
        },
        "qwen3_next": {
            **MOE,
            **LINEAR,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "layer_types": [
                "linear_attention",
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
            ],
        },
        "deepseek_v2": {
            **MLA,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
        "jamba": {
            **MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
            "mamba_d_conv": 2,
            "mamba_dt_rank": 4,
        },
        "bamba": {**MAMBA, "attn_layer_indices": [1, 4]},
        "zamba2": {
            "mamba_d_state": 8,
            "mamba_d_conv": 2,
            "mamba_expand": 2,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        },
        "nemotron_h": {
            "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 4,
            "conv_kernel": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
        "gpt_neo": {
            "num_layers": 5,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2], [["global"], 1]],
            "window_size": 6,
            "num_hidden_layers": None,
        },
        "gpt_bigcode": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64},
        "codegen": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "nemotron": {},
        "phimoe": MOE,
        "glm": {},
        "glm4_moe": {
            **MOE,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
        "arcee": {},
        "helium": {},
        "apertus": {},
        "ernie4_5_moe": {
            **MOE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 2,
        },
        "hunyuan_v1_moe": {**MOE, "moe_topk": 2},
        "dots1": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "layer_types": MIXED,
            "sliding_window": 6,
        },
        "lfm2": {"full_attn_idxs": [1, 4], "layer_types": None, "conv_L_cache": 2},
        "minimax_m2": {**MOE, "rotary_dim": 4},
        "mamba": {"state_size": 4, "conv_kernel": 2, "expand": 2},
        "internlm3": {},
        "cwm": {"sliding_window": 6, "layer_types": MIXED},
        "afmoe": {
            **MOE,
            "num_dense_layers": 2,
            "layer_types": MIXED,
            "sliding_window": 6,
            "num_shared_experts": 1,
        },
        "granitemoeshared": {**MOE, "shared_intermediate_size": 16},
        "granitemoehybrid": {
            **MAMBA,
            **MOE,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention", "mamba", "mamba", "attention"],
        },
        "diffllama": {},
        "flex_olmo": MOE,
        "exaone_moe": {
            **MOE,
            "layer_types": MIXED,
            "sliding_window": 6,
            "n_group": 1,
            "topk_group": 1,
        },
        "ministral3": {},
        "vaultgemma": {"sliding_window": 6, "layer_types": MIXED, "query_pre_attn_scalar": 8},
        "nanochat": {},
        "doge": {},
        "jetmoe": {**MOE, "kv_channels": 8},
        "falcon_mamba": {"state_size": 4, "intermediate_size": 64},
        "xglm": {"d_model": 32, "ffn_dim": 40, "num_layers": 5, "attention_heads": 4},
        "cohere2_moe": {**MOE, "layer_types": MIXED, "sliding_window": 6},
        "solar_open": {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        "mellum": {**MOE, "layer_types": MIXED, "sliding_window": 6},
        "jais2": {},
        "persimmon": {},
        "biogpt": {},
        "olmo_hybrid": {
            **LINEAR,
            "layer_types": [
                "linear_attention",
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
            ],
        },
    }
)


PATTERNED = {
    "zamba2": {"first", "two gaps"},
    "ernie4_5_moe": {"first", "middle", "last"},
    "diffllama": {"last"},
}
"""Families that place kinds of layers by a formula, and the cuts that keep to it."""


NOT_BEFORE = {"lfm2": "5.20", "doge": "5.20"}
"""Families whose own code reads its config or sees padding wrongly in earlier versions."""

FAMILIES = {
    name: each
    for name, each in FAMILIES.items()
    if name in CONFIG_MAPPING_NAMES
    and Version(transformers.__version__) >= Version(NOT_BEFORE.get(name, "5"))
}
"""Those that the installed transformers knows."""


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {**COMMON, **FAMILIES[name], **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = AutoConfig.for_model(name, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # zero-initialised gains would hide a wrong layer
        parameter.requires_grad_(requires_grad=False)
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
