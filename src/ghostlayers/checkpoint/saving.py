"""Writing a checkpoint, or an adapter, with its record and its card.

A checkpoint appears whole or not at all: it is written beside its final place, loaded there in a
fresh process that has never heard of this package, compared with the model in memory, and then
renamed.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlayers import modeling
from ghostlayers.checkpoint.card import render_card
from ghostlayers.checkpoint.packed import PackedBase, PackedResult
from ghostlayers.checkpoint.proof import (
    Verification,
    device_of,
    mode_of,
    plain_dtype,
    some_tokens,
    verify,
    verify_packed,
)
from ghostlayers.errors import (
    ModelError,
    RecipeError,
)
from ghostlayers.model import multimodal
from ghostlayers.model.configs import without_code
from ghostlayers.model.quantized import ENTRY
from ghostlayers.model.residency import is_offloaded, offloaded_sets
from ghostlayers.model.tensor_files import type_in_file
from ghostlayers.model.weights import as_stored, copy_pieces, in_pieces, stored_type
from ghostlayers.runtime.documents import to_json
from ghostlayers.runtime.files import LICENCES
from ghostlayers.runtime.outputs import RECORD, hashes, whole_folder
from ghostlayers.runtime.scratch import is_scratch
from ghostlayers.runtime.shown import shared

CODE = modeling.CODE
SHARD_OF_OFFLOADED = 10**9
"""Bytes of a file of weights that were never in memory together."""

SHARD_IN_PIECES = 5 * 10**9
"""Bytes of a file that is written twice, because some of its tensors are copied from the base's."""


def checkpoint_bytes(model: PreTrainedModel, stored_dtype: torch.dtype) -> int:
    """Bytes of a model's weights in the type they are stored in."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    return int(elements * stored_dtype.itemsize)


def save_checkpoint(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    *,
    stored_dtype: torch.dtype,
    base_folder: Path | None = None,
    processor: Mapping[str, str] | None = None,
    packed: PackedBase | None = None,
    overwrite: bool = False,
) -> Verification:
    """Write a model with its record and card, and prove that it reloads.

    Args:
        out: the folder to make.
        model: as `removal.prune_layers` returns it.
        tokenizer: saved beside it.
        record: provenance; hashes of the files and the verification are added.
        stored_dtype: the type of the weights on disk.
        base_folder: where licence files of the base model are copied from.
        processor: further files of a vision-language model, by name.
        packed: the base, where what is untouched is to stay as packed as it is there.
        overwrite: replace a checkpoint that Ghostlayers made.

    Raises:
        OutputError: see `check_output`; or the disk filled up.
        VerificationError: the reloaded model differs; nothing is left behind.
    """
    needed = checkpoint_bytes(model, stored_dtype) if packed is None else packed.bytes
    with whole_folder(out, overwrite=overwrite, needed_bytes=needed) as folder:
        entries: dict[str, Any] = {}
        if packed is None:
            write_model(folder, model, tokenizer, stored_dtype)
        else:
            entries["packed"] = _write_packed(folder, model, stored_dtype, packed)
            tokenizer.save_pretrained(folder)
        multimodal.write_processor(folder, processor or {})
        _drop_foreign_code(folder)
        _copy_licences(base_folder, folder)
        prove = verify if packed is None else verify_packed
        verification = prove(folder, model, tokenizer, stored_dtype)
        entries |= {"mode": _mode(model, record), "verification": verification.to_dict()}
        _describe(folder, {**shared(record), **entries})
    return verification


def save_tensors(
    out: Path,
    name: str,
    tensors: dict[str, torch.Tensor],
    record: dict[str, Any],
    prove: Callable[[Path], Verification],
    *,
    overwrite: bool = False,
) -> Verification:
    """Write some tensors with their record and card, which appear when they are proved.

    Args:
        out: the folder to make.
        name: of the file of tensors.
        tensors: by name.
        record: provenance; hashes of the files and the verification are added.
        prove: called with the folder before it gets its name.
        overwrite: replace what Ghostlayers made.

    Raises:
        OutputError: see `check_output`; or the disk filled up.
        VerificationError: as ``prove`` raises it; nothing is left behind.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with whole_folder(out, overwrite=overwrite, needed_bytes=needed) as folder:
        save_file(tensors, folder / name)
        verification = prove(folder)
        found_at = {"name": record["base_model"]["name"]}  # without it there is no model
        base = {**shared(record["base_model"]), **found_at}
        proved = {"verification": verification.to_dict()}
        _describe(folder, {**shared(record), "base_model": base, **proved})
    return verification


def _describe(folder: Path, record: dict[str, Any]) -> None:
    """Write the card, and the record with the hash of every file beside it."""
    (folder / "README.md").write_text(render_card(record), encoding="utf-8")
    _write_json(folder / RECORD, {**record, "files": hashes(folder)})


def _mode(model: PreTrainedModel, record: dict[str, Any]) -> str:
    asked = record.get("recipe", {}).get("export")
    return "stock-layer" if asked == "stock-layer" else mode_of(model)


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stored_dtype: torch.dtype,
) -> None:
    """Write weights, configs and tokenizer into a folder, unproved.

    Args:
        folder: an empty one.
        model: as `removal.prune_layers` returns it, or a dense one.
        tokenizer: saved beside it.
        stored_dtype: the type of the weights on disk.

    Raises:
        ModelError: transformers refuses to save it.
    """
    _write_weights(folder, multimodal.whole_of(model), stored_dtype)
    tokenizer.save_pretrained(folder)


def _write_packed(
    folder: Path, model: PreTrainedModel, stored_dtype: torch.dtype, packed: PackedBase
) -> dict[str, Any]:
    """Write weights and configs, what is untouched as it is in the base; what the record says."""
    result, whole = PackedResult(packed, model), multimodal.whole_of(model)
    sources = result.write(folder, lambda names: _write_weights(folder, whole, stored_dtype, names))
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, content | {ENTRY: result.settings(sources)})
    return result.report(sources)


def _write_weights(
    folder: Path,
    model: PreTrainedModel,
    stored_dtype: torch.dtype,
    names: Collection[str] | None = None,
) -> None:
    """Write weights and configs; what a repaired model needs beside them, its config writes.

    With ``names``, only the weights of these names.
    """
    state = _stored_state(model, stored_dtype)
    pieces = in_pieces(model, model.state_dict(keep_vars=True), stored_dtype)
    if names is not None:
        state, pieces = {name: tensor for name, tensor in state.items() if name in names}, {}
    before = model.config.dtype
    try:
        with _read_as_stored(model, stored_dtype) as shards, warnings.catch_warnings():
            # That a shard must fit into memory: it is made to, or nothing is elsewhere any more.
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            few = {"max_shard_size": SHARD_IN_PIECES} if pieces else {}
            model.save_pretrained(folder, state_dict=state, **few | shards)
        copy_pieces(folder, pieces)
    except ValueError as error:  # generation configs of older models can be refused
        raise ModelError(f"transformers refuses to save this model: {error}") from error
    finally:
        model.config.dtype = before
    # The type that the model computed in is written down as well.
    more: dict[str, Any] = {"dtype": plain_dtype(stored_dtype)}
    if mode_of(model) == "custom":
        scale = logit_scale(model)
        if scale != 1 and not hasattr(model.config, "logit_scale"):
            more["logit_scale"] = (
                scale  # vLLM knows no other name for it in a model it has no code of
            )
    _complete_config(folder / "config.json", more, drop_code=mode_of(model) == "stock")


@contextlib.contextmanager
def _read_as_stored(model: PreTrainedModel, stored_dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Have offloaded weights read in the type they are stored in, a shard at a time.

    Raises:
        RecipeError: they lie in memory in another type.
    """
    if not is_offloaded(model):
        yield {}
        return
    computes_in = model.dtype
    stored, computed = map(plain_dtype, (stored_dtype, computes_in))
    indices = [getattr(held, "index", None) for held in offloaded_sets(model)]
    if computes_in != stored_dtype and not all(indices):
        raise RecipeError(
            f"layers that were offloaded to memory in {computed} cannot be saved in {stored}; use "
            "--offload disk, or leave --dtype away."
        )
    entries = [entry for index in indices if index for entry in index.values()]
    changed = [entry for entry in entries if entry["dtype"] == computed]
    try:
        for entry in changed:
            entry["dtype"] = _type_of_entry(entry, stored_dtype)
        yield {"max_shard_size": SHARD_OF_OFFLOADED}
    finally:
        for entry in changed:
            entry["dtype"] = computed


def _type_of_entry(entry: Mapping[str, Any], main: torch.dtype) -> str:
    """The type that an offloaded tensor's file has: the model's own, or one written for the run."""
    own = entry.get("safetensors_file")
    if own is None or is_scratch(Path(own)):  # in the type that the run computes in
        return plain_dtype(main)
    return plain_dtype(type_in_file(own, entry["weight_name"], main))


def _stored_state(model: PreTrainedModel, stored_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in the type they are stored in; tied ones stay one tensor, and are saved once."""
    stored: dict[int, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.is_meta:  # those are read as they are written
            return tensor
        kind = stored_type(tensor, stored_dtype)
        return stored.setdefault(tensor.data_ptr(), as_stored(tensor, kind).detach())

    # Not as copies, which would have forgotten their types.
    return {name: convert(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def _complete_config(path: Path, more: dict[str, Any], *, drop_code: bool) -> None:
    """Add what transformers leaves out, in the words of older readers, too."""
    content = json.loads(path.read_text(encoding="utf-8")) | more
    if drop_code:
        without_code(content)
    content = multimodal.with_one_dtype(content, content["dtype"])
    text = content.get("text_config")
    if isinstance(text, dict):
        content["text_config"] = text | modeling.old_spellings(text)
    _write_json(path, content | modeling.old_spellings(content))


def _drop_foreign_code(folder: Path) -> None:
    """Let no config of tokenizers, processors and generation name code of the base's."""
    for path in sorted(folder.glob("*_config.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(content)
        if json.dumps(without_code(content)) != text:
            _write_json(path, content)


@torch.no_grad()
def logit_scale(model: PreTrainedModel) -> float:
    """By what number a causal language model multiplies what its head gives; 1 if by none.

    Families keep it in their configs under several names, some as a factor and some as a divisor,
    so it is measured first, and then taken from the entry of the config that says it exactly. What
    is no factor (a soft cap) counts as none.
    """
    ids = some_tokens(model)[:, :8].to(device_of(model))
    base = next(child for child in model.children() if isinstance(child, PreTrainedModel))
    stream = base(input_ids=ids, use_cache=False)[0]
    plain = model.get_output_embeddings()(stream).double()
    logits = model(input_ids=ids, use_cache=False).logits.double()
    measured = float((logits * plain).sum() / plain.square().sum())
    off = float((logits - measured * plain).abs().max())
    if off > 0.01 * float(logits.abs().max()) or abs(measured - 1) < 0.01:
        return 1.0
    entries = [value for value in vars(model.config).values() if isinstance(value, float) and value]
    written = [scale for value in entries for scale in (value, 1 / value)]
    nearest = min(written, key=lambda scale: abs(scale - measured), default=measured)
    return nearest if abs(nearest / measured - 1) < 0.01 else measured


def _copy_licences(source: Path | None, folder: Path) -> None:
    if source is None:
        return
    for pattern in LICENCES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(to_json(content), encoding="utf-8")
