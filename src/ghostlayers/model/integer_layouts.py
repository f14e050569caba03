"""GPTQ and AWQ: integers of few bits in words of 32, with a zero and a scale a group of inputs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ghostlayers.model.layouts import (
    WEIGHT,
    HeldParts,
    Layout,
    Parts,
    check_shape,
    other_form,
    unknown_bits,
)

BLOCK = 2**20
"""Numbers that are unpacked at a time: they take many times the room that they have packed."""


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of few bits out of words of 32, lowest bits first; they may cross words.

    Number i has bits i * bits to (i + 1) * bits - 1 of the row, read as one string of bits.

    Args:
        words: int32, [..., words].
        bits: of a number, 1 to 8.
        count: numbers of a row, at most 32 * words / bits.

    Returns:
        int64, [..., count].
    """
    start = torch.arange(count, device=words.device) * bits
    first = start // 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    low = wide[..., first] >> start % 32
    high = wide[..., (first + 1).clamp(max=words.shape[-1] - 1)] << 32 - start % 32
    return (low | high) & (1 << bits) - 1


def blocks(length: int, width: int) -> Iterator[slice]:
    """Slices that cover ``length`` rows of ``width`` numbers, a few at a time."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, length, step):
        yield slice(start, start + step)


@dataclass(frozen=True)
class Gptq(Layout):
    """GPTQ, as AutoGPTQ and GPTQModel write it.

    Of a linear map [in, out]: ``qweight`` int32 [in * bits / 32, out], packed along the inputs;
    ``qzeros`` int32 [groups, out * bits / 32], packed along the outputs; ``scales`` [groups, out];
    ``g_idx`` int32 [in], the group of every input (without it, groups are runs of group_size
    inputs). W[i, o] = (q[i, o] - z[g(i), o]) * s[g(i), o]. The first version of the format
    (``gptq``) holds z - 1, the second (``gptq_v2``) z.

    References:
        Frantar et al., GPTQ, arXiv:2210.17323; the layout is that of AutoGPTQ's ``QuantLinear``.
    """

    ends: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (".qweight", ".qzeros", ".scales", ".g_idx"), WEIGHT
    )
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({".qweight", ".qzeros", ".scales"}),)
    turned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self._version not in ("gptq", "gptq_v2"):
            raise other_form("gptq", "checkpoint_format", self._version, "gptq or gptq_v2")

    @property
    def _version(self) -> object:
        return self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"

    def _setting(self, weight: str, name: str) -> int:
        """A setting of one module: ``dynamic`` holds exceptions, by patterns of names."""
        module = weight.removesuffix(WEIGHT)
        for pattern, changed in (self.settings.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:"), module) and name in changed:
                return int(changed[name])
        return int(self.settings.get(name, {"bits": 4, "group_size": 128}[name]))

    def bits(self, weight: str, parts: HeldParts) -> int:
        """Of a packed number."""
        del parts
        return self._setting(weight, "bits")

    def check(self, weight: str, parts: HeldParts) -> None:
        """Refuse parts that do not fit together; see `Layout.check`."""
        bits = self.bits(weight, parts)
        if bits not in (2, 3, 4, 8):
            raise unknown_bits(weight, bits, "2, 3, 4 or 8")
        packed, scales = parts[".qweight"].shape, parts[".scales"].shape
        inputs = packed[0] * 32 // bits
        check_shape(
            parts[".scales"], (_groups(self._setting(weight, "group_size"), inputs), packed[1])
        )
        check_shape(parts[".qzeros"], (scales[0], -(-packed[1] * bits // 32)))
        if ".g_idx" in parts:
            check_shape(parts[".g_idx"], (inputs,))

    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The weight, [out, in]; see `Layout.unpack`."""
        bits, scales = self._setting(weight, "bits"), parts[".scales"].float()
        inputs, outputs = parts[".qweight"].shape[0] * 32 // bits, scales.shape[1]
        group = parts.get(".g_idx")
        if group is None:
            size = -(-inputs // scales.shape[0])
            group = torch.arange(inputs) // size
        zeros = unpack_bits(parts[".qzeros"], bits, outputs)
        if self._version == "gptq":
            zeros = zeros + 1 & (1 << bits) - 1
        return _by_groups(parts[".qweight"].T, bits, zeros.T, scales.T, group.long())


def _groups(size: int, inputs: int) -> int:
    return 1 if size < 1 else -(-inputs // size)


def _by_groups(packed: Tensor, bits: int, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """(q - z) * s, where column i has the zero and the scale of its group: [out, in]."""
    weight = torch.empty(packed.shape[0], len(group), dtype=torch.float32)
    for rows in blocks(*weight.shape):
        numbers = unpack_bits(packed[rows], bits, len(group))
        weight[rows] = (numbers - zeros[rows][:, group]) * scales[rows][:, group]
    return weight


@dataclass(frozen=True)
class Awq(Layout):
    """AWQ in its layout for matrix products (``gemm``), as AutoAWQ and GPTQModel write it.

    Of a linear map [in, out]: ``qweight`` int32 [in, out / 8], packed along the outputs, eight of
    them a word in the order 0 2 4 6 1 3 5 7; ``qzeros`` int32 [groups, out / 8] in the same order;
    ``scales`` [groups, out]. Groups are runs of group_size inputs.
    W[i, o] = (q[i, o] - z[g(i), o]) * s[g(i), o].

    References:
        Lin et al., AWQ, arXiv:2306.00978; the layout is that of AutoAWQ's ``WQLinear_GEMM``.
    """

    ends: ClassVar[Mapping[str, str]] = dict.fromkeys((".qweight", ".qzeros", ".scales"), WEIGHT)
    needs: ClassVar[tuple[frozenset[str], ...]] = Gptq.needs
    turned: ClassVar[bool] = True

    PLACES: ClassVar[list[int]] = [0, 4, 1, 5, 2, 6, 3, 7]
    """Where in a word output 0, 1, ... of eight lies: the order above, read the other way."""

    def __post_init__(self) -> None:
        entry = next(
            (e for e in ("version", "format", "checkpoint_format") if self.settings.get(e)),
            "version",
        )
        written = str(self.settings.get(entry, "gemm")).lower()
        if written != "gemm":
            raise other_form("awq", entry, written, "gemm")

    def bits(self, weight: str, parts: HeldParts) -> int:
        """Of a packed number."""
        del weight, parts
        return int(self.settings.get("bits") or self.settings.get("w_bit") or 4)

    def check(self, weight: str, parts: HeldParts) -> None:
        """Refuse parts that do not fit together; see `Layout.check`."""
        if self.bits(weight, parts) != 4:
            raise unknown_bits(weight, self.bits(weight, parts), "4")
        inputs, words = parts[".qweight"].shape
        size = self.settings.get("group_size") or self.settings.get("q_group_size") or 128
        check_shape(parts[".scales"], (_groups(int(size), inputs), words * 8))
        check_shape(parts[".qzeros"], (parts[".scales"].shape[0], words))

    def unpack(self, weight: str, parts: Parts) -> Tensor:
        """The weight, [out, in]; see `Layout.unpack`."""
        del weight
        packed, scales = parts[".qweight"], parts[".scales"].float()
        inputs, outputs = packed.shape[0], scales.shape[1]
        size = -(-inputs // scales.shape[0])
        made = torch.empty(outputs, inputs, dtype=torch.float32)
        zeros = self._outputs(parts[".qzeros"])
        for rows in blocks(inputs, outputs):
            group = torch.arange(inputs)[rows] // size
            made[:, rows] = ((self._outputs(packed[rows]) - zeros[group]) * scales[group]).T
        return made

    def _outputs(self, words: Tensor) -> Tensor:
        """[..., out / 8] in words to [..., out] in their own order."""
        numbers = unpack_bits(words, 4, words.shape[-1] * 8)
        by_word = torch.stack(numbers.split(8, dim=-1), dim=-2)
        return by_word[..., self.PLACES].flatten(-2)
