"""What launchers such as torchrun tell a process, read without torch."""

import os

LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Environment variables by which a launcher tells a process its place."""


def alone() -> dict[str, str]:
    """The environment of a program that is to run as one process, whatever started this one."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}


def is_first() -> bool:
    """Whether no launcher has started this process, or as its first one."""
    return os.environ.get("RANK", "0") == "0"


FSDP, FSDP_VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
"""By which ``accelerate launch --use_fsdp --fsdp_version`` says that models are to be sharded."""

FSDP_OFFLOADS = "FSDP_OFFLOAD_PARAMS"
FSDP_CHECKPOINTS = "FSDP_ACTIVATION_CHECKPOINTING"
FSDP_LOADS_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Asks transformers to read weights in one process alone; the others would get none."""


def asks_for_shards() -> bool:
    """Whether the launcher says that models are to be sharded."""
    return is_on(FSDP)


def is_on(name: str) -> bool:
    """Whether an environment variable says yes, in accelerate's words."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "y", "t", "on")
