"""Opening a model: a folder, a hub id, a .gguf file, or one already in memory."""

import contextlib
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghostlayers import offload, quantized
from ghostlayers.config_file import check_config, check_folder
from ghostlayers.errors import ModelError, RecipeError
from ghostlayers.presets import find_preset
from ghostlayers.quiet import kept_report
from ghostlayers.recipe import RunOptions
from ghostlayers.residency import is_offloaded, residency_of
from ghostlayers.shown import one_line
from ghostlayers.stream import find_decoder_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SURELY_FITS = 2**30
"""Bytes of weights that are loaded without asking how much memory is free."""

FAST_ENOUGH = 1.3
"""A half-precision type is used where it multiplies at least this much faster than float32."""


@dataclass(frozen=True)
class BaseModel:
    """Where a model comes from.

    Attributes:
        name: folder, hub id or file, as the caller gave it.
        revision: commit on the hub, if any.
        licence: as the base model's card or file states it; None if it does not.
        title: the model's own name, where it states one.
        folder: where its files lie, if that is a folder.
        on_hub: the name is an id on the hub.
        quantized: the format its weights were expanded from; None if they were plain.
    """

    name: str
    revision: str | None = None
    licence: str | None = None
    title: str | None = None
    folder: Path | None = None
    on_hub: bool = False
    quantized: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured.

    Attributes:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        base: where it comes from.
        stored_dtype: the type its weights have on disk, and will have in a new checkpoint.
    """

    model: Any
    tokenizer: Any
    base: BaseModel
    stored_dtype: torch.dtype


def load_model(
    name: str, options: RunOptions, revision: str | None = None, *, expand: bool = True
) -> LoadedModel:
    """Open a model by name.

    Args:
        name: a folder, a hub id, or a ``.gguf`` file.
        options: dtype, device, and whether the model's own code may run.
        revision: branch, tag or commit on the hub.
        expand: turn quantised weights into plain ones, as cutting needs; a GGUF file's always are.

    Raises:
        ModelError: it cannot be found or read; the message says what was tried.
        UnsupportedModelError: its weights are quantised in a way that cannot be undone.
    """
    path = Path(name).expanduser()
    place, extra = _locate(path, name)
    if path.is_dir() and not expand:  # else `read_config` does
        check_folder(path)
    if revision is not None and not path.exists():
        extra["revision"] = revision
    extra["trust_remote_code"] = options.trust_remote_code
    device = _device(options)
    packed = read_config(name, revision) if expand else {}
    quantized.check_quantization(packed)
    try:
        with kept_report() as report:
            model, tokenizer, stored = _read(place, extra, options, device, packed)
    except RecipeError:
        raise
    except Exception as error:  # damaged files raise the unrelated types of many libraries
        raise ModelError(f"cannot load the model '{name}': {_explain(error, report)}") from error
    if not is_offloaded(model):
        model = _place(model, device)
    model = model.eval()
    base = BaseModel(
        name=name,
        revision=getattr(model.config, "_commit_hash", None) or revision,
        licence=_licence(path, name),
        title=_title(path),
        folder=path if path.is_dir() else None,
        on_hub=not path.exists(),
        quantized=quantized.quantization_method(packed),
    )
    return LoadedModel(model, tokenizer, base, stored)


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json, unread by any class; empty for a GGUF file.

    Raises:
        ModelError: there is no such model.
    """
    from transformers import PreTrainedConfig

    place, extra = _locate(Path(name).expanduser(), name)
    if extra:
        return {}
    if Path(place).is_dir():
        check_folder(Path(place))
    try:
        config, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"cannot load the model '{name}': {_explain(error)}") from error
    return check_config(dict(config), f"the config of '{name}'")


def from_memory(model: Any, tokenizer: Any) -> LoadedModel:
    """Wrap a model that is in memory already; it is used in its own dtype, where it is."""
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer too: pass tokenizer=...")
    _check_buffers(model)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    folder = Path(name)
    base = BaseModel(
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        licence=_licence(folder, name) if folder.is_dir() else None,
        folder=folder if folder.is_dir() else None,
    )
    return LoadedModel(model, tokenizer, base, model.dtype)


def _check_buffers(model: Any) -> None:
    """Refuse a model whose rotary frequencies were rounded: it would not reload as it is."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            kind = str(buffer.dtype).removeprefix("torch.")
            raise ModelError(
                f"the model's rotary frequencies ('{name}') were rounded to {kind} by .to() or "
                f".half(), which no checkpoint keeps; load it with from_pretrained(..., "
                f"dtype=torch.{kind}) instead."
            )


def _locate(path: Path, name: str) -> tuple[str, dict[str, Any]]:
    """The name that transformers wants, and further arguments."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file '{name}'.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder '{name}' holds no config.json: it is not a model's folder.")
        _refuse_pickles(path)
        return str(path), {}
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"'{name}' is neither a model's folder, nor a .gguf file, nor a hub id such as "
            "HuggingFaceTB/SmolLM2-135M."
        )
    return name, {}


def _refuse_pickles(folder: Path) -> None:
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise ModelError(
            f"folder '{folder}' holds pickled weights (.bin) only, which can run code when opened; "
            "expected .safetensors. Convert it with save_pretrained on a machine you can spare."
        )


def _read(
    place: str,
    extra: dict[str, Any],
    options: RunOptions,
    device: torch.device,
    packed: dict[str, Any],
) -> tuple[Any, Any, torch.dtype]:
    """Model, tokenizer, and the type that the weights have on disk.

    The model is loaded in the type to compute in, not cast afterwards: families keep constants in
    buffers (Gemma's embedding scale) that would stay rounded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if "gguf_file" in extra:
        return _read_gguf(place, extra, options, device)
    tokenizer = AutoTokenizer.from_pretrained(place, **extra)
    weights = {**extra, **quantized.loading_options(packed, device), "use_safetensors": True}
    stored = AutoConfig.from_pretrained(place, **extra).get_text_config().dtype
    wanted = "auto" if stored is None else compute_dtype(options, stored, device)
    if stored is not None and _may_not_fit(place, options, device, packed):
        return _read_offloaded(place, extra, options, device, wanted), tokenizer, stored
    model = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, **weights)
    if stored is None:  # an old config that names no type: the weights themselves tell
        stored = model.dtype
        compute = compute_dtype(options, stored, device)
        if compute != stored:
            model = AutoModelForCausalLM.from_pretrained(place, dtype=compute, **weights)
    if quantized.quantization_method(packed) is not None:
        model = quantized.expand(model, stored)
    return model, tokenizer, stored


def _may_not_fit(
    place: str, options: RunOptions, device: torch.device, packed: dict[str, Any]
) -> bool:
    """Whether it must be looked at closely where the weights go."""
    if quantized.quantization_method(packed) is not None:
        if options.offload in ("cpu", "disk"):
            raise RecipeError(
                "--offload needs plain weights, but these are quantised, and are expanded in "
                "memory; start from the model that was quantised."
            )
        return False
    if options.offload != "auto" or options.max_memory is not None:
        return options.offload != "none"
    size = offload.weights_on_disk(place)
    return device.type != "cpu" or size is None or size > SURELY_FITS


def _read_offloaded(
    place: str, extra: dict[str, Any], options: RunOptions, device: torch.device, dtype: Any
) -> Any:
    """A model whose weights go where there is room for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place, **extra).get_text_config()
    placement = offload.place_weights(config, dtype, options, device)
    memory = offload.memory_for(placement, config, dtype, options, device)
    model = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, use_safetensors=True, **offload.loading_options(placement), **extra
    )
    residency_of(model, list(find_decoder_layers(model))).memory = memory
    return model


def _read_gguf(
    place: str, extra: dict[str, Any], options: RunOptions, device: torch.device
) -> tuple[Any, Any, torch.dtype]:
    """A GGUF file, de-quantised."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ghostlayers.gguf_import import check_complete, complete, one_name_table, open_gguf

    if options.offload in ("cpu", "disk"):
        raise RecipeError(
            "--offload reads decoder layers from safetensors files as they are needed, but a .gguf "
            "file is expanded in memory; start from the model that it was made of."
        )
    file = open_gguf(Path(place) / extra["gguf_file"])
    stored = file.dtype
    weights: dict[str, Any] = {"dtype": compute_dtype(options, stored, device)}
    # Newer versions keep the weights packed where they can, in layers that cannot be repaired.
    if hasattr(transformers, "GgufConfig"):
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # De-quantising draws bars that no setting of transformers turns off.
    with contextlib.redirect_stderr(io.StringIO()), one_name_table():
        tokenizer = AutoTokenizer.from_pretrained(place, **extra)
        config = complete(AutoConfig.from_pretrained(place, **extra), file)
        model = AutoModelForCausalLM.from_pretrained(place, config=config, **weights, **extra)
    check_complete(model, file)
    return quantized.expand(model, stored), tokenizer, stored


def _place(model: Any, device: torch.device) -> Any:
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # how torch says that a device is absent
        raise RecipeError(f"cannot use the device '{device}': {_explain(error)}") from error


def _device(options: RunOptions) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if options.device != "auto":
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise RecipeError(
                f"unknown device '{options.device}': {error}".split("\n")[0]
            ) from error
        there = {"cpu", "meta", "cpu" if accelerator is None else accelerator.type}
        if device.type not in there:
            raise RecipeError(
                f"device '{options.device}' is not there; this build of torch finds here: "
                f"{' and '.join(sorted(there - {'meta'}))}."
            )
        if not _has_double(device):
            raise RecipeError(
                f"device '{options.device}' has no float64, in which losses and sums are taken; "
                "use --device cpu."
            )
        return device
    if accelerator is None or not _has_double(accelerator):
        return torch.device("cpu")
    return accelerator


def _has_double(device: torch.device) -> bool:
    """Apple's graphics processors, for one, have not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def compute_dtype(options: RunOptions, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in.

    ``auto`` is the checkpoint's own (with a preset, that of its authors' code), except on a
    processor that multiplies it slower than float32: many have no bfloat16 units and take nine
    times as long.

    Raises:
        RecipeError: an unknown name.
    """
    if options.dtype != "auto":
        return dtype_named(options.dtype)
    if options.preset is not None and find_preset(options.preset).dtype != "auto":
        stored = dtype_named(find_preset(options.preset).dtype)
    if device.type != "cpu" or stored == torch.float32:
        return stored
    return stored if half_precision_gain(stored) >= FAST_ENOUGH else torch.float32


def dtype_named(name: str) -> torch.dtype:
    """The type of a name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in DTYPES:
        raise RecipeError(f"unknown dtype '{name}'; expected auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def half_precision_gain(dtype: torch.dtype) -> float:
    """How many times faster this processor multiplies matrices in a type than in float32."""

    def seconds(kind: torch.dtype) -> float:
        left, right = torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        elapsed = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            elapsed.append(time.perf_counter() - start)
        return statistics.median(elapsed)

    return seconds(torch.float32) / seconds(dtype)


def _licence(path: Path, name: str) -> str | None:
    """The licence that the base model's card or GGUF header states."""
    if path.suffix == ".gguf":
        return _gguf_text(path, "general.license")
    from huggingface_hub import ModelCard

    card = path / "README.md"
    if path.is_dir() and not card.is_file():
        return None
    try:
        data = ModelCard.load(str(card) if path.is_dir() else name).data
    except Exception:  # a card is optional, and hub errors of many kinds must not stop a run
        return None
    licence = data.get("license")
    return str(data.get("license_name") or licence) if licence else None


def _title(path: Path) -> str | None:
    return _gguf_text(path, "general.name") if path.suffix == ".gguf" else None


def _gguf_text(path: Path, key: str) -> str | None:
    from ghostlayers.gguf_import import open_gguf

    return open_gguf(path).text(key)


def _explain(error: Exception, report: Sequence[str] = ()) -> str:
    text = str(error).strip()
    if "above report" in text and report:  # it was kept off the screen
        text = f"its weights do not fit its config: {one_line(' '.join(report))}"
    if isinstance(error, KeyError):
        text = f"unknown name {text}"
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())[:600]
    if "trust_remote_code" in text:
        return f"{first} (Ghostlayers: --trust-remote-code lets it run; read the code first.)"
    return first or type(error).__name__
