"""Bytes of a model's weights in another type: the files that llama.cpp's quantiser makes.

The sizes of blocks are the `gguf` library's. Which tensor gets which type is llama.cpp's own
choice without an importance matrix: vectors and routers stay in 32 bits; the head (or the
embedding that serves as one) is given Q6_K or more; `Q4_K_M` and `Q5_K_M` give Q6_K to the values
and to the MLP's output of the first and last eighth of the layers and of every third between; a
matrix whose rows are no multiple of a block is given the next simpler type. The header, with its
vocabulary, is not counted.
"""

import re
from collections.abc import Sequence

import gguf
from gguf import GGMLQuantizationType as TensorType
from torch import Tensor

from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe.wish import FLOATS, PACKED

TYPES = (*FLOATS, *PACKED)
"""Types whose sizes are known."""

_SIMPLER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes the place of a type with blocks of 256 where rows are no multiple of that."""

_VALUES = re.compile(r"(v_proj|value|\.wv)\b")
_FUSED = re.compile(r"(qkv_proj|query_key_value|c_attn|qkv|Wqkv)\b")
_DOWN = re.compile(r"(down_proj|fc2|dense_4h_to_h|fc_out|\.w2|mlp\.c_proj|ffn\.down)\b")
_ROUTER = re.compile(r"(router|mlp\.gate|block_sparse_moe\.gate)\b")

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def bytes_in_type(dense: DenseModel, kept_layers: Sequence[int], as_type: str) -> int:
    """Bytes of the weights without the layers that went.

    Args:
        dense: the model.
        kept_layers: those that stay.
        as_type: one of `TYPES`, in any case.
    """
    as_type = as_type.lower()
    if as_type in _WIDTHS:
        return _numbers(dense, kept_layers) * _WIDTHS[as_type]
    kind = as_type.upper()
    inside = {id(p) for layer in dense.layers for p in layer.parameters()}
    outside = [(n, p) for n, p in dense.network.named_parameters() if id(p) not in inside]
    head = dense.network.get_output_embeddings()
    ends = None if head is None else id(head.weight)
    size = sum(_size(p, "Q6_K" if id(p) == ends else _plain(kind), n) for n, p in outside)
    if kind == "Q8_0":
        size = sum(_size(p, "Q8_0", n) for n, p in outside)
    for place, layer in enumerate(kept_layers):
        for name, parameter in dense.layers[layer].named_parameters():
            size += _size(parameter, _kind_of(name, kind, place, len(kept_layers)), name)
    return size


def _numbers(dense: DenseModel, kept_layers: Sequence[int]) -> int:
    layers = [sum(p.numel() for p in layer.parameters()) for layer in dense.layers]
    whole = sum(p.numel() for p in dense.network.parameters())
    return whole - sum(layers) + sum(layers[layer] for layer in kept_layers)


def _plain(kind: str) -> str:
    """The type of most matrices of a file."""
    return kind.removesuffix("_M").removesuffix("_S")


def _kind_of(name: str, kind: str, place: int, count: int) -> str:
    """The type of a matrix of the layer at one place of so many."""
    base = _plain(kind)
    values, down = _VALUES.search(name) is not None, _DOWN.search(name) is not None
    if kind in ("Q4_K_M", "Q5_K_M"):
        if _FUSED.search(name):
            return "Q5_K" if kind == "Q4_K_M" else "Q6_K"
        return "Q6_K" if (values or down) and _more_bits(place, count) else base
    if kind == "Q4_K_S" and ((values and place < 4) or (down and place < count // 8)):
        return "Q5_K"
    return base


def _more_bits(place: int, count: int) -> bool:
    """llama.cpp's `use_more_bits`."""
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2


def _size(parameter: Tensor, kind: str, name: str) -> int:
    """Bytes of a tensor that is to have a type, as far as its shape allows."""
    numbers, width = parameter.numel(), parameter.shape[-1]
    if parameter.ndim < 2 or _ROUTER.search(name) or not name.endswith(("weight", "proj")):
        return 4 * numbers
    if width % gguf.GGML_QUANT_SIZES[TensorType[kind]][0]:
        kind = _SIMPLER.get(kind, kind)
    block, size = gguf.GGML_QUANT_SIZES[TensorType[kind]]
    return 2 * numbers if width % block else numbers // block * size
