"""What a measurement was made on."""

import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE_OF_FREE = 0.5
"""Of the disk or of the memory, that streams may take for a while."""


def processor_name(device: torch.device | None = None) -> str:
    """The accelerator's or the processor's own name, as far as the system tells it."""
    if device is not None and device.type != "cpu":
        ask = getattr(torch.get_device_module(device), "get_device_name", None)
        return str(ask(device)) if ask is not None else device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def room_for_streams(*, on_disk: bool) -> int:
    """Bytes that streams may take on the disk of temporary files, or in the processor's memory."""
    temporary = tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free if on_disk else psutil.virtual_memory().available
    return int(SHARE_OF_FREE * free)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total)
    known = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(known, "total_memory", psutil.virtual_memory().total))


def input_device(model: "PreTrainedModel") -> torch.device:
    """Where a model takes its token ids, wherever its layers are."""
    weight: Any = model.get_input_embeddings().weight
    return torch.device(weight.device)


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    packages = ("ghostlayers", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
