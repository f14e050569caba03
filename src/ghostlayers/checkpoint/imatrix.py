"""An importance matrix as llama.cpp reads it: a GGUF file of squares of what is multiplied.

For each matrix ``NAME`` of the model's GGUF file there are ``NAME.in_sum2``, the sums of the
squares of its inputs [experts, input channels], and ``NAME.counts``, the tokens behind them
[experts, 1]; a matrix that all tokens pass counts as one expert. As llama.cpp's own program, it
holds those of the decoder layers only. Reordered rows of queries and keys change no input.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostlayers.checkpoint.gguf_tensors import file_tensors
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.gguf_families import check_facts
from ghostlayers.runtime.files import shown_name, whole_file
from ghostlayers.runtime.locks import holding
from ghostlayers.text.tokens import Windows


def named_for_llama_cpp(
    network: PreTrainedModel, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts by the names of the matrices in the model's GGUF file.

    Args:
        network: a stock model of a family that is written as GGUF.
        sums: by the names of its own weights, [experts, input channels].
        counts: of tokens, by the same names, [experts].

    Raises:
        UnsupportedModelError: no input of a matrix was seen.
    """
    entries = {}
    for tensor in file_tensors(network, check_facts(network.config), torch.float16):
        (source, *others) = tensor.sources or ("",)
        if others or source not in sums or len(tensor.shape(network)) < 2:
            continue
        if not counts[source].any():
            raise UnsupportedModelError(
                f"nothing was seen to be multiplied with '{source}', so this model has no "
                "importance matrix here; llama.cpp's own llama-imatrix makes one from the 16-bit "
                "file."
            )
        entries[tensor.name] = (sums[source], counts[source])
    return entries


def write_imatrix(
    out: Path,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    *,
    text: str,
    windows: Windows,
    overwrite: bool = False,
) -> Path:
    """Write an importance matrix, whole or not at all.

    Args:
        out: the file to make.
        rows: sums and counts, as `named_for_llama_cpp` gives them.
        text: the name of what was read.
        windows: what was read.
        overwrite: replace an existing file.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    with holding(out, replace=overwrite), whole_file(out) as draft:
        writer = gguf.GGUFWriter(draft, arch="")
        with contextlib.closing(writer):
            writer.add_type(gguf.GGUFType.IMATRIX)
            writer.add_array(gguf.Keys.IMatrix.DATASETS, [shown_name(text)])
            writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, len(windows))
            writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, windows.sequence_length)
            for name, (sums, counts) in rows.items():
                writer.add_tensor(f"{name}.in_sum2", sums.float().numpy())
                writer.add_tensor(f"{name}.counts", counts.float()[:, None].numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    return out
