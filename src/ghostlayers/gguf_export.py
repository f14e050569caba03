"""A stock checkpoint as one GGUF file, for llama.cpp and what is built on it.

The `gguf` library knows every architecture's tensor names and writes the file; what it lacks is the
step from a checkpoint to it. That is here for families with one uniform stack like Llama's: what
differs between them is in `gguf_families`. Vectors and norms stay in float32, as llama.cpp asks.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ghostlayers.configs import head_width, kv_heads
from ghostlayers.errors import (
    ModelError,
    OutputError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)
from ghostlayers.families import PREFIX
from ghostlayers.files import check_can_write, whole_file
from ghostlayers.gguf_families import (
    Entry,
    GgufFamily,
    check_facts,
    family_of,
    norm_entry,
    query_factor,
    window_entries,
)
from ghostlayers.gguf_positions import position_entries, position_tensors
from ghostlayers.gguf_tokenizer import add_tokenizer, read_tokenizer, splitting_name
from ghostlayers.loading import LoadedModel, load_model, read_config
from ghostlayers.progress import Progress, Silent
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import find_method

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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint as a GGUF file, and prove that it holds the same numbers.

    Args:
        folder: a stock checkpoint, made by Ghostlayers or not.
        out: the file to make.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, where it is not known.
        overwrite: replace an existing file.
        progress: told of every tensor.

    Raises:
        UnsupportedModelError: the family, its positions or its tokenizer are not handled.
        ModelError: the folder cannot be read, or needs code of its own.
        OutputError: the file exists or cannot be written.
    """
    out, folder = Path(out), Path(folder)
    _check(folder, out, overwrite=overwrite)
    row = check_facts(AutoConfig.from_pretrained(folder))
    content = read_tokenizer(folder)
    splits = pre_tokenizer or splitting_name(content)
    loaded = load_model(str(folder), RunOptions(dtype="float32", device="cpu"))
    with whole_file(out) as draft:
        tensors = _write(draft, folder, loaded, row, content, splits, progress or Silent())
        _prove(draft, tensors)
    return out


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a place where no GGUF file can be made.

    Raises:
        OutputError: with the reason.
    """
    if out.suffix != ".gguf":
        raise OutputError(f"'{out}' should end in .gguf.")
    if out.exists() and not overwrite:
        raise OutputError(f"'{out}' exists already; choose another name or pass --overwrite.")
    check_can_write(out)


def check_exportable(recipe: Recipe, save: str) -> None:
    """Refuse a request whose result could not be written as GGUF, before anything is computed.

    Raises:
        RecipeError: it asks for an adapter, or for operators, which the format has no place for.
    """
    if save != "checkpoint":
        raise RecipeError("--gguf is made from a checkpoint; drop --save adapter.")
    form = find_method(recipe.repair).form
    if form == "fold" or (form == "norm map" and recipe.export == "stock-layer"):
        return
    raise RecipeError(
        f"--gguf: repair '{recipe.repair}' adds an operator, which llama.cpp has no place for. "
        "Those that leave a stock checkpoint: --repair refit:3 (nearest to ghost), replaceme, "
        "magnitude, none, or --repair normed --export stock-layer."
    )


def check_model(config: Any, name: str, pre_tokenizer: str | None) -> None:
    """Refuse a model whose checkpoints are not written as GGUF, as far as it shows before the cut.

    Raises:
        UnsupportedModelError: its family or its tokenizer is not handled.
    """
    family_of(config)
    if pre_tokenizer is None and (Path(name) / "tokenizer.json").is_file():
        splitting_name(read_tokenizer(Path(name)))


def _check(folder: Path, out: Path, *, overwrite: bool) -> None:
    check_target(out, overwrite=overwrite)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' is not the folder of a checkpoint: it holds no config.json.")
    config = read_config(str(folder))
    kind = str(config.get("model_type"))
    if kind.startswith(PREFIX):
        raise UnsupportedModelError(
            f"'{folder}' carries operators, which llama.cpp has no place for. Prune with a repair "
            "that folds (--repair refit:3) or with --repair normed --export stock-layer."
        )


def _write(
    path: Path,
    folder: Path,
    loaded: LoadedModel,
    row: GgufFamily,
    content: dict[str, Any],
    splits: str,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Write the file; return what was written, by name."""
    config = loaded.model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[row.architecture])
    writer.add_name(loaded.base.title or Path(loaded.base.name).name)
    for name, value in _settings(config, row):
        getattr(writer, f"add_{name}")(value)
    writer.add_file_type(TYPES[loaded.stored_dtype][1])
    add_tokenizer(writer, folder, loaded.tokenizer, content, splits, config.vocab_size)
    written = {}
    state = _named(loaded.model, row)
    with progress.stage(f"Writing {len(state)} tensors", len(state)) as advance:
        for name, tensor in state.items():
            stored = _stored(config, row, name, tensor, loaded.stored_dtype)
            kind = TYPES[stored][0]
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            written[name] = data
            advance(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _stored(
    config: Any, row: GgufFamily, name: str, tensor: Tensor, dtype: torch.dtype
) -> torch.dtype:
    """float32 for vectors, norms, and what was computed anew; the checkpoint's type otherwise."""
    rescaled = "attn_q." in name and query_factor(config, row) != 1.0
    return torch.float32 if tensor.ndim == 1 or "norm" in name or rescaled else dtype


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
        norm_entry(config),
        ("vocab_size", config.vocab_size),
        *position_entries(config, row),
        *window_entries(config, row),
        *row.settings(config),
    ]


def _named(model: Any, row: GgufFamily) -> dict[str, Tensor]:
    """Every tensor of the file by its name there."""
    config = model.config
    names = gguf.get_tensor_name_map(row.architecture, config.num_hidden_layers)
    found = {}
    for name, tensor in _stacked(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings and row.head != "own":
            continue
        if name.endswith(".bias") and _drops(name, tensor, row):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UnsupportedModelError(f"llama.cpp has no place for '{name}' of this model.")
        found[new] = _converted(config, row, name, tensor)
    return found | position_tensors(config, model.model.rotary_emb)


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """StableLM's norms of single heads (``....norms.0.weight``), a row a head."""
    joined: dict[str, Any] = {}
    for name, tensor in state.items():
        before, found, _ = name.partition(".norms.")
        if found:
            joined.setdefault(f"{before}.weight", []).append(tensor)
        else:
            joined[name] = tensor
    return {
        name: torch.stack(each) if isinstance(each, list) else each for name, each in joined.items()
    }


def _drops(name: str, bias: Tensor, row: GgufFamily) -> bool:
    """Whether llama.cpp reads no such bias and none is missed: it is zero."""
    module = name.split(".")[-2]
    if "norm" in module or module in row.biases:
        return False
    if bias.any():
        raise UnsupportedModelError(
            f"llama.cpp reads no bias of '{module}' in models of this type, but '{name}' is not "
            "zero. Serve this model with another engine."
        )
    return True


def _converted(config: Any, row: GgufFamily, name: str, tensor: Tensor) -> Tensor:
    """A tensor as llama.cpp computes with it, in float32 where numbers change."""
    module = name.split(".")[-2]
    if row.shifted and module.endswith("norm"):
        tensor = tensor.float() + 1.0
    if module == row.scaled and query_factor(config, row) != 1.0:
        tensor = tensor.float() * query_factor(config, row)
    heads = {"q_proj": config.num_attention_heads, "k_proj": kv_heads(config)}
    if row.pairs and module in heads:
        return _paired(tensor, heads[module])
    return tensor


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from halves to neighbouring pairs, a head at a time."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _prove(path: Path, written: dict[str, np.ndarray]) -> None:
    """Read the file again and compare every tensor; each row of the embedding has its token."""
    reader = gguf.GGUFReader(path)
    found = {each.name: each.data for each in reader.tensors}
    tokens = reader.fields["tokenizer.ggml.tokens"].data
    if len(tokens) != len(written["token_embd.weight"]):
        raise VerificationError("the GGUF file has another number of tokens than of embeddings.")
    if found.keys() != written.keys():
        raise VerificationError("the GGUF file lacks tensors; nothing was kept.")
    for name, data in written.items():
        if not np.array_equal(found[name].reshape(-1), data.reshape(-1)):
            raise VerificationError(f"'{name}' reads differently from the GGUF file.")
