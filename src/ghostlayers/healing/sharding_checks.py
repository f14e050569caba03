"""What FSDP2 can divide, and how models are opened for it: asked before any is."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ghostlayers.errors import RecipeError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import read_config
from ghostlayers.model.quantized import quantization_method
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import launchers
from ghostlayers.runtime.parallel import shards

VERSION = "2"
"""Of FSDP; accelerate takes 1 if nothing is said."""

REPLICAS = "Start without --use_fsdp: then every process holds the whole model"


def check_sharding(model: object, against: object) -> None:
    """Refuse what cannot be trained with a sharded model, before anything is opened.

    Args:
        model: the cut model, as `heal` is given it.
        against: the dense one.

    Raises:
        RecipeError: the message names what, and what to do instead.
    """
    if shards() == 1:
        return
    _check_launcher()
    on_disk = isinstance(against, DenseModel) and against.residency.offloaded
    if not isinstance(model, (str, Path)) or not (isinstance(against, (str, Path)) or on_disk):
        raise RecipeError(
            f"FSDP divides models as they are read from folders, but one of these is in memory: "
            f"save it, and name its folder. {REPLICAS}."
        )
    if isinstance(against, (str, Path)):
        _check_plain(str(against))


def _check_launcher() -> None:
    version = os.environ.get(launchers.FSDP_VERSION, "1").strip()
    if version != VERSION:
        raise RecipeError(
            f"heal shards models with FSDP version {VERSION}, but the launcher asks for version "
            f"{version[:20]}, accelerate's default; add --fsdp_version {VERSION}."
        )
    if launchers.is_on(launchers.FSDP_OFFLOADS):
        raise RecipeError(
            "heal keeps its shares where it computes, but the launcher asks for --fsdp_offload_"
            "params true; leave it away, and start more processes if memory is short."
        )


def _check_plain(name: str) -> None:
    if Path(name).suffix == ".gguf":
        kind = "a GGUF file"
    elif (method := quantization_method(read_config(name))) is not None:
        kind = f"packed by {method}"
    else:
        return
    raise RecipeError(
        f"FSDP reads decoder layers from safetensors files, but '{name}' is {kind}; heal against "
        f"the model that it was made of. {REPLICAS}."
    )


def options_for_shards(options: RunOptions) -> RunOptions:
    """How to open the dense model: its layers stay on disk until they are divided.

    Raises:
        RecipeError: the options say where layers lie.
    """
    if shards() == 1:
        return options
    asked = {"--offload": options.offload != "auto", "--max-memory": options.max_memory is not None}
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise RecipeError(
            f"{name} does not go with FSDP, which divides the model among the processes' memories; "
            f"leave {name} away. {REPLICAS}, or its share of the layers on disk."
        )
    return dataclasses.replace(options, offload="disk")


def options_for_cut(options: RunOptions, dense: DenseModel) -> RunOptions:
    """How to open the cut model, which stays on disk and is read from there."""
    if shards() == 1:
        return options
    name: Any = str(dense.dtype).removeprefix("torch.")
    return dataclasses.replace(options, offload="disk", device="cpu", dtype=name)
