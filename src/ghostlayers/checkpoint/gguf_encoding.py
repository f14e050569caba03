"""Weights as the tensors of a GGUF file hold them, and back.

Both ways go through the `gguf` library. Where it cannot encode a type, as the K-quants, another one
takes its place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.gguf_reader import ReaderTensor
from torch import Tensor

from ghostlayers.errors import NonFiniteError, RecipeError, UnsupportedModelError

FALLBACKS = ("Q8_0", "F16", "BF16", "F32", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that stand in for those that cannot be encoded."""

ROUNDED = 0.01
"""What a 16-bit type may take off a weight as it is read, of the largest."""

TERNARY = frozenset({GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0})
"""Types of weights that were trained to be -1, 0 and 1; what a repair changes no longer is."""


@dataclass(frozen=True)
class Conversion:
    """How a weight of the model becomes a tensor of the file, and how that becomes the weight.

    Attributes:
        to_file: of float32 numbers.
        from_file: its inverse.
    """

    to_file: Callable[[Tensor], Tensor]
    from_file: Callable[[Tensor], Tensor]

    def scaled(self, factor: float) -> "Conversion":
        """The same, where the file holds a multiple of the weight."""
        return Conversion(
            lambda weight: self.to_file(weight) * factor,
            lambda tensor: self.from_file(tensor / factor),
        )


@dataclass(frozen=True)
class Encoded:
    """A tensor of the new file that is not as it was.

    Attributes:
        data: the bytes, in the shape that the library gives them.
        type: how they are to be read.
        before: the type that the tensor had.
        weight: float32, what the model computes with once it has read them.
    """

    data: np.ndarray
    type: GGMLQuantizationType
    before: GGMLQuantizationType
    weight: Tensor


def decoded(tensor: ReaderTensor) -> Tensor:
    """The numbers of a tensor, float32, in the shape that torch gives them.

    Raises:
        UnsupportedModelError: they are of a type that the library cannot read.
    """
    return _numbers(tensor.data, tensor.tensor_type)


def encode(
    weight: Tensor, how: Conversion, before: GGMLQuantizationType, fallback: GGMLQuantizationType
) -> Encoded:
    """A changed weight, in the type that its tensor had or the nearest that can be made.

    Args:
        weight: of the model, of any float type.
        how: it lies in the file.
        before: the tensor's type.
        fallback: where that one cannot be encoded.
    """
    numbers = how.to_file(weight.detach().float().cpu()).contiguous().numpy()
    own = () if before in TERNARY else (before,)
    for kind in (*own, fallback, GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        try:
            with np.errstate(over="ignore"):  # seen below
                data = gguf.quantize(numbers, kind)
        except (NotImplementedError, gguf.QuantError):  # no such encoder, or rows too short for it
            continue
        read = _numbers(data, kind)
        if read.isfinite().all():
            return Encoded(data, kind, before, how.from_file(read))
    raise NonFiniteError("a changed weight holds numbers that are not finite.")


def encoded_bytes(tensor: ReaderTensor, fallback: GGMLQuantizationType) -> int:
    """Bytes of a tensor once its numbers were changed; see `encode`.

    Args:
        tensor: of the file.
        fallback: the type where its own cannot be encoded.
    """
    own = tensor.tensor_type
    kind = own if own.name in FALLBACKS else fallback
    if int(tensor.shape[0]) % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(tensor.n_elements) // block * size


def fallback_named(name: str) -> GGMLQuantizationType:
    """The type of a name.

    Raises:
        RecipeError: it is none that the library encodes.
    """
    if name.upper() not in FALLBACKS:
        raise RecipeError(
            f"--gguf-fallback: expected one of {', '.join(FALLBACKS)}, got '{name[:40]}'."
        )
    return GGMLQuantizationType[name.upper()]


def conversion(name: str, weight: Tensor, tensor: ReaderTensor, heads: set[int]) -> Conversion:
    """How a weight lies in a file, found by comparing the two.

    Args:
        name: of the weight, for the error.
        weight: as transformers read it from this tensor.
        tensor: of the file.
        heads: numbers of heads that rows may be reordered by.

    Raises:
        UnsupportedModelError: in no way that is known here.
    """
    there, own = decoded(tensor), weight.detach().float().cpu()
    ways = [way for way in _conversions(own, heads) if way.to_file(own).shape == there.shape]
    # The nearest, not the first that is near: beside large gains a one more is little.
    errors = [float((way.to_file(own) - there).abs().max()) for way in ways]
    if ways and min(errors) <= ROUNDED * float(there.abs().max()):
        return ways[errors.index(min(errors))]
    raise UnsupportedModelError(
        f"'{tensor.name}' of the GGUF file holds '{name}' of the model in a way that is not "
        "written here. Take a folder as the output, and --gguf for a file in 16 bits."
    )


def _conversions(weight: Tensor, heads: set[int]) -> Iterator[Conversion]:
    yield Conversion(lambda tensor: tensor, lambda tensor: tensor)
    yield Conversion(lambda tensor: tensor + 1, lambda tensor: tensor - 1)  # Gemma's norms
    if weight.ndim == 2:
        yield Conversion(torch.t, torch.t)  # GPT-2's
    for count in sorted(heads):
        if weight.shape[0] % (2 * count) == 0:
            yield _pairs(count)


def _pairs(heads: int) -> Conversion:
    """Rows of Llama's queries and keys: halves in transformers, neighbouring pairs in llama.cpp."""

    def reordered(tensor: Tensor, inner: tuple[int, int]) -> Tensor:
        split = tensor.reshape(heads, *inner, *tensor.shape[1:])
        return split.transpose(1, 2).reshape(tensor.shape)

    def to_file(weight: Tensor) -> Tensor:
        return reordered(weight, (2, weight.shape[0] // heads // 2))

    def from_file(tensor: Tensor) -> Tensor:
        return reordered(tensor, (tensor.shape[0] // heads // 2, 2))

    return Conversion(to_file, from_file)


def _numbers(data: np.ndarray, kind: GGMLQuantizationType) -> Tensor:
    try:
        return torch.from_numpy(np.array(gguf.dequantize(data, kind), dtype=np.float32))
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"the GGUF file holds tensors of type {kind.name}, which the gguf library cannot read."
        ) from error
