"""Writing a checkpoint, and proving that it reloads.

No other file writes weights, those of adapters included.

A checkpoint appears whole or not at all: it is written beside its final place, loaded there in a
fresh process that has never heard of this package, compared with the model in memory, and then
renamed.
"""

import contextlib
import glob
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ghostlayers import modeling, reload_check
from ghostlayers.documents import to_json
from ghostlayers.errors import (
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
    VerificationError,
)
from ghostlayers.families import CLASS_PREFIX, PREFIX, Family, find_family
from ghostlayers.parallel import alone
from ghostlayers.records import RECORD as RECORD
from ghostlayers.records import calibration_documents as calibration_documents
from ghostlayers.records import check_files as check_files
from ghostlayers.records import file_hash as file_hash
from ghostlayers.records import inspect as inspect
from ghostlayers.report.card import render_card
from ghostlayers.residency import is_offloaded, offloaded_sets
from ghostlayers.shown import shared

CODE = "modeling_ghostlayers.py"
OLD = ".old"
"""What the folder to be replaced is called in between."""

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
MEMORY_OF_A_RELOAD = 10**9
"""Bytes of weights that the fresh process holds where the model is offloaded here."""

SHARD_OF_OFFLOADED = 10**9
"""Bytes of a file of weights that were never in memory together."""

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, that a reload may show.

On a processor the same weights and the same code give the same bits; accelerators may choose other
kernels in another process."""


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


def check_output(out: Path, *, overwrite: bool, needed_bytes: int) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises:
        OutputError: it exists and may not be overwritten, its parent cannot be written, or the disk
            is too full.
    """
    try:
        exists = out.exists()
    except OSError as error:
        raise OutputError(f"cannot use '{out}' as an output: {error.strerror}.") from error
    if exists and not overwrite:
        raise OutputError(f"'{out}' exists already; choose another folder or pass --overwrite.")
    if exists and not (out / RECORD).is_file():
        raise OutputError(
            f"'{out}' was not made by Ghostlayers (it holds no {RECORD}), so it will not be "
            "overwritten; choose another folder."
        )
    parent = _existing_parent(out)
    if not parent.is_dir():
        raise OutputError(f"'{parent}' is a file, not a folder; choose another output.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write into '{parent}'; choose another folder.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"'{parent}' has {free / 1e6:,.0f} MB free, the checkpoint needs "
            f"{needed_bytes / 1e6:,.0f} MB; free some space or choose another disk."
        )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


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
        overwrite: replace a checkpoint that Ghostlayers made.

    Raises:
        OutputError: see `check_output`; or the disk filled up.
        VerificationError: the reloaded model differs; nothing is left behind.
    """
    check_output(out, overwrite=overwrite, needed_bytes=checkpoint_bytes(model, stored_dtype))
    with _staging(out) as folder:
        _write_model(folder, model, stored_dtype)
        tokenizer.save_pretrained(folder)
        _copy_licences(base_folder, folder)
        verification = verify(folder, model)
        mode = _mode(model, record)
        record = {**shared(record), "mode": mode, "verification": vars(verification)}
        record["files"] = {
            path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))
        }
        _write_json(folder / RECORD, record)
        (folder / "README.md").write_text(render_card(record), encoding="utf-8")
        _publish(folder, out)
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
    check_output(out, overwrite=overwrite, needed_bytes=needed)
    with _staging(out) as folder:
        save_file(tensors, folder / name)
        verification = prove(folder)
        files = {name: file_hash(folder / name)}
        found_at = {"name": record["base_model"]["name"]}  # without it there is no model
        base = {**shared(record["base_model"]), **found_at}
        record = {**shared(record), "base_model": base, "files": files}
        record["verification"] = vars(verification)
        _write_json(folder / RECORD, record)
        (folder / "README.md").write_text(render_card(record), encoding="utf-8")
        _publish(folder, out)
    return verification


def _mode(model: Any, record: dict[str, Any]) -> str:
    asked = record.get("recipe", {}).get("export")
    return "stock-layer" if asked == "stock-layer" else mode_of(model)


def mode_of(model: Any) -> str:
    """``custom`` for a checkpoint that carries operators, else ``stock``."""
    return "custom" if hasattr(model.config, "repaired_boundaries") else "stock"


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside the output that disappears unless it was renamed."""
    created = _make_parents(out.absolute().parent)
    _remove_stale(out)
    folder = Path(
        tempfile.mkdtemp(prefix=f"{_draft_prefix(out)}{os.getpid()}-", dir=out.absolute().parent)
    )
    try:
        yield folder
    except OSError as error:
        raise OutputError(f"cannot write '{out}': {error.strerror or error}.") from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OutputError(f"cannot write the weights into '{out}': {error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not out.exists():
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _make_parents(parent: Path) -> list[Path]:
    """Make missing parents; return those made, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for each in reversed(missing):
            each.mkdir()
    except OSError as error:
        raise OutputError(f"cannot make '{missing[0]}': {error.strerror}.") from error
    return missing


def _remove_stale(out: Path) -> None:
    """Clear up after a killed run, which may have been about to replace the output."""
    prefix = _draft_prefix(out)
    for folder in sorted(out.absolute().parent.glob(f"{glob.escape(prefix)}*-*")):
        owner = folder.name.removeprefix(prefix).split("-")[0]
        if not owner.isdigit() or not Path("/proc").exists() or Path(f"/proc/{owner}").exists():
            continue
        if folder.suffix == OLD and not out.exists():
            folder.rename(out)  # killed after the old one was moved away, before the new one came
        elif folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _draft_prefix(out: Path) -> str:
    return f".{out.name}.ghostlayers-"


def _publish(folder: Path, out: Path) -> None:
    folder.chmod(0o755)  # mkdtemp makes it private
    _share_weights(folder)
    if out.exists():
        old = folder.with_name(folder.name + OLD)
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)


def _share_weights(folder: Path) -> None:
    """Let weights be read by whoever may read the rest: safetensors makes its files private."""
    weights = set(folder.glob("*.safetensors"))
    modes = [each.stat().st_mode & 0o666 for each in folder.iterdir() if each not in weights]
    for path in weights:
        path.chmod(max(modes, default=0o600))


def _write_model(folder: Path, model: Any, stored_dtype: torch.dtype) -> None:
    family = _repaired_family(model)
    state = _stored_state(model, stored_dtype)
    before = model.config.dtype
    try:
        with _read_as_stored(model, stored_dtype) as shards:
            # A model that was loaded remembers how its family's checkpoints name and split weights;
            # the repaired class has no such table, so its checkpoint holds them as the model does.
            model.save_pretrained(
                folder, state_dict=state, save_original_format=family is None, **shards
            )
    except ValueError as error:  # generation configs of older models can be refused
        raise ModelError(f"transformers refuses to save this model: {error}") from error
    finally:
        model.config.dtype = before
    if family is not None:
        (folder / CODE).write_text(remote_code(family), encoding="utf-8")
    more: dict[str, Any] = {"dtype": str(stored_dtype).removeprefix("torch.")}
    if family is not None:
        more["auto_map"] = _auto_map(family)
        scale = logit_scale(model)
        if scale != 1 and not hasattr(model.config, "logit_scale"):
            more["logit_scale"] = (
                scale  # vLLM knows no other name for it in a model it has no code of
            )
    _complete_config(folder / "config.json", more)


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
    stored, computed = (str(each).removeprefix("torch.") for each in (stored_dtype, computes_in))
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
            entry["dtype"] = stored
        with warnings.catch_warnings():  # that a shard must fit into memory: it is made to
            warnings.simplefilter("ignore")
            yield {"max_shard_size": SHARD_OF_OFFLOADED}
    finally:
        for entry in changed:
            entry["dtype"] = computed


def _stored_state(model: Any, stored_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in the type they are stored in; tied ones stay one tensor, and are saved once."""
    stored: dict[int, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.is_meta:  # those are read as they are written
            return tensor
        return stored.setdefault(tensor.data_ptr(), tensor.to(stored_dtype))

    return {name: convert(tensor) for name, tensor in model.state_dict().items()}


def _repaired_family(model: Any) -> Family | None:
    kind = model.config.model_type
    return find_family(kind.removeprefix(PREFIX)) if kind.startswith(PREFIX) else None


def _complete_config(path: Path, more: dict[str, Any]) -> None:
    """Add what transformers leaves out; it writes down the type that the model computed in, too."""
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | more)


def _auto_map(family: Family) -> dict[str, str]:
    """Where the code of operators is, for ``trust_remote_code``."""
    classes = {
        "AutoConfig": family.config,
        "AutoModel": family.model,
        "AutoModelForCausalLM": family.causal_lm,
    }
    module = CODE.removesuffix(".py")
    return {auto: f"{module}.{CLASS_PREFIX}{each.__name__}" for auto, each in classes.items()}


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


def remote_code(family: Family) -> str:
    """The one file of code that a repaired checkpoint carries: this package's own, and three names.

    It needs torch and transformers, nothing else.
    """
    classes = (family.config, family.model, family.causal_lm)
    imports = [f"from {each.__module__} import {each.__name__}  # noqa: E402" for each in classes]
    names = [each.__name__ for each in classes]
    return (
        Path(modeling.__file__).read_text(encoding="utf-8").rstrip()
        + f"""


{chr(10).join(imports)}

{", ".join(f"Repaired{name}" for name in names)} = repaired_classes(
    "{family.repaired_model_type}",
    {", ".join(names)},
    __name__,
)
"""
    )


def _copy_licences(source: Path | None, folder: Path) -> None:
    if source is None:
        return
    for pattern in LICENCES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def verify(folder: Path, model: Any) -> Verification:
    """Load a folder in a fresh process and compare its logits with a model in memory.

    Raises:
        VerificationError: it does not load, or gives other logits.
    """
    ids = _some_tokens(model)
    device = model.get_input_embeddings().weight.device
    dtype = str(model.dtype).removeprefix("torch.")
    room = MEMORY_OF_A_RELOAD if is_offloaded(model) else 0
    answer = _logits_of_fresh_process(folder, ids, dtype, device, room)
    return _compare(answer, _logits(model, ids))


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


def _compare(got: torch.Tensor, expected: torch.Tensor) -> Verification:
    difference = float((got - expected).abs().max())
    if not math.isfinite(difference):
        raise NonFiniteError(
            "the repaired model gives NaN or infinity instead of logits, so that nothing can be "
            "proved; nothing was kept. Look for such numbers in the base model's weights, or "
            "compute in float32."
        )
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise VerificationError(
            f"what was saved reloads, but its logits differ by {difference:.3g} from the model in "
            "memory; nothing was kept. Please report this with the model's name."
        )
    return Verification(bool(torch.equal(got, expected)), difference, got.shape[1])


def _logits_of_fresh_process(
    folder: Path, ids: torch.Tensor, dtype: str, device: torch.device, room: int = 0
) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = f"{scratch}/request.safetensors", f"{scratch}/answer.safetensors"
        save_file({"input_ids": ids}, request)
        arguments = [str(folder), request, answer, dtype, str(device), str(room)]
        # A private module cache leaves no trace.
        quiet = {"HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}
        done = _run_alone(reload_check.__file__, arguments, {**alone(), **quiet})
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(
                f"the saved checkpoint does not reload in a fresh process: {reason}"
            )
        return load_file(answer)["logits"]


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
