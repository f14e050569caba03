"""Tiny random models of many families, for contract tests."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
}


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
