"""What a measurement was made on."""

import platform
from pathlib import Path

import torch


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
