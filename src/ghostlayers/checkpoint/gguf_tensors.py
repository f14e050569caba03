"""Which tensors a GGUF file holds, from which weights of the model, and in which type.

Nothing is read here: each tensor of the file knows the names of its weights and what to do with
them, so that a file can be written a tensor at a time, from a model that lies on disk.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlayers.errors import ModelError, UnsupportedModelError
from ghostlayers.model.configs import kv_heads
from ghostlayers.model.gguf_families import GgufFamily, query_factor
from ghostlayers.model.gguf_positions import position_tensors
from ghostlayers.model.residency import read_tensor

Change = Callable[[Tensor], Tensor]

_PACKED = re.compile(r"(experts\.(?:gate_up|down)_proj)(_bias)?$")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        sources: weights of the model that it is made of, as many tensors of one shape.
        changes: what is done with the one, or the stacked, in this order.
        dtype: how it is stored.
        value: the tensor itself, where it comes from no weight.
    """

    name: str
    sources: tuple[str, ...]
    changes: tuple[Change, ...]
    dtype: torch.dtype
    value: Tensor | None = None

    def shape(self, model: PreTrainedModel) -> torch.Size:
        """Found without reading a weight."""
        if self.value is not None:
            return self.value.shape
        return self._made([_shaped(model, name) for name in self.sources]).shape

    def read(self, model: PreTrainedModel) -> Tensor:
        """As it is stored, on the processor.

        Raises:
            ModelError: its type does not reach its numbers.
        """
        if self.value is not None:
            return self.value.to(self.dtype).contiguous()
        made = self._made([read_tensor(model, name).cpu() for name in self.sources])
        stored = made.to(self.dtype)
        if self.dtype == torch.float16 and not stored.isfinite().all():
            raise ModelError(
                f"'{self.name}' holds {float(made.abs().max()):.4g}, and float16 ends at 65504; "
                "choose --dtype bfloat16 or float32."
            )
        return stored.contiguous()

    def _made(self, tensors: list[Tensor]) -> Tensor:
        tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        for change in self.changes:
            tensor = change(tensor)
        return tensor


def file_tensors(model: PreTrainedModel, row: GgufFamily, dtype: torch.dtype) -> list[FileTensor]:
    """Every tensor of the file, in the order of the model's layers.

    Args:
        model: a stock model, which may lie on disk.
        row: its family.
        dtype: the type of the file; vectors, norms and what is computed anew are float32.

    Raises:
        UnsupportedModelError: llama.cpp has no place for a weight.
    """
    config = model.config
    if row.head == "tied" and not _is_embedding(model):
        raise UnsupportedModelError(
            "llama.cpp takes this family's embedding for its head, but the head is another one."
        )
    names = gguf.get_tensor_name_map(row.architecture, config.num_hidden_layers)
    tensors = []
    for name, sources in _stacked(model.state_dict()).items():
        if name == "lm_head.weight" and row.head != "own" and _is_embedding(model):
            continue
        if name.endswith(".bias") and _drops(model, name, row):
            continue
        for part, changes in _parts(name, row):
            new = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if new is None:
                raise UnsupportedModelError(f"llama.cpp has no place for '{name}' of this model.")
            changes += _conversions(config, row, part)
            one = FileTensor(new, sources, changes, torch.float32)
            tensors.append(one if _exact(config, row, one, model) else _with_type(one, dtype))
    for name, tensor in position_tensors(config, model.model.rotary_emb).items():
        tensors.append(FileTensor(name, (), (), torch.float32, tensor))
    return tensors


def _is_embedding(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding, whatever the config says."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def _with_type(one: FileTensor, dtype: torch.dtype) -> FileTensor:
    return FileTensor(one.name, one.sources, one.changes, dtype)


def _exact(config: Any, row: GgufFamily, one: FileTensor, model: PreTrainedModel) -> bool:
    """Whether it is float32: a vector, a norm, a router, or computed anew."""
    if len(one.shape(model)) == 1 or "norm" in one.name or "ffn_gate_inp" in one.name:
        return True
    return "attn_q." in one.name and query_factor(config, row) != 1.0


def _shaped(model: PreTrainedModel, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    held: Tensor = getattr(model.get_submodule(path), leaf)
    return torch.empty(held.shape, device="meta")


def _stacked(state: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Names with their sources; StableLM's norms of heads (``....norms.0.weight``) are rows."""
    joined: dict[str, tuple[str, ...]] = {}
    for name in state:
        before, separator, _ = name.partition(".norms.")
        key = f"{before}.weight" if separator else name
        joined[key] = (*joined.get(key, ()), name)
    return joined


def _parts(name: str, row: GgufFamily) -> Iterator[tuple[str, tuple[Change, ...]]]:
    """The tensors that one weight becomes: packed gates and ups of experts are two there."""
    name = _PACKED.sub(lambda match: f"{match[1]}.{'bias' if match[2] else 'weight'}", name)
    for old, new in row.renamed:
        name = name.replace(old, new)
    for packed, owner in ((".experts.gate_up_proj.", ".experts"), (".input_linear.", "")):
        before, separator, after = name.rpartition(packed)
        if separator:
            yield f"{before}{owner}.gate_proj.{after}", (partial(_half, index=0),)
            yield f"{before}{owner}.up_proj.{after}", (partial(_half, index=1),)
            return
    yield name, ()


def _half(tensor: Tensor, *, index: int) -> Tensor:
    return tensor.chunk(2, dim=-2)[index]


def _drops(model: PreTrainedModel, name: str, row: GgufFamily) -> bool:
    """Whether llama.cpp reads no such bias and none is missed: it is zero."""
    module = name.split(".")[-2]
    if "norm" in module or module in row.biases:
        return False
    if read_tensor(model, name).any():
        raise UnsupportedModelError(
            f"llama.cpp reads no bias of '{module}' in models of this type, but '{name}' is not "
            "zero. Serve this model with another engine."
        )
    return True


def _conversions(config: Any, row: GgufFamily, name: str) -> tuple[Change, ...]:
    """What llama.cpp computes with instead of the weight, in float32 where numbers change."""
    module = name.split(".")[-2]
    changes: list[Change] = []
    if row.shifted and module.endswith("norm"):
        changes.append(lambda tensor: tensor.float() + 1.0)
    if module == row.scaled and query_factor(config, row) != 1.0:
        changes.append(lambda tensor: tensor.float() * query_factor(config, row))
    heads = {"q_proj": config.num_attention_heads, "k_proj": kv_heads(config)}
    if row.pairs and module in heads:
        changes.append(partial(_paired, heads=heads[module]))
    if module == "shared_expert_gate":
        changes.append(torch.flatten)
    return tuple(changes)


def _paired(tensor: Tensor, *, heads: int) -> Tensor:
    """Rows of queries or keys from halves to neighbouring pairs, a head at a time."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
