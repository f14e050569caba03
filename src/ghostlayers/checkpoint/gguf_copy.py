"""A GGUF file without some of its layers: what a cut leaves alone is copied, byte for byte.

Metadata and tensors go through the `gguf` library, a tensor at a time. Blocks get new numbers, and
entries of the header that count them new values; what a repair changed is encoded anew. What
transformers reads from the new file is then compared with the model in memory.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_reader import ReaderTensor
from torch import Tensor

from ghostlayers.checkpoint.gguf_encoding import Conversion, Encoded, conversion, encode
from ghostlayers.checkpoint.gguf_export import check_tensors
from ghostlayers.checkpoint.packed import layers_path
from ghostlayers.checkpoint.packed_config import Renaming
from ghostlayers.checkpoint.proof import Verification, compare_logits
from ghostlayers.checkpoint.records import GGUF_RECORD
from ghostlayers.errors import RecipeError, UnsupportedModelError, VerificationError, counted
from ghostlayers.model.configs import kv_heads
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_file import (
    GgufFile,
    GgufParts,
    Value,
    for_transformers,
    header_entries,
    open_gguf,
)
from ghostlayers.model.gguf_header import header_after, scaled_queries
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import progress
from ghostlayers.runtime.documents import to_json
from ghostlayers.runtime.files import check_new, whole_files
from ghostlayers.runtime.locks import continues, holding
from ghostlayers.runtime.places import part_name
from ghostlayers.runtime.shown import shared
from ghostlayers.surgery import removal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GgufCut:
    """What the new file will hold.

    Attributes:
        file: of the dense model.
        kept: the layers that stay, in its numbering.
        header: entries that change; None for those that go.
        encoded: changed tensors, by their names in the new file.
        network: the cut model as it is read from the new file, where changed weights have the
            values that their types allow.
        exact: the dense model's weights are those of its file, and not rounded to 16 bits.
    """

    file: GgufFile
    kept: tuple[int, ...]
    header: Mapping[str, Value | None]
    encoded: Mapping[str, Encoded]
    network: "PreTrainedModel"
    exact: bool

    @property
    def lossy(self) -> bool:
        """Whether the network is another one than the one that was repaired."""
        return any(one.type != GGMLQuantizationType.F32 for one in self.encoded.values())

    @property
    def types(self) -> dict[str, tuple[str, str]]:
        """Types of the changed tensors by name: what each was, and what it is."""
        return {name: (one.before.name, one.type.name) for name, one in self.encoded.items()}

    def tensors(self) -> Iterator[tuple[str, ReaderTensor | Encoded]]:
        """Names in the new file, and what they hold, in the order of the dense model's file."""
        move = _blocks(self.kept)
        for old, tensor in self.file.tensors.items():
            name = move(old)
            if name is not None:
                yield name, self.encoded.get(name, tensor)


def cut_gguf(
    dense: DenseModel,
    pruned: "PreTrainedModel",
    kept: Sequence[int],
    fallback: GGMLQuantizationType,
) -> GgufCut:
    """What a file of a cut model holds; nothing is written.

    Args:
        dense: read from a GGUF file.
        pruned: as `removal.prune_layers` returns it; unchanged.
        kept: the layers that stay, in the dense model's numbering.
        fallback: the type of changed tensors whose own cannot be encoded.

    Raises:
        UnsupportedModelError: llama.cpp would compute something else from any such file.
    """
    assert dense.base.file is not None
    file = open_gguf(dense.base.file)
    header = header_after(file, dense.config, pruned.config, kept)
    move = _blocks(kept)
    encoded, weights = {}, {}
    for name, weight, tensor, how in _changes(file, dense, pruned, kept):
        one = encode(weight, how, tensor.tensor_type, fallback)
        encoded[str(move(tensor.name))] = one
        weights[name] = one.weight.to(dense.stored_dtype).to(weight)
    network = removal.with_weights(pruned, weights)
    return GgufCut(file, tuple(kept), header, encoded, network, dense.stored_dtype == torch.float32)


def write_gguf_cut(
    cut: GgufCut,
    out: Path,
    record: Mapping[str, Any],
    *,
    split: int = 0,
    overwrite: bool = False,
) -> tuple[list[Path], Verification]:
    """Write the file, and prove that it reads as the model in memory.

    Args:
        cut: what it holds.
        out: the file to make.
        record: how the model was made; it goes into the header.
        split: start another file where one would exceed so many bytes; 0 makes one.
        overwrite: replace files of that name.

    Returns:
        The files, and how the model that is read from them compares.

    Raises:
        OutputError: a file exists, or cannot be written.
        VerificationError: what is read differs; nothing is left behind.
    """
    writer = _Writer(cut, record, split)
    paths = writer.names(out)
    with holding(out, replace=overwrite):
        for path in paths:
            if not overwrite and not continues(out, path):
                check_new(path)
        with whole_files(out, paths) as drafts:
            written = writer.write(drafts)
            _prove_bytes(drafts[0], cut, written)
            verification = _prove_model(drafts[0], cut)
    return paths, verification


def split_size(text: str) -> int:
    """The bytes of a size such as ``4G`` or ``500M``, as llama.cpp counts them.

    Raises:
        RecipeError: it is something else.
    """
    match = re.fullmatch(r"(\d{1,9})([MG])", text.strip().upper())
    if match is None or not int(match[1]):
        raise RecipeError(f"--gguf-split: expected a size such as 4G or 500M, got '{text[:40]}'.")
    return int(match[1]) * {"M": 1000**2, "G": 1000**3}[match[2]]


class _Writer(GGUFWriter):
    """Writes the tensors of a cut into drafts."""

    def __init__(self, cut: GgufCut, record: Mapping[str, Any], split: int) -> None:
        super().__init__(
            None, cut.file.architecture, endianess=cut.file.parts.endianess, split_max_size=split
        )
        self.cut, self.drafts = cut, list[Path]()
        self.data_alignment = cut.file.parts.alignment
        for key, value in _entries(cut, record):
            self.add_key_value(key, value[0], value[1], sub_type=value[2])
        for name, tensor in cut.tensors():
            kind = tensor.type if isinstance(tensor, Encoded) else tensor.tensor_type
            data = tensor.data
            self.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)

    def names(self, out: Path) -> list[Path]:
        """What the files are called."""
        count = len(self.tensors)
        if count == 1:
            return [out]
        return [out.with_name(part_name(out.stem, 1 + i, count)) for i in range(count)]

    def format_shard_names(self, path: Path) -> list[Path]:
        del path
        return self.drafts

    def write(self, drafts: list[Path]) -> dict[str, str]:
        """Write everything; return the hash of every tensor's bytes."""
        self.drafts, hashes = drafts, {}
        tensors = dict(self.cut.tensors())
        with (
            contextlib.closing(self),
            progress.stage(f"Writing {counted(len(tensors), 'tensor')}", len(tensors)) as advance,
        ):
            self.write_header_to_file(drafts[0])
            self.write_kv_data_to_file()
            self.write_ti_data_to_file()
            for name, tensor in tensors.items():
                data = np.ascontiguousarray(tensor.data)
                own = None if isinstance(tensor, Encoded) else self.endianess
                self.write_tensor_data(data, tensor_endianess=own)
                hashes[name] = hashlib.sha256(data.view(np.uint8).data).hexdigest()
                advance(1)
        return hashes


def _blocks(kept: Sequence[int]) -> Renaming:
    """How tensors are called once their blocks have new numbers."""
    return Renaming("blk", "blk", {old: new for new, old in enumerate(kept)})


def _entries(cut: GgufCut, record: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """The new header: the old one's entries in their order, then what is new."""
    new = {**cut.header, GGUF_RECORD: (to_json(shared(dict(record))), GGUFValueType.STRING, None)}
    for key, before in header_entries(cut.file.parts):
        value = new.pop(key, before)
        if value is not None:
            yield key, value
    yield from ((key, value) for key, value in new.items() if value is not None)


Change = tuple[str, Tensor, ReaderTensor, Conversion]
"""A weight's name in the cut model, the weight, its tensor in the dense model's file, and how."""


def _changes(
    file: GgufFile, dense: DenseModel, pruned: "PreTrainedModel", kept: Sequence[int]
) -> Iterator[Change]:
    """The weights that are not the dense model's, or of which the file holds another multiple."""
    rescaled, factor = scaled_queries(pruned.config)
    names = None
    path = layers_path(dense.network)
    back = Renaming(path, path, dict(enumerate(kept)))
    for name, weight in pruned.named_parameters():
        old = str(back(name))
        own = dense.network.get_parameter(old)
        scales = factor != 1.0 and name.split(".")[-2] == rescaled
        if weight is own and not scales:
            continue
        names = names or _names_in_file(dense.network)
        tensor = _tensor_of(file, names.get(old, []), old)
        config = dense.config
        heads = {int(getattr(config, "num_attention_heads", 1)), kv_heads(config)}
        how = conversion(old, own, tensor, heads)
        yield name, weight, tensor, how.scaled(factor) if scales else how


def _names_in_file(network: "PreTrainedModel") -> dict[str, list[str]]:
    """Tensors of the file by weight of the model, as transformers' reader pairs them."""
    from transformers import modeling_gguf_pytorch_utils as reader

    processors = reader.TENSOR_PROCESSORS
    kind = str(network.config.model_type)
    spellings = {kind, kind.replace("_", ""), kind.replace("_", "-"), kind.removesuffix("_text")}
    make = next((processors[name] for name in spellings if name in processors), None)
    with for_transformers():
        pairs = reader.get_gguf_hf_weights_map(
            network, (make or reader.TensorProcessor)(config=network.config.to_dict())
        )
    names: dict[str, list[str]] = {}
    for there, here in pairs.items():
        names.setdefault(here, []).append(there)
    return names


def _tensor_of(file: GgufFile, names: Sequence[str], weight: str) -> ReaderTensor:
    there = [name for name in names if name in file.tensors]
    if len(there) != 1:
        raise UnsupportedModelError(
            f"the GGUF file has no tensor of its own for '{weight}', which the repair changes: "
            f"{', '.join(there) or 'none'}. Take a folder as the output, and --gguf for a file in "
            "16 bits."
        )
    return file.tensors[there[0]]


def _prove_bytes(path: Path, cut: GgufCut, written: Mapping[str, str]) -> None:
    """Read every tensor and entry again: what was copied is as it was."""
    parts = GgufParts(path)
    if [tensor.name for tensor in parts.tensors] != list(written):
        raise VerificationError("the GGUF file lacks tensors; nothing was kept.")
    check_tensors(parts, written)
    again = dict(header_entries(parts))
    for key, value in header_entries(cut.file.parts):
        if key not in cut.header and key != GGUF_RECORD and again.get(key) != value:
            raise VerificationError(f"'{key}' reads differently from the GGUF file.")


def _prove_model(path: Path, cut: GgufCut) -> Verification:
    kind: Any = str(cut.network.dtype).removeprefix("torch.")
    device = str(next(cut.network.parameters()).device)
    again = load_model(str(path), RunOptions(dtype=kind, device=device), exact=cut.exact)
    return compare_logits(again.network, cut.network)
