"""When the C library hands freed memory back to the system."""

import ctypes
import platform

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_KEPT = 32 * 2**20
"""Bytes of a block that is still kept; glibc takes no larger number."""
KEPT_IN_ALL = 256 * 2**20
"""Free bytes at the end of the heap above which they go back."""


def keep_freed_memory() -> bool:
    """Let the memory of freed tensors serve the next ones, up to a bound.

    By default glibc gives most of it back at once, and the system clears every page of it before
    handing it out again, which costs a processor time wherever tensors of some megabytes come and
    go. ``benchmarks/allocator.py`` measures how much.

    Returns:
        Whether this C library was told so; other ones are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(
        mallopt(M_TRIM_THRESHOLD, KEPT_IN_ALL)
    )


def return_freed_memory() -> None:
    """Hand free memory back to the system, from between what is in use as well.

    What is freed is kept in pieces, and over the length of a run the pieces become as many as those
    in use: where memory is bounded, they count. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
