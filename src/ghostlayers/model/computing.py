"""On which device and in which type a run computes."""

import time

import torch

from ghostlayers.errors import RecipeError
from ghostlayers.presets import find_preset
from ghostlayers.recipe import RunOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FAST_ENOUGH = 1.3
"""A half-precision type is used where it multiplies at least this much faster than float32."""

TURNS = 16
"""In which that is measured."""


def device_named(options: RunOptions) -> torch.device:
    """The device that a run asks for, or the one that is there.

    Raises:
        RecipeError: it is not there, or has no float64.
    """
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
    """How many times faster this processor multiplies matrices in a type than in float32.

    The best of many times, in turns: whatever else the machine does, the same type is chosen again,
    so that a command that is repeated computes the same bits.
    """
    best: dict[torch.dtype, float] = {}
    for kind in (torch.float32, dtype) * TURNS:
        left, right = torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        elapsed = time.perf_counter() - start
        best[kind] = min(elapsed, best.get(kind, elapsed))
    return best[torch.float32] / best[dtype]
