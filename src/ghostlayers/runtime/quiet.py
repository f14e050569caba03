"""Importing other libraries, quickly, and with what they say kept off the screen."""

import contextlib
import gc
import logging
import re
from collections.abc import Iterator

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Where torchao is installed, transformers imports it, and it tells of kernels that other
processors or other versions of torch would have, torch of how torchao registers its types, and
bitsandbytes of kernels that it would fetch."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Let these libraries report errors only, for as long as something is imported.

    Nor is garbage collected meanwhile: imports make next to none, and looking for it among all
    that they do make is a third of their time.
    """
    collects = gc.isenabled()
    gc.disable()
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if collects:
            gc.enable()


class _Keeper(logging.Handler):
    """Keeps what is said, without colours."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))


@contextlib.contextmanager
def kept_report() -> Iterator[list[str]]:
    """Keep what transformers tells of the weights that it reads, be it shown or not.

    Its errors point to that report, which the command line does not show.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level, spreads, keeper = logger.level, logger.propagate, _Keeper()
    logger.propagate = spreads and logger.isEnabledFor(logging.WARNING)
    logger.addHandler(keeper)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield keeper.said
    finally:
        logger.removeHandler(keeper)
        logger.setLevel(level)
        logger.propagate = spreads
