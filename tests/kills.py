"""Kill some work before each of the steps by which it changes a disk, one after another."""

import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ghostlayers.runtime import drafts

STEPS = (
    "open", "mkdir", "chmod", "fsync", "ftruncate", "pwrite", "rename", "replace", "unlink", "rmdir"
)  # fmt: skip


def killed_before(number: int, work: Callable[[], object], *, exchange: bool = True) -> bool:
    """Do the work in a process that is killed before its step of that number, if it comes to it.

    Args:
        number: of the step.
        work: what is done.
        exchange: let two names be exchanged at once, as some systems can.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child only writes files, whatever threads there were
        child = os.fork()
    if child == 0:
        try:
            _count_steps(number, exchange=exchange)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def kills(
    prepare: Callable[[], object], work: Callable[[], object], *, exchange: bool = True
) -> Iterator[int]:
    """Yield after every kill; ``prepare`` puts all in order before."""
    for number in itertools.count():
        prepare()
        if not killed_before(number, work, exchange=exchange):
            return
        yield number


def _count_steps(number: int, *, exchange: bool) -> None:
    left = [number]

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def take(*args: Any, **more: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return step(*args, **more)

        return take

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    drafts._exchanged = counted(drafts._exchanged if exchange else lambda *_: False)
