"""Freed memory is used again instead of being fetched anew from the system."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from ghostlayers.runtime.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()

def work():
    x = torch.ones(7 * 2**20)
    y = x * 2
    z = y - x
    return z + x

for _ in range(16):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# What glibc starts with; left to itself it then learns, by how much depends on where things lie.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_tensors_are_used_again() -> None:
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", SCRIPT.format(keep=keep)],
                capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK,
            ).stdout
        )
        for keep in (True, False)
    ]  # fmt: skip
    kept, returned = faults
    # A heap that was cut into pieces may have to grow once or twice more (7,168 pages a tensor); a
    # process that gives everything back fetches all 64 tensors of the second half anew.
    assert kept < 4 * 7168
    assert returned >= 64 * 7168


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghostlayers.runtime import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()


RETURNED = """
import psutil, torch
from ghostlayers.runtime.allocator import keep_freed_memory, return_freed_memory
keep_freed_memory()
held = [torch.ones(2**18) for _ in range(512)]  # a mebibyte each
kept = held[::32]
del held
before = psutil.Process().memory_info().rss
return_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_between_what_is_in_use_is_handed_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 300 * 2**20
