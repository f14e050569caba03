"""A stock checkpoint as one GGUF file, for llama.cpp and what is built on it.

The `gguf` library knows every architecture's tensor names and writes the file; what it lacks is the
step from a checkpoint to it. That is here for families with one uniform stack like Llama's: what
differs between them is in `gguf_families`. Vectors and norms stay in float32, as llama.cpp asks.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ghostlayers.checkpoint.gguf_tensors import file_tensors
from ghostlayers.checkpoint.gguf_tokenizer import (
    add_tokenizer,
    check_tokenizer,
    read_tokenizer,
    splitting_name,
)
from ghostlayers.checkpoint.record import base_title
from ghostlayers.checkpoint.records import inspect
from ghostlayers.errors import (
    ModelError,
    OutputError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
    counted,
)
from ghostlayers.model.computing import DTYPES, dtype_named
from ghostlayers.model.configs import head_width, kv_heads
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.families import PREFIX
from ghostlayers.model.gguf_families import (
    Entry,
    GgufFamily,
    check_facts,
    family_of,
    window_entries,
)
from ghostlayers.model.gguf_file import GgufParts
from ghostlayers.model.gguf_positions import position_entries
from ghostlayers.model.loading import load_model, read_config
from ghostlayers.model.multimodal import check_gguf
from ghostlayers.recipe import Recipe, RunOptions, TypeName
from ghostlayers.runtime import progress
from ghostlayers.runtime.files import check_can_write, check_new, whole_file
from ghostlayers.runtime.locks import continues, holding
from ghostlayers.runtime.places import check_apart
from ghostlayers.runtime.shown import one_line, without_folders
from ghostlayers.spans import format_layers

TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    pre_tokenizer: str | None = None,
    dtype: str = "auto",
    options: RunOptions | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a GGUF file, and prove that it holds the same numbers.

    Args:
        folder: a stock checkpoint, made by Ghostlayers or not.
        out: the file to make.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, where it is not known.
        dtype: of the file's matrices: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the
            checkpoint's own. A processor may round what it multiplies to that type, too.
        options: how much memory the checkpoint may take, and where it lies beyond that.
        overwrite: replace an existing file.

    Raises:
        UnsupportedModelError: the family, its positions or its tokenizer are not handled.
        ModelError: the folder cannot be read, needs code of its own, or holds numbers that the
            type does not reach.
        OutputError: the file exists or cannot be written.
    """
    out, folder = Path(out), Path(folder)
    check_apart({"checkpoint": [folder]}, {"GGUF file": out})
    _check(folder, out, overwrite=overwrite)
    config = _config_of(folder)
    check_gguf(config)
    row = check_facts(config)
    content = read_tokenizer(folder)
    splits = splitting_name(content, pre_tokenizer)
    loaded = load_model(str(folder), _reading(config, options or RunOptions()))
    kind = loaded.stored_dtype if dtype == "auto" else dtype_named(dtype)
    with holding(out, replace=overwrite), whole_file(out) as draft:
        written = _write(draft, folder, loaded, row, kind, content, splits)
        _prove(draft, written, config.vocab_size)
    return out


def _reading(config: Any, options: RunOptions) -> RunOptions:
    """In the type on disk, as nothing is computed, and on the processor."""
    name = str(config.dtype).removeprefix("torch.")
    return RunOptions(
        dtype=cast(TypeName, name) if name in DTYPES else "auto",
        device="cpu",
        offload="auto" if options.offload == "cpu" else options.offload,
        max_memory=options.max_memory,
    )


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a place where no GGUF file can be made.

    Raises:
        OutputError: with the reason.
    """
    if out.suffix != ".gguf":
        raise OutputError(f"'{out}' should end in .gguf.")
    check_can_write(out)
    if not overwrite and not continues(out):
        check_new(out)


def check_exportable(recipe: Recipe, save: str) -> None:
    """Refuse a request whose result could not be written as GGUF, before anything is computed.

    Raises:
        RecipeError: it asks for an adapter, or for operators, which the format has no place for.
    """
    if save != "checkpoint":
        raise RecipeError("--gguf is made from a checkpoint; drop --save adapter.")
    form = recipe.method.form
    if form == "fold" or (form == "norm map" and recipe.export == "stock-layer"):
        return
    raise RecipeError(
        f"repair '{recipe.repair}' adds an operator, which a GGUF file has no place for. "
        "Those that leave a stock checkpoint: --repair refit:3:ridge=auto (nearest to ghost), "
        "replaceme, magnitude, none, or --repair normed --export stock-layer."
    )


def _config_of(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"'{folder}' is of a type that transformers does not have, so it cannot be written as "
            f"a GGUF file: {one_line(error)[:200]}"
        ) from error


def check_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pre_tokenizer: str | None
) -> None:
    """Refuse a model whose checkpoints are not written as GGUF, as far as it shows before the cut.

    Args:
        model: as a whole.
        tokenizer: its own.
        pre_tokenizer: llama.cpp's name for how that splits text; None where it must be known.

    Raises:
        UnsupportedModelError: its family or its tokenizer is not handled.
    """
    check_gguf(model.config)
    family_of(model.config)
    check_tokenizer(tokenizer, pre_tokenizer)


def _check(folder: Path, out: Path, *, overwrite: bool) -> None:
    check_target(out, overwrite=overwrite)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' is not the folder of a checkpoint: it holds no config.json.")
    config = read_config(str(folder))
    kind = str(config.get("model_type"))
    if kind.startswith(PREFIX):
        raise UnsupportedModelError(
            f"'{folder}' carries operators, which llama.cpp has no place for. Prune with a repair "
            "that folds (--repair refit:3:ridge=auto) or with --repair normed --export stock-layer."
        )


def _write(
    path: Path,
    folder: Path,
    loaded: DenseModel,
    row: GgufFamily,
    dtype: torch.dtype,
    content: dict[str, Any],
    splits: str,
) -> dict[str, str]:
    """Write the file, a tensor at a time; return the hash of each, by name."""
    model, config = loaded.network, loaded.network.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[row.architecture])
    writer.add_name(one_line(loaded.base.title or Path(loaded.base.name).name))
    if description := _description(folder):
        writer.add_description(description)
    for name, value in _settings(config, row):
        getattr(writer, f"add_{name}")(value)
    writer.add_file_type(TYPES[dtype][1])
    add_tokenizer(writer, folder, loaded.tokenizer, content, splits, config.vocab_size)
    tensors = file_tensors(model, row, dtype)
    for tensor in tensors:
        shape = tensor.shape(model)
        size = shape.numel() * tensor.dtype.itemsize
        # For float32 the shape counts numbers, as wanted here; the raw type says what they are.
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), size, TYPES[tensor.dtype][0]
        )
    written = {}
    with (
        contextlib.closing(writer),
        progress.stage(f"Writing {counted(len(tensors), 'tensor')}", len(tensors)) as advance,
    ):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data = tensor.read(model).flatten().view(torch.uint8).numpy()
            writer.write_tensor_data(data)
            written[tensor.name] = hashlib.sha256(data.data).hexdigest()
            advance(1)
    return written


def _description(folder: Path) -> str:
    """What was done to the model, as the file says it; nothing if it was not done here."""
    try:
        record = inspect(folder)
    except ModelError:
        return ""
    cut, repair = record["cut"], record["recipe"]["repair"]
    depth = len(cut["removed"]) + len(cut["kept"])
    how = "not repaired" if repair == "none" else f"repaired by {repair}"
    layers = format_layers(cut["removed"])
    name = base_title(record["base_model"])
    sentence = f"{name} without decoder layers {layers} of its {depth}, {how}, by Ghostlayers."
    return one_line(without_folders(sentence))


def _settings(config: Any, row: GgufFamily) -> list[Entry]:
    """What the file says of the model besides its tensors."""
    width = head_width(config)
    return [
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", kv_heads(config)),
        ("key_length", width),
        ("value_length", width),
        _norm_entry(config),
        ("vocab_size", config.vocab_size),
        *position_entries(config, row),
        *window_entries(config, row),
        *row.settings(config),
    ]


def _norm_entry(config: Any) -> Entry:
    """The norms' epsilon, which says by its name what kind of norm they are."""
    if hasattr(config, "rms_norm_eps"):
        return ("layer_norm_rms_eps", config.rms_norm_eps)
    for name in ("layer_norm_eps", "norm_epsilon"):
        if hasattr(config, name):
            return ("layer_norm_eps", getattr(config, name))
    return ("layer_norm_eps", 1e-5)  # OLMo has it in its code


def _prove(path: Path, written: dict[str, str], rows: int) -> None:
    """Read the file again and compare every tensor; each row of the embedding has its token."""
    reader = GgufParts(path)
    if len(reader.fields["tokenizer.ggml.tokens"].data) != rows:
        raise VerificationError("the GGUF file has another number of tokens than of embeddings.")
    if {tensor.name for tensor in reader.tensors} != written.keys():
        raise VerificationError("the GGUF file lacks tensors; nothing was kept.")
    check_tensors(reader, written)


def check_tensors(parts: GgufParts, written: Mapping[str, str]) -> None:
    """Read the tensors of files that were written, and compare them with their hashes.

    Raises:
        VerificationError: one reads differently.
    """
    for path, reader in zip(parts.paths, parts.readers, strict=True):
        with path.open("rb") as file:  # not through the reader's map, which would stay in memory
            for tensor in reader.tensors:
                file.seek(int(tensor.data_offset))
                read = file.read(int(tensor.n_bytes))
                if hashlib.sha256(read).hexdigest() != written[tensor.name]:
                    raise VerificationError(
                        f"'{tensor.name}' reads differently from the GGUF file."
                    )
