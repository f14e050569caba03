"""Opening a model: a folder, a hub id, a .gguf file, or one already in memory."""

import contextlib
import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostlayers.errors import GhostlayersError, ModelError, RecipeError
from ghostlayers.model import expanding, multimodal, offload, quantized
from ghostlayers.model.computing import compute_dtype, device_named
from ghostlayers.model.config_file import check_config, check_folder, check_settings
from ghostlayers.model.configs import answer_in_full
from ghostlayers.model.dense import BaseModel, DenseModel
from ghostlayers.model.locating import files_wanted, locate, reading, say_why
from ghostlayers.model.residency import Memory, is_offloaded
from ghostlayers.model.tensor_files import Held, held_in, main_type
from ghostlayers.model.weights import remember_own_types, remember_types
from ghostlayers.model.whole import Findings, check_whole
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.quiet import kept_report

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SURELY_FITS = 2**30
"""Bytes of weights that are loaded without asking how much memory is free."""


def load_model(
    name: str,
    options: RunOptions,
    revision: str | None = None,
    *,
    expand: bool = True,
    exact: bool = False,
) -> DenseModel:
    """Open a model by name.

    Args:
        name: a folder, a hub id, or a ``.gguf`` file.
        options: dtype, device, and whether the model's own code may run.
        revision: branch, tag or commit on the hub.
        expand: turn quantised weights into plain ones, as cutting needs; those that transformers
            cannot open here as they are, and a GGUF file's, always are.
        exact: do not round those of a GGUF file to 16 bits, as nothing is stored in them.

    Raises:
        ModelError: it cannot be found or read; the message says what was tried.
        UnsupportedModelError: its weights are quantised in a way that cannot be undone.
    """
    path = Path(name).expanduser()
    packed = read_config(name, revision) if expand or path.is_dir() else {}
    if not expand and quantized.is_readable(packed):
        packed = {}
    quantized.check_quantization(packed)
    device = device_named(options)
    try:
        with kept_report() as report:
            place = locate(path, name, revision, files_wanted(options))
            if place.is_dir():
                check_folder(place)
            extra: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
            if place.is_file():
                from ghostlayers.model.gguf_file import parts_of

                place = parts_of(place)[0]
                read = _read_gguf(name, place, extra, options, device, exact=exact)
            else:
                read = _read(name, place, extra, options, device, packed)
    except GhostlayersError:
        raise
    except Exception as error:  # damaged files raise the unrelated types of many libraries
        raise ModelError(f"cannot load the model '{name}': {say_why(error, report)}") from error
    model = read.network if is_offloaded(read.network) else _place(read.network, device)
    answer_in_full(multimodal.whole_of(model).config)
    answer_in_full(model.config)
    on_hub = not path.exists()
    base = BaseModel(
        name=name,
        revision=place.name if on_hub else revision,
        licence=_licence(place),
        title=_title(place),
        folder=place if place.is_dir() else None,
        file=place if place.is_file() else None,
        on_hub=on_hub,
        quantized=quantized.quantization_method(packed),
    )
    processor = multimodal.processor_of(model, place)
    return DenseModel(
        model,
        read.tokenizer,
        base,
        stored_dtype=read.stored_dtype,
        processor=processor,
        memory=read.memory,
    )


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json, unread by any class; empty for a GGUF file.

    Raises:
        ModelError: there is no such model.
    """
    from transformers import PreTrainedConfig

    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return {}
    try:
        place = locate(path, name, revision, ["config.json"])
        check_settings(place)
        config, _ = PreTrainedConfig.get_config_dict(place)
    except GhostlayersError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"cannot load the model '{name}': {say_why(error)}") from error
    return check_config(dict(config), f"the config of '{name}'")


def from_memory(
    model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase | ProcessorMixin | None"
) -> DenseModel:
    """Wrap a model that is in memory already; it is used in its own dtype, where it is."""
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer too: pass tokenizer=...")
    _check_buffers(model)
    remember_own_types(model)
    if getattr(model.config, "return_dict", True) is False:
        raise ModelError(
            "the model in memory answers in tuples (its config has return_dict=False), but its "
            "answers are read by name: set model.config.return_dict = True."
        )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    folder = Path(name)
    base = BaseModel(
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        licence=_licence(folder) if folder.is_dir() else None,
        folder=folder if folder.is_dir() else None,
    )
    own, processor = multimodal.split_processor(tokenizer)
    view = multimodal.text_view(model)
    processor = multimodal.processor_of(view, base.folder) | processor
    return DenseModel(view, own, base, processor=processor)


P = ParamSpec("P")
R = TypeVar("R")


def leaves_models_alone(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function that evaluates models in memory leave them training, where they were."""

    @functools.wraps(function)
    def careful(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [model for model in (*args, *kwargs.values()) if isinstance(model, torch.nn.Module)]
        training = [part for model in given for part in model.modules() if part.training]
        try:
            return function(*args, **kwargs)
        finally:
            for part in training:
                part.training = True

    return careful


def _check_buffers(model: PreTrainedModel) -> None:
    """Refuse a model whose rotary frequencies were rounded: it would not reload as it is."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            kind = str(buffer.dtype).removeprefix("torch.")
            raise ModelError(
                f"the model's rotary frequencies ('{name}') were rounded to {kind} by .to() or "
                f".half(), which no checkpoint keeps; load it with from_pretrained(..., "
                f"dtype=torch.{kind}) instead."
            )


@dataclass(frozen=True)
class _Read:
    """What the files of a model give, before it is placed."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype
    memory: Memory | None = None


def _read(
    name: str,
    place: Path,
    extra: dict[str, Any],
    options: RunOptions,
    device: torch.device,
    packed: dict[str, Any],
) -> _Read:
    """Network and tokenizer, and the type that the weights have on disk.

    The model is loaded in the type to compute in, not cast afterwards: families keep constants in
    buffers (Gemma's embedding scale) that would stay rounded.
    """
    from transformers import AutoConfig, AutoTokenizer

    with reading("its tokenizer.json, tokenizer_config.json or config.json"):
        tokenizer = AutoTokenizer.from_pretrained(place, **extra)
    is_packed = quantized.quantization_method(packed) is not None
    files = _expanded(place, packed, options) if is_packed else place
    held = held_in(files)
    with reading("its config.json"):
        config = AutoConfig.from_pretrained(files, **extra)
    named = config.get_text_config().dtype
    stored = main_type(held.values()) or named or torch.float32
    dtype = compute_dtype(options, stored, device)
    weights = {**extra, "use_safetensors": True, "dtype": dtype}
    memory = None
    if _may_not_fit(files, options, device):
        model, memory = _read_offloaded(name, files, weights, held, config, options, device)
    else:
        model = _open(name, files, held, config, weights)
    remember_types(multimodal.whole_of(model), held, stored)
    return _Read(model, tokenizer, stored, memory)


def _expanded(place: Path, packed: dict[str, Any], options: RunOptions) -> Path:
    """A folder of plain weights, in the type that the config names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place, trust_remote_code=options.trust_remote_code)
    named = config.get_text_config().dtype
    stored = named or main_type(held_in(place).values()) or torch.float32
    # Only formats that turn weights need to know which modules keep them the other way round.
    turns = quantized.layout_of(packed).turned
    bare = offload.skeleton(config, stored, options) if turns else torch.nn.Module()
    is_turned = expanding.turned_in(bare)
    return expanding.expand_for_good(place, packed, stored, is_turned)


def _open(
    name: str, place: Path, held: Mapping[str, Held], config: Any, weights: dict[str, Any]
) -> Any:
    """What transformers makes of a model's files, if that is all of them and nothing else.

    Raises:
        ModelError: see `whole.check_whole`.
    """
    auto = multimodal.auto_class(config)
    how = {**weights, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading("its config.json and weights"):
        model, info = auto.from_pretrained(place, **how)
    check_whole(name, model, Findings.of(model, info, held), held)
    return multimodal.text_view(model)


def _may_not_fit(place: Path, options: RunOptions, device: torch.device) -> bool:
    """Whether it must be looked at closely where the weights go."""
    if options.offload != "auto" or options.max_memory is not None:
        return options.offload != "none"
    size = offload.weights_on_disk(place)
    return device.type != "cpu" or size is None or size > SURELY_FITS


def _read_offloaded(
    name: str,
    place: Path,
    weights: dict[str, Any],
    held: Mapping[str, Held],
    config: Any,
    options: RunOptions,
    device: torch.device,
) -> tuple[Any, Memory]:
    """A model whose weights go where there is room for them."""
    dtype = weights["dtype"]
    placement = offload.place_weights(config, dtype, options, device)
    memory = offload.memory_for(placement, config.get_text_config(), dtype, options, device)
    model = _open(name, place, held, config, {**weights, **offload.loading_options(placement)})
    return model, memory


def _read_gguf(
    name: str,
    path: Path,
    extra: dict[str, Any],
    options: RunOptions,
    device: torch.device,
    *,
    exact: bool,
) -> _Read:
    """A GGUF file, de-quantised."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    from ghostlayers.model.gguf_file import for_transformers, open_gguf
    from ghostlayers.model.gguf_import import check_architecture, check_complete, complete

    if options.offload in ("cpu", "disk"):
        raise RecipeError(
            "--offload reads decoder layers from safetensors files as they are needed, but a .gguf "
            "file is expanded in memory; start from the model that it was made of."
        )
    file = open_gguf(path)
    check_architecture(file)
    place, extra = path.parent, {**extra, "gguf_file": path.name}
    stored = torch.float32 if exact else file.dtype
    weights: dict[str, Any] = {"dtype": compute_dtype(options, file.dtype, device)}
    # Newer versions keep the weights packed where they can, in layers that cannot be repaired.
    if hasattr(transformers, "GgufConfig"):
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # De-quantising draws bars that no setting of transformers turns off.
    with reading("the header"), contextlib.redirect_stderr(io.StringIO()), for_transformers():
        tokenizer = AutoTokenizer.from_pretrained(place, **extra)
        config = complete(AutoConfig.from_pretrained(place, **extra), file)
        model = _open(name, place, {}, config, {"config": config, **weights, **extra})
    check_complete(model, file)
    return _Read(quantized.expand(model, stored), tokenizer, stored)


def _place(model: Any, device: torch.device) -> Any:
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # how torch says that a device is absent
        raise RecipeError(f"cannot use the device '{device}': {say_why(error)}") from error


def _licence(path: Path) -> str | None:
    """The licence that the base model's card or GGUF header states."""
    if path.suffix == ".gguf":
        return _gguf_text(path, "general.license")
    from huggingface_hub import ModelCard

    card = path / "README.md"
    if not card.is_file():
        return None
    try:
        data = ModelCard.load(str(card)).data
    except Exception:  # a card is optional, and what is wrong with it must not stop a run
        return None
    licence = data.get("license")
    return str(data.get("license_name") or licence) if licence else None


def _title(path: Path) -> str | None:
    return _gguf_text(path, "general.name") if path.suffix == ".gguf" else None


def _gguf_text(path: Path, key: str) -> str | None:
    from ghostlayers.model.gguf_file import open_gguf

    return open_gguf(path).text(key)
