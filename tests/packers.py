"""Tiny quantised checkpoints, packed number by number as the formats are defined.

Slow and literal: bits are set one number at a time, in Python's integers.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight columns the lowest four bits of a word hold, and so on."""


def signed(word: int) -> int:
    """A word of 32 bits as int32 has it."""
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_column(numbers: list[int], bits: int) -> list[int]:
    """Numbers as one string of bits, lowest first, cut into words."""
    string = sum(number << (bits * place) for place, number in enumerate(numbers))
    words = -(-len(numbers) * bits // 32)
    return [signed(string >> (32 * word) & 0xFFFFFFFF) for word in range(words)]


def quantise(
    weight: torch.Tensor, bits: int, group: list[int], *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [out, in], zeros and scales [groups, out] of a weight [out, in], to the nearest."""
    top, groups = (1 << bits) - 1, max(group) + 1
    found: list[list[list[float]]] = [[], [], []]
    for row in weight.tolist():
        members = [
            [x for x, each in zip(row, group, strict=True) if each == g] for g in range(groups)
        ]
        pairs = [find_scale(part, top, symmetric=symmetric) for part in members]
        numbers = [
            min(max(round(x / pairs[each][1]) + pairs[each][0], 0), top)
            for x, each in zip(row, group, strict=True)
        ]
        for into, values in zip(found, (numbers, *zip(*pairs, strict=True)), strict=True):
            into.append(list(values))
    numbers, zeros, scales = found
    return torch.tensor(numbers), torch.tensor(zeros).T, torch.tensor(scales).T


def find_scale(part: list[float], top: int, *, symmetric: bool) -> tuple[int, float]:
    """Zero and scale, as a file can hold it, of a group of numbers."""
    if symmetric:
        zero, scale = (top + 1) // 2, max(map(abs, part)) / (top / 2)
    else:
        low, high = min(*part, 0.0), max(*part, 0.0)
        scale = (high - low) / top
        zero = round(-low / scale)
    return zero, float(torch.tensor(scale).half())


def meant(
    numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: list[int]
) -> torch.Tensor:
    """The weight [out, in] that the numbers stand for."""
    rows = [
        [(number - zero[each]) * scale[each] for number, each in zip(row, group, strict=True)]
        for row, zero, scale in zip(
            numbers.tolist(), zeros.T.tolist(), scales.T.tolist(), strict=True
        )
    ]
    return torch.tensor(rows)


def gptq_parts(
    weight: torch.Tensor,
    bits: int = 4,
    *,
    version: int = 1,
    order: Callable[[list[int]], list[int]] = list,
    symmetric: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a weight [out, in] in GPTQ's layout, and what they stand for."""
    outputs, inputs = weight.shape
    group = order([place // GROUP for place in range(inputs)])
    numbers, zeros, scales = quantise(weight, bits, group, symmetric=symmetric)
    zeros = zeros.clamp(min=1)  # the first version cannot write 0
    written = zeros - 1 if version == 1 else zeros
    packed = [pack_column(numbers[row].tolist(), bits) for row in range(outputs)]
    parts = {
        "qweight": torch.tensor(packed, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([pack_column(r.tolist(), bits) for r in written], dtype=torch.int32),
        "scales": scales.half(),
        "g_idx": torch.tensor(group, dtype=torch.int32),
    }
    return parts, meant(numbers, zeros, scales, group)


def awq_parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a weight [out, in] in AWQ's layout for products, and what they stand for."""
    group = [place // GROUP for place in range(weight.shape[1])]
    numbers, zeros, scales = quantise(weight, 4, group, symmetric=False)

    def pack_row(row: list[int]) -> list[int]:
        words = []
        for start in range(0, len(row), 8):
            word = 0
            for place, column in enumerate(AWQ_ORDER):
                word |= row[start + column] << (4 * place)
            words.append(signed(word))
        return words

    parts = {
        "qweight": torch.tensor([pack_row(r.tolist()) for r in numbers.T], dtype=torch.int32),
        "qzeros": torch.tensor([pack_row(r.tolist()) for r in zeros], dtype=torch.int32),
        "scales": scales.half(),
    }
    return parts, meant(numbers, zeros, scales, group)


def w4a16_parts(
    weight: torch.Tensor, *, symmetric: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a weight in the format pack-quantized of compressed-tensors, 4 bits."""
    group = [place // GROUP for place in range(weight.shape[1])]
    numbers, zeros, scales = quantise(weight, 4, group, symmetric=symmetric)
    packed = [pack_column(row.tolist(), 4) for row in numbers]
    parts = {
        "weight_packed": torch.tensor(packed, dtype=torch.int32),
        "weight_scale": scales.T.half().contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        columns = [pack_column(column.tolist(), 4) for column in zeros]
        parts["weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).T.contiguous()
    return parts, meant(numbers, zeros, scales, group)


def w8a8_parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a weight in the format int-quantized of compressed-tensors, a scale a row."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).half()
    small = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": small, "weight_scale": scale}, small.float() * scale.float()


def fp8_parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a weight in floats of eight bits, with a factor a block of GROUP by GROUP."""
    rows, columns = weight.shape
    factor = torch.zeros(rows // GROUP, columns // GROUP)
    small, stands_for = torch.zeros(weight.shape).to(torch.float8_e4m3fn), torch.zeros(weight.shape)
    for row in range(0, rows, GROUP):
        for column in range(0, columns, GROUP):
            here = slice(row, row + GROUP), slice(column, column + GROUP)
            scale = weight[here].abs().max() / 448
            factor[row // GROUP, column // GROUP] = scale
            small[here] = (weight[here] / scale).to(torch.float8_e4m3fn)
            stands_for[here] = small[here].float() * scale
    return {"weight": small, "weight_scale_inv": factor}, stands_for


MXFP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""What the lower three bits of a number say; the fourth is its sign."""


def mxfp4_parts(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Blocks and scales of experts [experts, in, out], a scale for 32 inputs, and their values."""
    experts = weight.transpose(1, 2)  # [experts, out, in]
    blocks, scales, found = [], [], []
    for row in experts.reshape(-1, 32).tolist():
        power = 127 + math.ceil(math.log2(max(map(abs, row)) / 6.0))
        codes = []
        for x in row:
            size = abs(x) / 2.0 ** (power - 127)
            code = min(range(8), key=lambda c, size=size: abs(MXFP4_VALUES[c] - size))
            codes.append(code + 8 * (x < 0))
        blocks.append([low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)])
        scales.append(power)
        signs = [-1.0 if code > 7 else 1.0 for code in codes]
        values = [s * MXFP4_VALUES[c % 8] for s, c in zip(signs, codes, strict=True)]
        found.append([v * 2.0 ** (power - 127) for v in values])
    grid = (*experts.shape[:2], experts.shape[2] // 32)
    parts = {
        "blocks": torch.tensor(blocks, dtype=torch.uint8).reshape(*grid, 16),
        "scales": torch.tensor(scales, dtype=torch.uint8).reshape(grid),
    }
    return parts, torch.tensor(found).reshape(experts.shape).transpose(1, 2)


LINEAR = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
FOUR_BITS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
    },
    "w4a16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {**LINEAR, "weights": {**FOUR_BITS, "symmetric": True, "dynamic": False}}
        },
        "ignore": ["lm_head"],
    },
    "w8a8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                **LINEAR,
                "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    },
    "fp8": {
        "quant_method": "fp8",
        "weight_block_size": [GROUP, GROUP],
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
    },
}
PACKERS: dict[str, Callable[..., tuple[dict[str, torch.Tensor], torch.Tensor]]] = {
    "gptq": lambda weight: gptq_parts(weight, symmetric=True),
    "awq": awq_parts,
    "w4a16": w4a16_parts,
    "w8a8": w8a8_parts,
    "fp8": fp8_parts,
}


def pack_folder(
    folder: Path,
    scheme: str,
    *,
    changes: dict[str, Any] | None = None,
    pack: Callable[..., tuple[dict[str, torch.Tensor], torch.Tensor]] | None = None,
    skip: Callable[[str], bool] = lambda name: False,
) -> dict[str, torch.Tensor]:
    """Pack every projection of a plain folder's layers; returns the weights that they stand for.

    Args:
        folder: of a model in one file.
        scheme: a name of `SETTINGS`.
        changes: to the scheme's settings.
        pack: makes the parts of a weight instead of the scheme's packer.
        skip: weights that stay plain, by name.
    """
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight") and not skip(n)]:
        module = name.removesuffix(".weight")
        parts, weights[name] = (pack or PACKERS[scheme])(tensors.pop(name).float())
        tensors |= {f"{module}.{part}": each.contiguous() for part, each in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**SETTINGS[scheme], **(changes or {})}
    (folder / "config.json").write_text(json.dumps(config))
    return weights
