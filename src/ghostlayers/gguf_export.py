"""A stock checkpoint as one GGUF file, for llama.cpp and what is built on it.

The `gguf` library knows every architecture's tensor names and writes the file; what it lacks is the
step from a checkpoint to it. That is here for families with one uniform stack like Llama's. Facts
about the format are from llama.cpp's conversion of the same families: its llama architecture
rotates neighbouring channels where transformers rotates halves, so query and key rows are
reordered; vectors stay in float32.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ghostlayers.configs import slides
from ghostlayers.errors import ModelError, OutputError, UnsupportedModelError, VerificationError
from ghostlayers.families import PREFIX
from ghostlayers.files import whole_file
from ghostlayers.gguf_tokenizer import add_tokenizer, read_tokenizer, splitting_name
from ghostlayers.loading import LoadedModel, load_model, read_config
from ghostlayers.progress import Progress, Silent
from ghostlayers.recipe import RunOptions

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
REORDERED = frozenset({"llama", "mistral"})
"""Families whose query and key rows llama.cpp expects in another order."""

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
    _check_facts(AutoConfig.from_pretrained(folder))
    tokenizer = read_tokenizer(folder)
    splits = pre_tokenizer or splitting_name(tokenizer)
    loaded = load_model(str(folder), RunOptions(dtype="float32", device="cpu"))
    with whole_file(out) as draft:
        tensors = _write(draft, folder, loaded, tokenizer, splits, progress or Silent())
        _prove(draft, tensors)
    return out


def _check(folder: Path, out: Path, *, overwrite: bool) -> None:
    if out.suffix != ".gguf":
        raise OutputError(f"'{out}' should end in .gguf.")
    if out.exists() and not overwrite:
        raise OutputError(f"'{out}' exists already; choose another name or pass --overwrite.")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"'{out.absolute().parent}' is not a folder.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' is not the folder of a checkpoint: it holds no config.json.")
    config = read_config(str(folder))
    kind = str(config.get("model_type"))
    if kind.startswith(PREFIX):
        raise UnsupportedModelError(
            f"'{folder}' carries operators, which llama.cpp has no place for. Prune with a repair "
            "that folds (--repair refit:3) or with --repair normed --export stock-layer."
        )
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"models of type '{kind}' are not written as GGUF here; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}. llama.cpp's own converter takes the folder too."
        )


def _check_facts(config: Any) -> None:
    """Refuse what llama.cpp takes for granted otherwise: no entry of the file could say it."""
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"the model's activation is '{config.hidden_act}', but llama.cpp computes silu in "
            f"models of type '{config.model_type}'."
        )
    window = getattr(config, "sliding_window", None)
    if slides(config) and (window is None or window < config.max_position_embeddings):
        raise UnsupportedModelError(
            f"the model's attention slides over {window} tokens, but llama.cpp attends to all in "
            f"models of type '{config.model_type}'; texts longer than that would come out "
            "differently."
        )


def _write(
    path: Path,
    folder: Path,
    loaded: LoadedModel,
    tokenizer: dict[str, Any],
    splits: str,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Write the file; return what was written, by name."""
    config = loaded.model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_settings(writer, config, loaded)
    add_tokenizer(writer, folder, tokenizer, splits, config.vocab_size)
    written = {}
    state = _named(loaded.model, architecture)
    with progress.stage(f"Writing {len(state)} tensors", len(state)) as advance:
        for name, tensor in state.items():
            stored = torch.float32 if tensor.ndim == 1 else loaded.stored_dtype
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


def _add_settings(writer: Any, config: Any, loaded: LoadedModel) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(loaded.base.title or Path(loaded.base.name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(TYPES[loaded.stored_dtype][1])


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters)


def _named(model: Any, architecture: Any) -> dict[str, Tensor]:
    """Every tensor of the file by its name there."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UnsupportedModelError(f"llama.cpp has no place for '{name}' of this model.")
        found[new] = _reordered(config, name, tensor)
    factors = _frequency_factors(model)
    if factors is not None:
        found["rope_freqs.weight"] = factors
    return found


def _reordered(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Rows of queries and keys from halves to neighbouring pairs, a head at a time."""
    if config.model_type not in REORDERED:
        return tensor
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads or config.num_attention_heads
    else:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _frequency_factors(model: Any) -> Tensor | None:
    """By how much scaled positions slow each frequency down; None where they are not scaled."""
    kind = _rope(model.config).get("rope_type", "default")
    if kind == "default":
        return None
    rotary = model.model.rotary_emb
    if kind != "llama3" or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"positions of kind '{kind}' are not written as GGUF here; llama.cpp's own converter "
            "takes the folder too."
        )
    width = 2 * rotary.inv_freq.numel()
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain = 1.0 / float(_rope(model.config)["rope_theta"]) ** steps
    factors: Tensor = plain / rotary.inv_freq.double().cpu()
    return factors.float()


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
