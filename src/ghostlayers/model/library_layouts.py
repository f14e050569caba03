"""Formats that a library unpacks, and floats of eight bits, which need none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ghostlayers.errors import ModelError
from ghostlayers.model.layouts import WEIGHT, HeldParts, Layout, Parts, check_shape, other_form
from ghostlayers.model.tensor_files import Held

Part = TypeVar("Part", Held, Tensor)


@dataclass(frozen=True)
class CompressedTensors(Layout):
    """The formats of the library compressed-tensors, which unpacks them itself."""

    library: ClassVar[str | None] = "compressed_tensors"
    ends: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                ".weight_packed",
                ".weight_scale",
                ".weight_zero_point",
                ".weight_shape",
                ".weight_global_scale",
                ".weight_g_idx",
                ".input_scale",
                ".input_zero_point",
                ".input_global_scale",
                ".output_scale",
                ".output_zero_point",
            ),
            WEIGHT,
        ),
        **dict.fromkeys((".q_scale", ".k_scale", ".v_scale"), ""),
    }
    needs: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({".weight_packed", ".weight_scale"}),
        frozenset({"", ".weight_scale"}),
    )

    def __post_init__(self) -> None:
        sparse = self.settings.get("sparsity_config") or {}
        if sparse.get("format", "dense") != "dense":
            raise other_form("compressed-tensors", "sparsity_config", sparse["format"], "dense")

    @cached_property
    def _known(self) -> Any:
        from compressed_tensors.quantization import QuantizationConfig

        fields = QuantizationConfig.model_fields
        return QuantizationConfig.model_validate(
            {name: value for name, value in self.settings.items() if name in fields}
        )

    def _scheme(self, weight: str) -> Any:
        """The group of the config that names a module: by name first, then by class."""
        module = weight.removesuffix(WEIGHT)
        groups = self._known.config_groups.values()
        by_name = [g for g in groups if any(names(target, module) for target in g.targets)]
        by_class = [g for g in groups if any("." not in target for target in g.targets)]
        if not (by_name or by_class):
            raise ModelError(
                f"'{weight}' is packed, but no group of config.json's quantization_config targets "
                f"it; expected one that names '{module}' or 'Linear'. Get the model again."
            )
        return (by_name or by_class)[0]

    def _format(self, weight: str) -> str:
        named = self._scheme(weight).format or self._known.format
        return str(getattr(named, "value", named))

    def bits(self, weight: str, parts: HeldParts) -> int:
        """Of a packed number."""
        return int(self._scheme(weight).weights.num_bits) if ".weight_packed" in parts else 8

    def check(self, weight: str, parts: HeldParts) -> None:
        """Refuse parts that do not fit together; see `Layout.check`."""
        arguments = self._scheme(weight).weights
        if ".weight_g_idx" in parts:
            raise other_form("compressed-tensors", "actorder", "group", "static order")
        if arguments is None:
            raise ModelError(f"'{weight}' is packed, but config.json says nothing of its weights.")
        if not arguments.symmetric and ".weight_zero_point" not in parts:
            raise ModelError(
                f"'{weight}' is packed with zero points by config.json, but the file lacks "
                "'weight_zero_point' beside it. Get the model again."
            )
        if arguments.strategy == "group" and ".weight_packed" in parts:
            packed, size = parts[".weight_packed"].shape, arguments.group_size
            inputs = packed[-1] * 32 // arguments.num_bits
            if inputs % size == 0:  # else the last word need not be full
                check_shape(parts[".weight_scale"], (*packed[:-1], inputs // size))

    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The weight; see `Layout.unpack`."""
        from compressed_tensors.compressors import BaseCompressor

        compressor = BaseCompressor.get_value_from_registry(self._format(weight))
        named = {(end or WEIGHT).removeprefix("."): part for end, part in parts.items()}
        made: Tensor = compressor.decompress(named, self._scheme(weight))["weight"]
        return made


def names(pattern: str, module: str) -> bool:
    """Whether an entry of compressed-tensors' lists is a module's name, or a pattern of it."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module


@dataclass(frozen=True)
class BlockScaled(Layout):
    """Floats of eight bits with a factor a block of the matrix, as DeepSeek published them.

    ``weight`` float8 [out, in]; ``weight_scale_inv`` [ceil(out / rows), ceil(in / columns)], or one
    number for all. W = weight * scale, whatever the name says.
    """

    ends: ClassVar[Mapping[str, str]] = {
        "_scale_inv": "",
        ".qscale_weight": WEIGHT,
        ".activation_scale": WEIGHT,
        ".input_scale": WEIGHT,
        **dict.fromkeys((".k_scale", ".v_scale"), ""),
    }
    needs: ClassVar[tuple[frozenset[str], ...]] = tuple(
        frozenset({"", end}) for end in ("_scale_inv", ".qscale_weight")
    )

    def _scale(self, parts: Mapping[str, Part]) -> Part:
        return next(parts[end] for need in self.needs for end in need - {""} if end in parts)

    def _block(self, shape: torch.Size, scales: torch.Size) -> tuple[int, int]:
        """Rows and columns that have one factor."""
        asked = self.settings.get("weight_block_size") or (0, 0)
        sizes = [-(-size // max(1, count)) for size, count in zip(shape[-2:], scales, strict=True)]
        fits = [
            a > 0 and -(-s // a) == c for a, s, c in zip(asked, shape[-2:], scales, strict=True)
        ]
        return (asked[0], asked[1]) if all(fits) else (sizes[0], sizes[1])

    def check(self, weight: str, parts: HeldParts) -> None:
        """Refuse parts that do not fit together; see `Layout.check`."""
        del weight
        scale = self._scale(parts)
        shape, asked = parts[""].shape, self.settings.get("weight_block_size")
        if scale.shape.numel() > 1 and asked:
            grid = tuple(-(-s // a) for s, a in zip(shape[-2:], asked, strict=True))
            check_shape(scale, (*shape[:-2], *grid))

    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The weight; see `Layout.unpack`."""
        del weight
        packed = parts[""].float()
        scale = self._scale(parts)
        # Factors that are powers of two may be written as their exponents.
        factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        if factors.numel() == 1:
            return packed * factors.reshape(())
        rows, columns = self._block(packed.shape, factors.shape[-2:])
        for row in range(factors.shape[-2]):
            here = slice(row * rows, (row + 1) * rows)
            spread = factors[..., row, :].repeat_interleave(columns, dim=-1)
            packed[..., here, :] *= spread[..., None, : packed.shape[-1]]
        return packed


@dataclass(frozen=True)
class BitsAndBytes(Layout):
    """bitsandbytes: eight bits with a factor a row, or four bits with a table and a factor a block.

    The library unpacks the latter; of the former, W = weight * SCB / 127.
    """

    library: ClassVar[str | None] = "bitsandbytes"
    ends: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                ".nested_absmax",
                ".nested_quant_map",
                ".absmax",
                ".quant_map",
                ".quant_state.bitsandbytes__nf4",
                ".quant_state.bitsandbytes__fp4",
            ),
            "",
        ),
        **dict.fromkeys((".SCB", ".weight_format"), WEIGHT),
    }
    needs: ClassVar[tuple[frozenset[str], ...]] = (
        *(
            frozenset({"", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{kind}"})
            for kind in ("nf4", "fp4")
        ),
        frozenset({"", ".SCB"}),
    )
    turned: ClassVar[bool] = True

    def bits(self, weight: str, parts: HeldParts) -> int:
        """Of a packed number."""
        del weight
        return 8 if ".SCB" in parts else 4

    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The weight, [out, in]; see `Layout.unpack`."""
        del weight
        if ".SCB" in parts:
            return parts[""].float() * (parts[".SCB"].float()[:, None] / 127)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        about = {end.removeprefix("."): part for end, part in parts.items() if end}
        state = QuantState.from_dict(about, parts[""].device)
        made: Tensor = dequantize_4bit(parts[""], state)
        return made


@dataclass(frozen=True)
class Mxfp4(Layout):
    """Experts of gpt-oss: floats of four bits, a factor for every 32; transformers unpacks them."""

    ends: ClassVar[Mapping[str, str]] = {"_blocks": "", "_scales": ""}
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"_blocks", "_scales"}),)

    def bits(self, weight: str, parts: HeldParts) -> int:
        """Of a packed number."""
        del weight, parts
        return 4

    def check(self, weight: str, parts: HeldParts) -> None:
        """Refuse parts that do not fit together; see `Layout.check`."""
        del weight
        check_shape(parts["_scales"], tuple(parts["_blocks"].shape[:-1]))

    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The experts, [experts, in, out]; see `Layout.unpack`."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        del weight
        made: Tensor = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"])
        return made
