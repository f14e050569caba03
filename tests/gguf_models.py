"""Tiny models of every family that is written as GGUF, and of what such files must say."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from families import build

LENGTH = 40
IDS = torch.arange(LENGTH)[None] * 7 % 200 + 30
WINDOW = {"sliding_window": 8}
WHOLE = {"use_sliding_window": False, "layer_types": ["full_attention"] * 5}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": WHOLE,
    "qwen3": WHOLE,
    "exaone4": {"sliding_window": None, "layer_types": WHOLE["layer_types"]},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": WHOLE,
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "olmo3": WINDOW,
    "cohere2": WINDOW,
}


def family(name: str, **changes: Any) -> Any:
    """A tiny model whose attention looks sharply at few tokens: positions and windows matter."""
    settings = {"vocab_size": 256, "num_hidden_layers": 5, **CHANGES.get(name, {}), **changes}
    model = build(name, **settings)
    for layer in model.model.layers:
        attention = layer.self_attn
        if name in {"mistral", "exaone4"}:
            attention.sliding_window = None
        for each in ("q_proj", "k_proj", "qkv_proj"):
            if hasattr(attention, each):
                getattr(attention, each).weight *= 12
    if name in {"mistral", "exaone4"}:
        model.config.sliding_window = None
    return model


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.4],
        "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 16}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
BANDS = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "frequency bands": ("llama", {"rope_parameters": BANDS}),
    "bands, granite": ("granite", {"rope_parameters": BANDS}),
    "linear": ("llama", {"rope_parameters": PLAIN | {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "yarn with betas": ("llama", {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2}}),
    "yarn in full layers only": (
        "olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    ),
    "linear in full layers only": (
        "gemma3_text",
        {"rope_parameters": {
            "full_attention": PLAIN | {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": PLAIN | {"rope_theta": 500.0},
        }},
    ),
    "short and long": ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 64,
                                "original_max_position_embeddings": 16}),
    "scale of another width": ("gemma3_text", {"query_pre_attn_scalar": 24}),
    "scale of another width, in the weights": ("gemma2", {"query_pre_attn_scalar": 24}),
    "untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "tied, written twice": ("olmo2", {"tie_word_embeddings": True}),
    "normed heads, parallel": (
        "stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "clamped": ("olmo", {"clip_qkv": 0.02}),
    "stretched": ("hunyuan_v1_dense", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}}),
    "as deep as the largest": ("gemma3_text", {
        "num_hidden_layers": 62, "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 31}),
    "normed heads by depth": ("cohere", {"num_hidden_layers": 64, "use_qk_norm": True}),
    "no window left": ("gemma2", {"layer_types": ["full_attention"] * 5}),
    "windows only": ("gemma2", {"layer_types": ["sliding_attention"] * 5}),
    "windows only, gemma3": ("gemma3_text", {"layer_types": ["sliding_attention"] * 5}),
    "no window left, gemma3": ("gemma3_text", {"layer_types": ["full_attention"] * 5}),
    "no window left, olmo3": ("olmo3", {"layer_types": ["full_attention"] * 5}),
}  # fmt: skip


def write(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_a_merge(folder: Path) -> Path:
    """The byte tokenizer with one merge: transformers reads none from a file without merges."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    last = max(words, key=lambda word: words[word])
    words["th"] = words.pop(last)
    content["model"]["merges"] = [["t", "h"]]
    path.write_text(json.dumps(content))
    return folder


def a_header(architecture: str, depth: int, tmp_path: Path, **said: Any) -> Path:
    """A file with no more than a header and a tensor a layer."""
    path = tmp_path / f"{architecture}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(depth)
    writer.add_embedding_length(8)
    for name, value in said.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for layer in range(depth):
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
