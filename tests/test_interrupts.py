"""Ctrl-C, SIGTERM and a closed terminal end a command in one way, from its first instant."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ghostlayers.runtime.interrupts import SAID, SIGNALS, raised


def masks(process: int) -> dict[str, int]:
    """Which signals a process ignores and handles, as the system tells."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {line[:6]: int(line[7:], 16) for line in lines if line[:6] in ("SigCgt", "SigIgn")}


HEARD = (
    "import os, signal, sys; [signal.signal(each, signal.SIG_DFL) for each in"
    " (signal.SIGINT, signal.SIGHUP)]; os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Starts a program that hears signals, also where the tests themselves run deaf to them."""


def start(*before: str) -> subprocess.Popen[str]:
    """The program, which is to import all that it needs."""
    hearing = [sys.executable, "-c", HEARD, *before]
    command = [*hearing, sys.executable, "-m", "ghostlayers", "inspect", "no-such-folder"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_program_that_still_imports_ends_politely(number: signal.Signals) -> None:
    with start() as process:
        while not masks(process.pid)["SigCgt"] & (1 << (signal.SIGTERM - 1)):
            time.sleep(0.002)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == f"Error: {SAID}\n"


@needs_proc
def test_what_is_ignored_stays_ignored() -> None:
    with start("nohup") as process:
        while not masks(process.pid)["SigCgt"] & (1 << (signal.SIGTERM - 1)):
            time.sleep(0.002)
        assert masks(process.pid)["SigIgn"] & (1 << (signal.SIGHUP - 1))
        os.kill(process.pid, signal.SIGHUP)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130  # by the second, not by the first


@pytest.mark.parametrize("number", SIGNALS)
def test_within_a_command_each_raises_the_same(number: int) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with raised() as interrupts:
        if signal.getsignal(number) == signal.SIG_IGN:
            pytest.skip("ignored here")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert interrupts.received
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_who_imports_the_package_keeps_its_own_ways() -> None:
    code = "import signal, ghostlayers; print(signal.getsignal(signal.SIGTERM))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(signal.getsignal(signal.SIGUSR1))
