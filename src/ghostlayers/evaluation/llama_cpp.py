"""llama.cpp as an engine: what GGUF files compute there, how fast, and in how much memory.

Each file is opened in a process of its own (`llama_program`), so that what is measured is its own
and an abort of llama.cpp's ends in an error here.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghostlayers.errors import DependencyError, ModelError
from ghostlayers.evaluation.bench import Timing
from ghostlayers.runtime.launchers import alone
from ghostlayers.runtime.scratch import Scratch
from ghostlayers.runtime.shown import one_line, without_folders
from ghostlayers.statistics.losses import LossSums
from ghostlayers.text.tokens import Windows

PROGRAM = str(Path(__file__).with_name("llama_program.py"))

INSTALL = (
    "pip install llama-cpp-python builds it (several minutes; it needs a C++ compiler and CMake)"
)

CONTEXT = 4096
"""Tokens of the context whose memory is measured."""

PROMPT, NEW_TOKENS, REPEATS = 512, 32, 3
"""Of a measurement of speed: tokens that are read, tokens that are written behind them, turns."""

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class Engine:
    """The llama.cpp that is installed.

    Attributes:
        version: of llama-cpp-python.
        takes_imatrix: its quantiser can be given an importance matrix.
    """

    version: str
    takes_imatrix: bool


@dataclass(frozen=True)
class FileSpeed:
    """How fast a file is read and written with, and what it takes.

    Attributes:
        prefill: of a prompt.
        decode: of one token behind it.
        prompt_tokens: of that prompt.
        memory_bytes: of the weights, the cache of a whole context and the workspace.
        context: tokens of that context.
    """

    prefill: Timing
    decode: Timing
    prompt_tokens: int
    memory_bytes: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """As the rows of a comparison hold it."""
        return {
            "prefill_tokens_s": self.prompt_tokens / self.prefill.median,
            "prefill_spread": self.prefill.spread / self.prefill.median,
            "decode_tokens_s": 1 / self.decode.median,
            "decode_spread": self.decode.spread / self.decode.median,
            "prompt_tokens": self.prompt_tokens,
            "memory_bytes": self.memory_bytes,
            "context": self.context,
        }


def is_installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def find_engine(wanted_for: str) -> Engine:
    """The installed llama.cpp.

    Args:
        wanted_for: what needs it, as the message begins.

    Raises:
        DependencyError: there is none, or it does not start.
    """
    if not is_installed():
        raise DependencyError(f"{wanted_for} needs llama.cpp, which is not installed: {INSTALL}.")
    try:
        return Engine(**run("about"))
    except ModelError as error:
        raise DependencyError(
            f"{wanted_for} needs llama.cpp, but llama-cpp-python does not start: {error} {INSTALL}."
        ) from error


def measure_losses(
    file: Path, windows: Windows, reference: Path | None = None, advance: Advance | None = None
) -> list[LossSums]:
    """What a file predicts of windows of tokens, from llama.cpp's logits.

    Args:
        file: a GGUF file.
        windows: each is a text of its own; their tokens are the file's.
        reference: another file, from whose predictions the divergence is measured. Both are read
            side by side, 64 positions at a time, so that no logits are kept.
        advance: told of every window.

    Returns:
        Sums of each window; without a reference the divergence is 0.

    Raises:
        ModelError: llama.cpp cannot read a file.
    """
    with Scratch("types") as scratch:
        ids = Path(scratch, "ids.npy")
        np.save(ids, windows.input_ids.numpy().astype(np.int32))
        asked = {"file": file, "reference": reference, "ids": ids}
        rows = run("losses", advance, **asked)["windows"]
    return [LossSums(int(row[0]), row[1], row[2], int(row[3]), row[4]) for row in rows]


def measure_speed(
    file: Path,
    *,
    context: int = CONTEXT,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    advance: Advance | None = None,
) -> FileSpeed:
    """How fast a file reads and writes on the processor, and the memory of a context.

    Args:
        file: a GGUF file.
        context: tokens of the context.
        prompt: tokens that are read.
        new_tokens: that are written behind them, one at a time.
        repeats: of both; one more before them does not count.
        advance: told of every turn.

    Raises:
        ModelError: llama.cpp cannot read it.
    """
    figures = run(
        "speed", advance, file=file, context=context, prompt=prompt, new_tokens=new_tokens,
        repeats=repeats,
    )  # fmt: skip
    times = {name: Timing.of(figures[name]) for name in ("prefill", "decode")}
    return FileSpeed(
        **times, prompt_tokens=prompt, memory_bytes=figures["memory_bytes"], context=context
    )


def run(action: str, advance: Advance | None = None, **asked: Any) -> dict[str, Any]:
    """Have the program do something, and wait for its answer.

    Args:
        action: a function of `llama_program`.
        advance: told of every unit of its work.
        asked: its request; paths may be among it.

    Raises:
        ModelError: with what llama.cpp said.
    """
    request = {"action": action, "threads": torch.get_num_threads(), **asked}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, Scratch("types") as scratch:
        path = Path(scratch, "request.json")
        path.write_text(json.dumps(request, default=str), encoding="utf-8")
        command = [sys.executable, "-P", PROGRAM, str(path)]
        with subprocess.Popen(
            command, env=alone(), text=True, stdout=subprocess.PIPE, stderr=said
        ) as process:
            try:
                last = _last_line(process, advance)
            finally:
                process.kill()
        if "answer" in last:
            answer: dict[str, Any] = last["answer"]
            return answer
        said.seek(0)
        raise ModelError(_why(last, said.read().splitlines(), process.returncode))


def _last_line(process: "subprocess.Popen[str]", advance: Advance | None) -> dict[str, Any]:
    """What it says when it ends; nothing if it was ended."""
    last: dict[str, Any] = {}
    for line in process.stdout or ():
        if not line.startswith("{"):  # a library's own words
            continue
        last = json.loads(line)
        if "done" in last and advance is not None:
            advance(last["done"])
    process.wait()
    return last


def _why(last: dict[str, Any], said: Sequence[str], status: int) -> str:
    spoken = [line for line in said if line.strip()]
    reason = last.get("error") or (spoken or [f"it ended with status {status}"])[-1]
    return f"llama.cpp failed: {without_folders(one_line(reason))[:400]}."
