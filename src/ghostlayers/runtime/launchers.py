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
