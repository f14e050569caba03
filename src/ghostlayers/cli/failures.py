"""Why a command ended, in words: what was asked wrongly, what the machine lacks, or a bug."""

import errno
from collections.abc import Collection, Iterator

from ghostlayers.errors import GhostlayersError, RecipeError, first_line

OUT_OF_MEMORY = (
    "out of memory",
    "OutOfMemory",
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",
    "Unable to allocate",
)
"""What libraries say when there is none left; few of them have an error of its own for it."""

LOWER = {
    "batch_size": "a smaller --batch-size",
    "sequence_length": "a smaller --sequence-length",
    "offload": "--offload disk",
    "max_memory": "--max-memory with less than what is free",
    "dtype": "--dtype bfloat16",
}
"""What costs less memory, by the option's parameter."""

OF_THE_SYSTEM = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.ENAMETOOLONG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ELOOP, errno.EBUSY),
        errno.ESTALE,
    }
)
"""Answers of the operating system that no program can prevent."""


def explain(error: Exception, options: Collection[str] = LOWER) -> tuple[str, int]:
    """A message for an error, and the exit status.

    Args:
        error: what ended the command.
        options: the command's parameters, of which advice may be given.
    """
    if any(map(is_out_of_memory, _with_causes(error))):
        lower = [advice for name, advice in LOWER.items() if name in options] or [*LOWER.values()]
        return f"out of memory. Try {', '.join(lower)}. ({first_line(error)[:300]})", 1
    if isinstance(error, GhostlayersError):
        return str(error), 2 if isinstance(error, RecipeError) else 1
    if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
        place = f" at '{error.filename}'" if error.filename else ""
        return f"the operating system refuses{place}: {error.strerror}.", 1
    said = f"{type(error).__name__}: {error}"
    return f"{said}. This is a bug: please report it with what --debug shows.", 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in whatever words, that there was not enough memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in f"{type(error).__name__}: {error}" for words in OUT_OF_MEMORY)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
