"""Keeping what other libraries say while they are imported off the screen."""

import contextlib
import logging
from collections.abc import Iterator

TALKATIVE = ("torchao", "torch.utils._pytree")
"""Where torchao is installed, transformers imports it, and it tells of kernels that other
processors or other versions of torch would have, and torch of how torchao registers its types."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Let these libraries report errors only, for as long as something is imported."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
