"""Python programs as forks of one process, which has imported what takes long.

Importing torch, transformers and their company takes several seconds, loading one of the suite's
checkpoints a tenth of one. Run as a program it answers requests, a line of JSON each, from its
standard input. It computes nothing itself, so that no thread of it can be half-way through
anything when it forks.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Fork:
    """A started program; the part of `subprocess.Popen` that the suite uses."""

    def __init__(self, forks: "Forks", program: str, arguments: Sequence[str], said: Path) -> None:
        self.args = [program, *arguments]
        self.returncode: int | None = None
        self._forks, self._said = forks, said
        self.pid = 0

    def poll(self) -> int | None:
        """The exit status, once it has one."""
        if self.returncode is None:
            self.returncode = self._forks.ask({"poll": self.pid})["returncode"]
        return self.returncode

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """Wait for its end; what it said to its standard output and error."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        out, err = (Path(f"{self._said}.{name}") for name in ("stdout", "stderr"))
        return out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, 9)


class Forks:
    """Starts the process when it is first needed.

    Args:
        modules: what it imports.
        isolated: not even the suite's own modules are on its path.
    """

    def __init__(self, modules: Sequence[str], *, isolated: bool = False) -> None:
        self._command = [sys.executable, *(["-P"] if isolated else []), "-W", "ignore", __file__]
        self._command += modules
        self._server: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer."""
        if self._server is None:
            self._server = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(self, program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Fork:
        """Start a Python program."""
        self._count += 1
        said = Path(self._folder.name) / str(self._count)
        found = Fork(self, program, arguments, said)
        request = {"program": program, "arguments": [*arguments], "environment": {**environment}}
        found.pid = self.ask({**request, "said": str(said)})["pid"]
        return found

    def run(
        self, program: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Start it, and wait for its end."""
        started = self.start(program, arguments, environment)
        out, err = started.communicate()
        assert started.returncode is not None
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)

    def close(self) -> None:
        """Stop the process, if it was started."""
        if self._server is not None:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait(timeout=30)
            self._server.stdout.close()
        self._folder.cleanup()


def serve(*modules: str) -> None:
    """Answer until the other side closes."""
    for module in modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes there
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"returncode": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            child = os.fork()
            if child == 0:
                be(request)
            answer = {"pid": child}
        print(json.dumps(answer), file=answers, flush=True)


def be(request: dict[str, Any]) -> None:
    """Be the program that was asked for. Never returns."""
    import runpy
    import traceback

    from transformers import dynamic_module_utils
    from transformers.utils import logging

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{request['said']}.{name}", os.O_CREAT | os.O_WRONLY), number)
    code = 1
    with contextlib.suppress(BaseException):
        try:
            os.environ.clear()
            os.environ.update(request["environment"])
            # Both were read from the environment when transformers was imported.
            if cache := os.environ.get("HF_MODULES_CACHE"):
                vars(dynamic_module_utils)["HF_MODULES_CACHE"] = cache
            if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
                logging.set_verbosity_error()
            sys.argv = [request["program"], *request["arguments"]]
            runpy.run_path(request["program"], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
