"""Writing a checkpoint, and proving that it reloads.

No other file writes weights, those of adapters included.

A checkpoint appears whole or not at all: it is written beside its final place, loaded there in a
fresh process that has never heard of this package, compared with the model in memory, and then
renamed.
"""

import contextlib
import copy
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ghostlayers import modeling, multimodal, reload_check
from ghostlayers.configs import without_code
from ghostlayers.documents import to_json
from ghostlayers.errors import (
    ModelError,
    NonFiniteError,
    RecipeError,
    VerificationError,
)
from ghostlayers.files import LICENCES
from ghostlayers.outputs import RECORD as RECORD
from ghostlayers.outputs import file_hash as file_hash
from ghostlayers.outputs import hashes, whole_folder
from ghostlayers.parallel import alone
from ghostlayers.records import calibration_documents as calibration_documents
from ghostlayers.records import check_files as check_files
from ghostlayers.records import inspect as inspect
from ghostlayers.report.card import render_card
from ghostlayers.residency import is_offloaded, offloaded_sets
from ghostlayers.scratch import Scratch, is_scratch
from ghostlayers.shown import shared
from ghostlayers.weights import as_stored, copy_pieces, in_pieces, stored_type, type_in_file

CODE = modeling.CODE
MEMORY_OF_A_RELOAD = 10**9
"""Bytes of weights that the fresh process holds where the model is offloaded here."""

SHARD_OF_OFFLOADED = 10**9
"""Bytes of a file of weights that were never in memory together."""

SHARD_IN_PIECES = 5 * 10**9
"""Bytes of a file that is written twice, because some of its tensors are copied from the base's."""

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, that a reload may show.

On a processor the same weights and the same code give the same bits; accelerators may choose other
kernels in another process."""


TOLERANCE_AS_READ = 2e-2
"""The same in a shorter type, where a reload and the model in memory may sum in another order."""

PROBE = "Layers 3-7 went; \u00e9t\u00e9, \u4e2d\u6587, 12,345.\n\tThe rest stays."
"""Text by which a saved tokenizer is compared with the one in memory."""


@dataclass(frozen=True)
class Verification:
    """How a reloaded checkpoint compares with the model in memory.

    Attributes:
        identical: every logit is equal bit for bit.
        largest_difference: between two logits.
        num_tokens: positions compared.
    """

    identical: bool
    largest_difference: float
    num_tokens: int


def checkpoint_bytes(model: Any, stored_dtype: torch.dtype) -> int:
    """Bytes of a model's weights in the type they are stored in."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    return int(elements * stored_dtype.itemsize)


def save_checkpoint(
    out: Path,
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    *,
    stored_dtype: torch.dtype,
    base_folder: Path | None = None,
    processor: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Verification:
    """Write a model with its record and card, and prove that it reloads.

    Args:
        out: the folder to make.
        model: as `surgery.prune_layers` returns it.
        tokenizer: saved beside it.
        record: provenance; hashes of the files and the verification are added.
        stored_dtype: the type of the weights on disk.
        base_folder: where licence files of the base model are copied from.
        processor: further files of a vision-language model, by name.
        overwrite: replace a checkpoint that Ghostlayers made.

    Raises:
        OutputError: see `check_output`; or the disk filled up.
        VerificationError: the reloaded model differs; nothing is left behind.
    """
    needed = checkpoint_bytes(model, stored_dtype)
    with whole_folder(out, overwrite=overwrite, needed_bytes=needed) as folder:
        _write_model(folder, multimodal.whole_of(model), stored_dtype)
        tokenizer.save_pretrained(folder)
        multimodal.write_processor(folder, processor or {})
        _drop_foreign_code(folder)
        _copy_licences(base_folder, folder)
        verification = verify(folder, model, tokenizer, stored_dtype)
        mode = _mode(model, record)
        _describe(folder, {**shared(record), "mode": mode, "verification": vars(verification)})
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
    needed = sum(each.numel() * each.element_size() for each in tensors.values())
    with whole_folder(out, overwrite=overwrite, needed_bytes=needed) as folder:
        save_file(tensors, folder / name)
        verification = prove(folder)
        found_at = {"name": record["base_model"]["name"]}  # without it there is no model
        base = {**shared(record["base_model"]), **found_at}
        proved = {"verification": vars(verification)}
        _describe(folder, {**shared(record), "base_model": base, **proved})
    return verification


def _describe(folder: Path, record: dict[str, Any]) -> None:
    """Write the card, and the record with the hash of every file beside it."""
    (folder / "README.md").write_text(render_card(record), encoding="utf-8")
    _write_json(folder / RECORD, {**record, "files": hashes(folder)})


def _mode(model: Any, record: dict[str, Any]) -> str:
    asked = record.get("recipe", {}).get("export")
    return "stock-layer" if asked == "stock-layer" else mode_of(model)


def mode_of(model: Any) -> str:
    """``custom`` for a checkpoint that carries operators, else ``stock``."""
    return "custom" if hasattr(model.config, "repaired_boundaries") else "stock"


def _write_model(folder: Path, model: Any, stored_dtype: torch.dtype) -> None:
    """Write weights and configs; what a repaired model needs beside them, its config writes."""
    state = _stored_state(model, stored_dtype)
    pieces = in_pieces(model, model.state_dict(keep_vars=True), stored_dtype)
    before = model.config.dtype
    try:
        with _read_as_stored(model, stored_dtype) as shards:
            few = {"max_shard_size": SHARD_IN_PIECES} if pieces else {}
            model.save_pretrained(folder, state_dict=state, **few | shards)
        copy_pieces(folder, pieces)
    except ValueError as error:  # generation configs of older models can be refused
        raise ModelError(f"transformers refuses to save this model: {error}") from error
    finally:
        model.config.dtype = before
    # The type that the model computed in is written down as well.
    more: dict[str, Any] = {"dtype": str(stored_dtype).removeprefix("torch.")}
    if mode_of(model) == "custom":
        scale = logit_scale(model)
        if scale != 1 and not hasattr(model.config, "logit_scale"):
            more["logit_scale"] = (
                scale  # vLLM knows no other name for it in a model it has no code of
            )
    _complete_config(folder / "config.json", more, drop_code=mode_of(model) == "stock")


@contextlib.contextmanager
def _read_as_stored(model: Any, stored_dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Have offloaded weights read in the type they are stored in, a shard at a time.

    Raises:
        RecipeError: they lie in memory in another type.
    """
    if not is_offloaded(model):
        yield {}
        return
    computes_in = model.dtype
    stored, computed = map(_plain, (stored_dtype, computes_in))
    indices = [getattr(each, "index", None) for each in offloaded_sets(model)]
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
        with warnings.catch_warnings():  # that a shard must fit into memory: it is made to
            warnings.simplefilter("ignore")
            yield {"max_shard_size": SHARD_OF_OFFLOADED}
    finally:
        for entry in changed:
            entry["dtype"] = computed


def _type_of_entry(entry: Mapping[str, Any], main: torch.dtype) -> str:
    """The type that an offloaded tensor's file has: the model's own, or one written for the run."""
    own = entry.get("safetensors_file")
    if own is None or is_scratch(Path(own)):  # in the type that the run computes in
        return _plain(main)
    return _plain(type_in_file(own, entry["weight_name"], main))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_state(model: Any, stored_dtype: torch.dtype) -> dict[str, torch.Tensor]:
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
def logit_scale(model: Any) -> float:
    """By what number a causal language model multiplies what its head gives; 1 if by none.

    Families keep it in their configs under several names, some as a factor and some as a divisor,
    so it is measured first, and then taken from the entry of the config that says it exactly. What
    is no factor (a soft cap) counts as none.
    """
    ids = _some_tokens(model)[:, :8].to(model.get_input_embeddings().weight.device)
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


def verify(
    folder: Path, model: Any, tokenizer: Any = None, stored_dtype: torch.dtype | None = None
) -> Verification:
    """Load a folder in a fresh process, as its readers will, and compare with a model in memory.

    Args:
        folder: a checkpoint.
        model: what it must be.
        tokenizer: what the folder's must be; not compared if not given.
        stored_dtype: the type of the weights in the folder, in which readers compute unless they
            say otherwise; the model's own if not given.

    Raises:
        VerificationError: it does not load, gives other logits (in the type that the model computes
            in, or in that of the folder), or other tokens.
    """
    ids = _some_tokens(model)
    text = "" if tokenizer is None else PROBE
    answer, types = _ask_fresh_process(folder, model, ids, text)
    if tokenizer is not None and answer["tokens"].tolist() != tokenizer(text)["input_ids"]:
        raise VerificationError(
            "the tokenizer that was saved splits text otherwise than the one in memory; nothing "
            "was kept. Please report this with the model's name."
        )
    if "as_read" in answer and stored_dtype is not None and stored_dtype != model.dtype:
        twin = _in_types(model, stored_dtype, types)
        _compare(answer["as_read"], _logits(twin, ids), TOLERANCE_AS_READ)
    return _compare(answer["logits"], _logits(model, ids))


def _in_types(model: Any, main: torch.dtype, types: Mapping[str, str]) -> Any:
    """The model as its readers have it: every parameter in the type that they got it in."""
    from transformers.initialization import no_init_weights

    whole, default = multimodal.whole_of(model), torch.get_default_dtype()
    torch.set_default_dtype(main)
    try:
        with no_init_weights(), torch.device(model.get_input_embeddings().weight.device):
            twin = type(whole)(copy.deepcopy(whole.config))
    finally:
        torch.set_default_dtype(default)
    state = {
        name: each.to(getattr(torch, types[name].removeprefix("torch."))) if name in types else each
        for name, each in whole.state_dict().items()
    }
    twin.load_state_dict(state, assign=True, strict=False)
    twin.tie_weights()
    return multimodal.text_view(twin.eval())


def compare_logits(made: Any, model: Any) -> Verification:
    """Compare two models in memory as `verify` compares a folder.

    Raises:
        VerificationError: they give other logits.
    """
    ids = _some_tokens(model)
    return _compare(_logits(made, ids), _logits(model, ids))


def logits_of_some_tokens(model: Any) -> torch.Tensor:
    """What `verify` compares, [1, tokens, vocabulary]."""
    return _logits(model, _some_tokens(model))


def _some_tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (1, 32), generator=generator)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float().cpu()


def _compare(
    got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> Verification:
    difference = float((got - expected).abs().max())
    if not math.isfinite(difference):
        raise NonFiniteError(
            "the repaired model gives NaN or infinity instead of logits, so that nothing can be "
            "proved; nothing was kept. Look for such numbers in the base model's weights, or "
            "compute in float32."
        )
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise VerificationError(
            f"what was saved reloads, but its logits differ by {difference:.3g} from the model in "
            "memory; nothing was kept. Please report this with the model's name."
        )
    return Verification(bool(torch.equal(got, expected)), difference, got.shape[1])


def _ask_fresh_process(
    folder: Path, model: Any, ids: torch.Tensor, text: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a fresh process finds in the folder, and the types that its parameters have there."""
    ready = next((each for each in _READY if Path(each.scratch.name).is_dir()), None)
    _READY.clear()
    with ready.scratch if ready else Scratch("reload") as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.safetensors")
        asked = {
            "folder": str(folder),
            "answer": str(answer),
            "ids": ids[0].tolist(),
            "text": text,
            "dtype": _plain(model.dtype),
            "device": str(model.get_input_embeddings().weight.device),
            "room": MEMORY_OF_A_RELOAD if is_offloaded(model) else 0,
            "code": _code_hash(model),
            "sees": multimodal.whole_of(model) is not model,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        if ready:
            done = ready.answer(request)
        else:
            done = _run_alone(reload_check.__file__, [str(request)], _environment(scratch))
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(
                f"the saved checkpoint does not reload in a fresh process: {reason}"
            )
        with safe_open(answer, framework="pt") as file:
            types = json.loads((file.metadata() or {}).get("types", "{}"))
        return load_file(answer), types


@dataclass(frozen=True)
class _Ready:
    """A fresh process that has imported all it needs, and waits for a request."""

    scratch: Scratch
    process: "subprocess.Popen[str]"

    def answer(self, request: Path) -> subprocess.CompletedProcess[str]:
        out, said = self.process.communicate(f"{request}\n")
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, said)


_READY: list[_Ready] = []


def be_ready() -> None:
    """Start the process that will prove a checkpoint: it imports while a run computes.

    It ends with this one, asked or not; of its folder, it needs nothing until it is asked.
    """
    scratch = Scratch("reload")
    process = subprocess.Popen(
        [sys.executable, "-P", reload_check.__file__], env=_environment(scratch.name), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _READY[:] = [_Ready(scratch, process)]  # one that was not asked ends as its input does


def _environment(scratch: str) -> dict[str, str]:
    """Of a process on its own, in which a private module cache leaves no trace."""
    return {**alone(), "HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}


def _code_hash(model: Any) -> str | None:
    """Of the one file of code that a checkpoint of the model carries; None if it carries none."""
    if mode_of(model) == "stock":
        return None
    code = modeling.travelling_code(model.config.stock_classes, type(model.config).__module__)
    return hashlib.sha256(code.encode()).hexdigest()


def _run_alone(
    program: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """A Python program that does not see this package's folder."""
    command = [sys.executable, "-P", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    packages = ("ghostlayers", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(to_json(content), encoding="utf-8")
