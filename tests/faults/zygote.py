"""The command line as forks of one process, which has imported what takes long.

Run as a program it listens at a socket; every connection is one run. It computes nothing itself,
so that no thread of it can be half-way through anything when it forks. Whoever hangs up ends the
run and all that it started.

usage: python zygote.py SOCKET MODULE ...
"""

import atexit
import contextlib
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REMOVALS = {"os.remove", "os.rmdir"}
"""What a full disk allows."""

OURS = "faults-said-"
"""What the campaign itself leaves where a run is killed while it waits."""

CHANGES = {"os.rename", "os.mkdir", "os.link", "os.symlink", *REMOVALS}
"""What the interpreter tells of before it changes a folder."""


class Zygote:
    """The process, started when first asked.

    Args:
        modules: what it imports.
        environment: what it is started with.
        isolated: nothing beside the installed packages is on its path.
    """

    def __init__(
        self, modules: Sequence[str], environment: Mapping[str, str], *, isolated: bool = False
    ) -> None:
        self.folder = tempfile.mkdtemp(prefix="faults-")
        self.socket = str(Path(self.folder) / "s")
        flags = ["-W", "ignore", *(["-P"] if isolated else [])]
        self.process = subprocess.Popen(
            [sys.executable, *flags, __file__, self.socket, *modules],
            env={**environment},
            stderr=subprocess.DEVNULL,
        )

    def start(self, request: Mapping[str, Any]) -> "Started":
        """Begin a run."""
        found = socket.socket(socket.AF_UNIX)
        for _ in range(1200):
            try:
                found.connect(self.socket)
                break
            except OSError:
                time.sleep(0.1)
        return Started(found, request)

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()
        for path in Path(self.folder).iterdir():
            path.unlink()
        Path(self.folder).rmdir()


class Started:
    """A run that goes on."""

    def __init__(self, connection: socket.socket, request: Mapping[str, Any]) -> None:
        self._connection = connection
        self._answers = connection.makefile("r")
        connection.sendall((json.dumps(request) + "\n").encode())
        self.pid = json.loads(self._answers.readline())["pid"]

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None, and its end, where it takes longer."""
        try:
            if not select.select([self._connection], [], [], seconds)[0]:
                return None
            line = self._answers.readline()
            return json.loads(line)["returncode"] if line else -9
        finally:
            self._answers.close()
            self._connection.close()


def run_in(zygote: str, program: str, arguments: Sequence[str], environment: Mapping[str, str]):
    """`subprocess.run` of a Python program, in a fork of another zygote."""
    with tempfile.TemporaryDirectory(prefix=OURS) as said:
        found = socket.socket(socket.AF_UNIX)
        found.connect(zygote)
        request = {"program": program, "argv": [*map(str, arguments)], "env": {**environment}}
        request["cwd"] = str(Path.cwd())
        code = Started(found, {**request, "said": said}).wait(600)
        out, err = (Path(said, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([program], -9 if code is None else code, out, err)


def serve(where: str, modules: Sequence[str]) -> None:
    """Answer until somebody ends it."""
    for module in modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(where)
    listening.listen(16)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            attend(connection)
            os._exit(0)
        connection.close()


def attend(connection: socket.socket) -> None:
    """One run, beside which this waits for its end or for a hang-up."""
    request = json.loads(connection.makefile("r").readline())
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        be(request)
    connection.sendall((json.dumps({"pid": child}) + "\n").encode())
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if select.select([connection], [], [], 0.01)[0]:
            status = None
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return
    answer = {"returncode": os.waitstatus_to_exitcode(status)}
    with contextlib.suppress(OSError):
        connection.sendall((json.dumps(answer) + "\n").encode())


def be(request: dict[str, Any]) -> None:
    """Be the run that was asked for. Never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        try:
            prepare(request)
            code = perform(request)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            traceback.print_exc()
            code = 130
        except BaseException:
            traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()  # as a process does that ends by itself
    os._exit(code)


def prepare(request: dict[str, Any]) -> None:
    """Its screen, its environment, its limits."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    Path(request["said"]).mkdir(parents=True, exist_ok=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = request.get(name) or str(Path(request["said"]) / name)
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
    if "cwd" in request:
        os.chdir(request["cwd"])
    _settle_transformers()
    limits = request.get("limits", {})
    if "memory" in limits:
        resource.setrlimit(resource.RLIMIT_DATA, (limits["memory"],) * 2)
    if "file_size" in limits:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)
    if "hook" in request:
        sys.addaudithook(_hook(**request["hook"]))


def _settle_transformers() -> None:
    """What transformers has read from the environment when it was imported."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    if cache := os.environ.get("HF_MODULES_CACHE"):
        vars(dynamic_module_utils)["HF_MODULES_CACHE"] = cache
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        logging.set_verbosity_error()


def _hook(under: str, at: int, what: str, count: str = "") -> Any:
    """Told of every change of a folder: ends the process, or fails the change, at one of them."""
    seen = 0
    counted = os.open(count, os.O_CREAT | os.O_WRONLY) if count else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, at
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event not in CHANGES:
            return
        if not str(Path.cwd() / str(arguments[0])).startswith(under):
            return
        seen += 1
        if counted is not None:
            os.pwrite(counted, f"{seen:9}".encode(), 0)
        if what.startswith("SIG") and seen == at:
            os.kill(os.getpid(), getattr(signal, what))
        elif not what.startswith("SIG") and seen >= at > 0 and event not in REMOVALS:
            at = -1  # once
            raise OSError(int(what), os.strerror(int(what)), str(arguments[0]))

    return hook


def perform(request: dict[str, Any]) -> int:
    """A program, a function of ours, or the command line."""
    if "program" in request:
        sys.argv = [request["program"], *request["argv"]]
        runpy.run_path(request["program"], run_name="__main__")
        return 0
    if "function" in request:
        module, name = request["function"].split(":")
        found = getattr(importlib.import_module(module), name)(**request["argv"])
        Path(request["answer"]).write_text(json.dumps(found))
        return 0
    from ghostlayers.checkpoint import proof
    from ghostlayers.runtime import interrupts

    if (reload := request.get("reload")) and hasattr(proof, "_run_alone"):
        proof._run_alone = lambda *given: run_in(reload, *given)
    sys.argv = ["ghostlayers", *request["argv"]]
    interrupts.leave_at_once()  # as the program does before it imports anything
    runpy.run_module("ghostlayers", run_name="__main__")
    return 0


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
