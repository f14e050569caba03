"""Tiny random vision-language models of many families, and an image for each."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import MIXED

WORDS = 256
IMAGE, VIDEO, START, END = 250, 251, 252, 253
"""Tokens that stand for a patch of an image, of a video, and for the ends of either."""

TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,  # as many as the text part: they must not be taken for its layers
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 16,
    "patch_size": 4,
}
SIX = [*MIXED, "full_attention"]
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_TOWER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "in_channels": 3,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            "sliding_window": 6,
            "layer_types": SIX,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_id": IMAGE,
        "boi_token_id": START,
        "eoi_token_id": END,
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": QWEN_ROPE},
        "vision_config": {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": QWEN_ROPE},
        "vision_config": {
            **QWEN_TOWER,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": QWEN_ROPE},
        "vision_config": {
            **QWEN_TOWER,
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        **QWEN_TOKENS,
    },
    "llama4": {
        "text_config": {
            **MOE,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layer_interval": 3,
        },
        "vision_config": {
            **TOWER,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
            "intermediate_size": 64,
        },
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": {**TOWER, "model_type": "pixtral"},
        "spatial_merge_size": 2,
        "image_token_index": IMAGE,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IMAGE,
    },
    "llava with pixtral": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": {**TOWER, "model_type": "pixtral"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": IMAGE,
    },
    "llava_next": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_grid_pinpoints": [[16, 32], [32, 16]],
        "image_token_index": IMAGE,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma"},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32},
        "projection_dim": 32,
        "image_token_index": IMAGE,
    },
    "idefics3": {
        "text_config": {"model_type": "llama"},
        "vision_config": TOWER,
        "scale_factor": 2,
        "image_token_id": IMAGE,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "aya_vision": {
        "text_config": {"model_type": "cohere2", "sliding_window": 6, "layer_types": SIX},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "downsample_factor": 2,
    },
    "glm4v": {
        "text_config": {"rope_parameters": {**QWEN_ROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {
            **QWEN_TOWER,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "image_size": 16,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
    },
}
"""Configs by family. A name may say more after the model type."""


def build(name: str, seed: int = 0, **text: Any) -> Any:
    """A tiny random vision-language model, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {**FAMILIES[name]}
    settings["text_config"] = {**TEXT, **settings["text_config"], **text}
    config = CONFIG_MAPPING[name.split()[0]](tie_word_embeddings=False, **settings)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
        # Zero-initialised gains would hide a wrong layer, and such projectors the image.
        if parameter.ndim == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _square(patches: int, **more: Any) -> dict[str, Any]:
    return {"patches": patches, "pixel_values": _pixels(1, 3, 16, 16), **more}


def _grid(patches: int = 4) -> dict[str, Any]:
    """Sixteen patches of 4 x 4, four of which are merged into one."""
    grid = torch.tensor([[1, 4, 4]])
    return {"patches": patches, "pixel_values": _pixels(16, 48), "image_grid_thw": grid}


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


IMAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "gemma3": lambda: _square(4),
    "qwen2_vl": _grid,
    "qwen2_5_vl": _grid,
    "qwen3_vl": _grid,
    "glm4v": _grid,
    "llama4": lambda: _square(4),
    "mistral3": lambda: _square(4, image_sizes=torch.tensor([[16, 16]])),
    "llava": lambda: _square(16),
    "llava with pixtral": lambda: _square(16, image_sizes=torch.tensor([[16, 16]])),
    "llava_next": lambda: {
        "patches": 52,
        "pixel_values": _pixels(1, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32]]),
    },
    "paligemma": lambda: _square(16),
    "idefics3": lambda: {"patches": 4, "pixel_values": _pixels(1, 1, 3, 16, 16)},
    "internvl": lambda: _square(4),
    "aya_vision": lambda: _square(4),
}


def question(name: str) -> dict[str, torch.Tensor]:
    """An image between some words, as the model is called with it."""
    inputs = IMAGES[name]()
    patches = inputs.pop("patches")
    before, after = torch.arange(10, 15), torch.arange(30, 40)
    image = torch.full((patches,), IMAGE)
    ids = torch.cat([before, torch.tensor([START]), image, torch.tensor([END]), after])[None]
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    if name in ("gemma3", "paligemma"):
        seen["token_type_ids"] = (ids == IMAGE).long()
    if "image_grid_thw" in inputs:
        seen["mm_token_type_ids"] = (ids == IMAGE).int()
    return seen
