"""Rotary positions as a GGUF file says them: a base, a kind of scaling, factors of frequencies."""

import math
from typing import Any

import gguf
import torch
from torch import Tensor

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.configs import head_width
from ghostlayers.model.gguf_families import Entry, GgufFamily


def position_entries(config: Any, row: GgufFamily) -> list[Entry]:
    """What the file says of a model's positions.

    Raises:
        UnsupportedModelError: positions of this kind are not written.
    """
    rope = _rope(config)
    entries: list[Entry] = [
        ("rope_dimension_count", rotated(config, row)),
        ("rope_freq_base", float(rope["rope_theta"]) * _stretch(config, row, rope)),
    ]
    entries += _local_entries(config, row, rope)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        entries += [
            ("rope_scaling_type", gguf.RopeScalingType.LINEAR),
            ("rope_scaling_factor", float(rope["factor"])),
        ]
    elif kind == "yarn":
        entries += _yarn_entries(config, rope)
    elif kind == "longrope" and row.long_factors:
        entries += _long_entries(config, rope)
    elif not (
        kind == "default"
        or (kind == "llama3" and row.factors)
        or (kind == "dynamic" and row.stretched and rope.get("alpha"))
    ):
        raise UnsupportedModelError(
            f"positions of kind '{kind}' are not written as GGUF here for models of type "
            f"'{config.model_type}'; llama.cpp's own converter takes the folder too."
        )
    return entries


def rotated(config: Any, row: GgufFamily) -> int:
    """Channels of a head that carry positions."""
    part = float(_rope(config).get("partial_rotary_factor", 1.0))
    if part != 1.0 and not row.partial:
        raise UnsupportedModelError(
            f"the model rotates {part:.0%} of a head's channels, but llama.cpp rotates all in "
            f"models of type '{config.model_type}'."
        )
    return int(head_width(config) * part)


def position_tensors(config: Any, rotary: Any) -> dict[str, Tensor]:
    """Tensors of factors by which frequencies are slowed down, where the positions have any.

    Args:
        config: of the model.
        rotary: its rotary embedding, for the frequencies that it computes with.
    """
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"]).float()
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    return {"rope_freqs.weight": band_factors(float(rope["rope_theta"]), rotary.inv_freq).float()}


def band_factors(theta: float, frequencies: Tensor) -> Tensor:
    """By how much each frequency is slower than without scaling, in float64.

    Args:
        theta: the base.
        frequencies: as the model uses them, shape [channels / 2].
    """
    width = 2 * frequencies.numel()
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return plain / frequencies.double().cpu()


def _rope(config: Any) -> dict[str, Any]:
    """The positions of layers with full attention."""
    rope = dict(config.rope_parameters)
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def _local_entries(config: Any, row: GgufFamily, rope: dict[str, Any]) -> list[Entry]:
    """The positions of layers with a window, where they are others: never scaled in llama.cpp."""
    local = dict(config.rope_parameters).get("sliding_attention")
    if local is None:
        return []
    if local.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"layers with a window have positions of kind '{local['rope_type']}', but llama.cpp "
            "computes plain ones there."
        )
    if row.local_base:
        return [("rope_freq_base_swa", float(local["rope_theta"]))]
    if local["rope_theta"] != rope["rope_theta"]:
        raise UnsupportedModelError(
            "layers with and without a window have positions of another base, but llama.cpp has "
            f"one for both in models of type '{config.model_type}'."
        )
    return []


def _stretch(config: Any, row: GgufFamily, rope: dict[str, Any]) -> float:
    """By what the base is multiplied; one where the positions are not stretched."""
    if not (row.stretched and rope.get("rope_type") == "dynamic" and rope.get("alpha")):
        return 1.0
    width = head_width(config)
    return float(float(rope["alpha"]) ** (width / (width - 2)))


def _yarn_entries(config: Any, rope: dict[str, Any]) -> list[Entry]:
    special = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)]
    if special or rope.get("truncate", True) is not True:
        raise UnsupportedModelError(
            f"positions of kind 'yarn' with {', '.join(special) or 'truncate: false'} are not "
            "written as GGUF here; llama.cpp's own converter takes the folder too."
        )
    betas = [name for name in ("beta_fast", "beta_slow") if rope.get(name) is not None]
    return [
        ("rope_scaling_type", gguf.RopeScalingType.YARN),
        ("rope_scaling_factor", float(rope["factor"])),
        ("rope_scaling_orig_ctx_len", _original_length(config, rope)),
        *((f"rope_scaling_yarn_{name}", float(rope[name])) for name in betas),
    ]


def _long_entries(config: Any, rope: dict[str, Any]) -> list[Entry]:
    """One set of factors up to the original length, another beyond; logits grow with the ratio."""
    original = _original_length(config, rope)
    ratio = rope.get("factor") or config.max_position_embeddings / original
    factor = rope.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return [
        ("rope_scaling_orig_ctx_len", original),
        ("rope_scaling_attn_factors", float(factor)),
    ]


def _original_length(config: Any, rope: dict[str, Any]) -> int:
    given = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(given or config.max_position_embeddings)
