"""Opening a model that is larger than memory: what stays, what lies elsewhere, what fits.

The decoder layers of an offloaded model lie on disk (in the model's own safetensors files, where
these hold the weights as the model computes with them) or in the processor's memory beside an
accelerator; embeddings, final norm and head stay where the model computes. The placing itself is
accelerate's big-model loading through transformers; `residency` brings layers in.
"""

import atexit
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ghostlayers.errors import RecipeError
from ghostlayers.model import multimodal
from ghostlayers.model.residency import Memory, largest_layer
from ghostlayers.model.stream import (
    TOKENS_PER_BATCH,
    TOKENS_PER_BATCH_ON_ACCELERATOR,
    find_decoder_layers,
)
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.scratch import Scratch
from ghostlayers.runtime.sizes import parse_memory

ROOM = 0.8
"""Share of the free memory that weights may take before they are put elsewhere unasked."""

LAYERS_AT_ONCE = 2
"""The layer that computes, and the one that is fetched meanwhile."""

FLOATS_A_HIDDEN_CHANNEL = 16
"""Numbers a token and channel that one layer's attention and norms hold at their peak."""

FLOATS_AN_INNER_CHANNEL = 4
"""... and that its MLP holds a token and inner channel."""

LOGITS_BYTES = 5 * 4 * 2**24
"""What a loss holds of logits: see `cuts.LOGITS_AT_ONCE`."""


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model go.

    Attributes:
        device_map: as accelerate wants it; None where everything stays where it computes.
        resident: bytes of what stays.
        layer: bytes of the largest decoder layer.
        total: bytes of all weights.
        elsewhere: ``disk`` or ``cpu``.
    """

    device_map: dict[str, Any] | None
    resident: int
    layer: int
    total: int
    elsewhere: str = ""


def place_weights(
    config: Any, dtype: torch.dtype, options: RunOptions, device: torch.device
) -> Placement:
    """Decide where a model's weights go, from its config alone.

    Raises:
        RecipeError: it cannot go where the options say.
    """
    if options.offload == "cpu" and device.type == "cpu":
        raise RecipeError(
            "--offload cpu keeps layers in the processor's memory beside an accelerator, but this "
            "run computes on the processor itself; use --offload disk."
        )
    bare = skeleton(config, dtype, options)
    total = sum(_bytes(parameter) for parameter in _unique(bare))
    layers = find_decoder_layers(multimodal.text_view(bare))
    layer = largest_layer(list(layers))
    where = _where(options, device, total)
    if not where:
        return Placement(None, total, layer, total)
    of_layers = {id(p): _bytes(p) for module in layers for p in module.parameters()}
    # A name, no torch.device: accelerate hands it to safetensors, which knows names and numbers.
    mapped = dict(_device_map(bare, "", layers, where, str(device)))
    return Placement(mapped, total - sum(of_layers.values()), layer, total, where)


def skeleton(config: Any, dtype: torch.dtype, options: RunOptions) -> Any:
    """A model without weights, from its config alone."""
    from accelerate import init_empty_weights

    auto = multimodal.auto_class(config)
    config = config if multimodal.is_whole(config) else config.get_text_config()
    with init_empty_weights():
        return auto.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)


def _unique(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from {id(p): p for p in model.parameters()}.values()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _where(options: RunOptions, device: torch.device, total: int) -> str:
    """``disk``, ``cpu``, or nothing where all weights may stay."""
    if options.offload in ("cpu", "disk"):
        return options.offload
    if options.offload == "none":
        return ""
    on_processor = psutil.virtual_memory().available
    limit = parse_memory(options.max_memory)
    if device.type != "cpu":
        free = _free_on(device)
        if total <= ROOM * min(free, limit or free):
            return ""
        return "cpu" if total <= ROOM * on_processor else "disk"
    return "" if total <= ROOM * min(on_processor, limit or on_processor) else "disk"


def _free_on(device: torch.device) -> int:
    module = torch.get_device_module(device)
    ask = getattr(module, "mem_get_info", None)
    return int(ask(device)[0]) if ask is not None else psutil.virtual_memory().available


def _device_map(
    module: nn.Module, name: str, layers: nn.ModuleList, where: str, device: str
) -> Iterator[tuple[str, str]]:
    """One entry for every largest module that lies in one place."""
    if module is layers:
        for index in range(len(layers)):
            yield f"{name}.{index}", where
        return
    if not any(part is layers for part in module.modules()):
        yield name, device
        return
    for child, part in module.named_children():
        yield from _device_map(part, f"{name}.{child}" if name else child, layers, where, device)
    for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield (f"{name}.{own}" if name else own), device


def loading_options(placement: Placement) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a placement."""
    if placement.device_map is None:
        return {}
    # Weights that the model keeps otherwise than its files do are written here, once. Copies of it
    # read there as well, so that the folder stays until the process ends.
    folder = Scratch("offload")
    atexit.register(folder.cleanup)
    return {"device_map": placement.device_map, "offload_folder": folder.name}


def memory_for(
    placement: Placement, config: Any, dtype: torch.dtype, options: RunOptions, device: torch.device
) -> Memory:
    """What a run may take, and what of it is spent before any stream is held.

    Raises:
        RecipeError: the limit is below what the weights and one layer's work take.
    """
    limit = parse_memory(options.max_memory)
    if limit is None:
        free = psutil.virtual_memory().available if device.type == "cpu" else _free_on(device)
        limit = int(ROOM * free) + _resident_now(device)
    spent = _resident_now(device) + workspace(config, dtype, device)
    at_once = LAYERS_AT_ONCE * placement.layer if placement.device_map else 0
    spent += placement.resident + at_once
    if spent > limit:
        raise RecipeError(
            f"--max-memory {options.max_memory or _gibibytes(limit)} is too little: the program "
            f"itself takes {_gibibytes(_resident_now(device))}, embeddings and head "
            f"{_gibibytes(placement.resident)}, {LAYERS_AT_ONCE} decoder layers "
            f"{_gibibytes(at_once)}, work on {_tokens(device):,} tokens at a time "
            f"{_gibibytes(workspace(config, dtype, device))}: together {_gibibytes(spent)}. Allow "
            "more."
        )
    return Memory(limit, spent)


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _resident_now(device: torch.device) -> int:
    """Bytes that the process holds in the memory that is limited."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


def _tokens(device: torch.device) -> int:
    return TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_PER_BATCH_ON_ACCELERATOR


def workspace(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that one layer's activations, one block of a sum and one block of logits take."""
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers = FLOATS_A_HIDDEN_CHANNEL * hidden + FLOATS_AN_INNER_CHANNEL * int(inner)
    return int(_tokens(device) * numbers * dtype.itemsize) + LOGITS_BYTES


def weights_on_disk(place: str | Path) -> int | None:
    """Bytes of a folder's safetensors files; None where that is no folder."""
    folder = Path(place)
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder.is_dir() else None
