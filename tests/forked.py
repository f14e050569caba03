"""Reload checks in forks of one process, which has imported transformers once and nothing of ours.

Importing torch and transformers takes several seconds, loading one of the suite's checkpoints a
tenth of one. Run as a program it answers requests, a line of JSON each, from its standard input.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Forks:
    """Starts the program when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, program: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of a Python program, with what it said."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**environment, "OMP_NUM_THREADS": "1"},
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"program": program, "arguments": [*arguments], "environment": {**environment}}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess([program, *arguments], **answer)

    def close(self) -> None:
        """Stop the program, if it was started."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(timeout=30)


def serve() -> None:
    """Answer until the other side closes."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  what most checkpoints are

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes there
    for line in sys.stdin:
        request = json.loads(line)
        output = Path(request["environment"]["HF_MODULES_CACHE"]) / "said"
        child = os.fork()
        if child == 0:
            run(request, output)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = {
            name: Path(f"{output}.{name}").read_text(encoding="utf-8")
            for name in ("stdout", "stderr")
        }
        print(json.dumps({"returncode": code, **said}), file=answers, flush=True)


def run(request: dict[str, Any], output: Path) -> None:
    """Be the program that was asked for. Never returns."""
    import runpy
    import traceback

    from transformers import dynamic_module_utils
    from transformers.utils import logging

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY), number)
    code = 1
    with contextlib.suppress(BaseException):
        try:
            os.environ.clear()
            os.environ.update(request["environment"])
            # Both were read from the environment when transformers was imported.
            dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
            logging.set_verbosity_error()
            sys.argv = [request["program"], *request["arguments"]]
            runpy.run_path(request["program"], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
