"""What llama.cpp does in a process of its own: quantise, losses, speed, memory. Run as a program.

usage: python -P llama_program.py REQUEST.json

It writes lines of JSON: ``{"done": 1}`` for each unit of work, and at last ``{"answer": ...}``, or
``{"error": "..."}`` with what llama.cpp said. It imports llama_cpp, gguf and numpy, never
ghostlayers or torch, so that its memory is llama.cpp's.
"""

import contextlib
import ctypes
import gc
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import psutil

POSITIONS = 64
"""Whose logits are in memory at a time."""

SAID: list[str] = []
"""What llama.cpp warns and complains of."""

LEVELS = {3, 4}
"""Of its log: warnings and errors."""


class EngineError(Exception):
    """Something that llama.cpp could not do."""


def end_with_parent() -> None:
    """Be killed when whoever started this is, where the system can do that (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
def listen(level: int, text: bytes, _: Any) -> None:
    """Keep what may explain a failure."""
    line = text.decode("utf-8", "replace").strip()
    if level in LEVELS and line.strip("= "):
        SAID.append(line)


def tell(**what: Any) -> None:
    """One line for whoever started this."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def about(asked: dict[str, Any]) -> dict[str, Any]:
    """The version, and whether its quantiser takes an importance matrix through the binding."""
    del asked
    takes = hasattr(llama_cpp, "llama_model_imatrix_data")
    return {"version": llama_cpp.__version__, "takes_imatrix": takes}


def quantise(asked: dict[str, Any]) -> dict[str, Any]:
    """Write a file in another type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = asked["type"], asked["threads"]
    held = []
    if asked["imatrix"]:
        rows, notes = read_imatrix(Path(asked["imatrix"]))
        params.imatrix, params.kv_overrides = imatrix_rows(rows), overrides(notes)
        held = [rows, params.imatrix, params.kv_overrides]  # for as long as the call lasts
    done = llama_cpp.llama_model_quantize(
        asked["source"].encode(), asked["target"].encode(), ctypes.byref(params)
    )
    del held
    if done != 0:
        raise EngineError
    return {}


def read_imatrix(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean squares by tensor, as llama-quantize has them, and what it notes of their file."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    rows = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            base = name.removesuffix(".in_sum2")
            counts = tensors[f"{base}.counts"].reshape(-1, 1)
            means = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1.0)
            rows[base] = np.ascontiguousarray(means, dtype=np.float32).reshape(-1)
    notes = {
        "quantize.imatrix.file": path.name,
        "quantize.imatrix.dataset": reader.fields["imatrix.datasets"].contents()[0],
        "quantize.imatrix.entries_count": len(rows),
        "quantize.imatrix.chunks_count": int(reader.fields["imatrix.chunk_count"].contents()),
    }
    return rows, notes


def imatrix_rows(rows: dict[str, Any]) -> Any:
    """As the quantiser takes them: an array that ends with an empty entry."""
    kind = llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        kind(name.encode(), row.ctypes.data_as(pointer), row.size) for name, row in rows.items()
    ]
    return (kind * (len(entries) + 1))(*entries)


def overrides(notes: dict[str, Any]) -> Any:
    """Entries that the new file gets; the array ends with an empty one."""
    made = (llama_cpp.llama_model_kv_override * (len(notes) + 1))()
    for entry, (key, value) in zip(made, notes.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode()[:127]
    return made


class Engine:
    """A file opened in llama.cpp on the processor.

    Args:
        file: a GGUF file.
        context: tokens that it can see.
        batch: tokens a call.
        threads: that compute.
    """

    def __init__(self, file: str, *, context: int, batch: int, threads: int) -> None:
        wanted = llama_cpp.llama_model_default_params()
        wanted.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), wanted)
        if not self.model:
            raise EngineError
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = context, batch, batch
        how.n_threads = how.n_threads_batch = threads
        how.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise EngineError
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(batch, 0, 1)

    def forget(self) -> None:
        """Begin a new text."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, tokens: Any, start: int, *, all_logits: bool) -> Any:
        """Read tokens from a position on; logits of all of them, or of the last, [tokens, words].

        They are valid until the next call.
        """
        batch, count = self.batch, len(tokens)
        batch.n_tokens = count
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = int(token), start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = all_logits or index == count - 1
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise EngineError
        logits = llama_cpp.llama_get_logits(self.context)
        rows = count if all_logits else 1
        return np.ctypeslib.as_array(logits, shape=(rows, self.words))


def losses(asked: dict[str, Any]) -> dict[str, Any]:
    """Loss, divergences and agreement of every window, its logits made a few at a time.

    KL(p || q) of the reference's prediction p from the file's q, in nats, and half of |p - q|.
    """
    ids = np.load(asked["ids"])
    length = ids.shape[1]
    how = {"context": length, "batch": min(POSITIONS, length), "threads": asked["threads"]}
    mine = Engine(asked["file"], **how)
    dense = Engine(asked["reference"], **how) if asked["reference"] else None
    rows = []
    for window in ids:
        sums = np.zeros(5)
        for engine in filter(None, (mine, dense)):
            engine.forget()
        for start in range(0, length - 1, POSITIONS):
            sums += chunk(mine, dense, window, slice(start, min(start + POSITIONS, length - 1)))
        rows.append(sums.tolist())
        tell(done=1)
    return {"windows": rows}


def chunk(mine: Engine, dense: Engine | None, window: Any, places: slice) -> Any:
    """Tokens, loss, divergence, agreements and variation of some positions of a window."""
    targets = window[places.start + 1 : places.stop + 1]
    mine_read = mine.read(window[places], places.start, all_logits=True)
    total = log_sum(mine_read)
    loss = (total - mine_read[np.arange(len(targets)), targets]).sum()
    if dense is None:
        return np.array([len(targets), loss, 0.0, len(targets), 0.0])
    theirs = dense.read(window[places], places.start, all_logits=True)
    norm = log_sum(theirs)
    share = np.exp(theirs - norm[:, None].astype(np.float32))
    apart = (share * (theirs - mine_read)).sum(axis=1, dtype=np.float64) - norm + total
    agreements = (theirs.argmax(axis=1) == mine_read.argmax(axis=1)).sum()
    gap = np.abs(share - np.exp(mine_read - total[:, None].astype(np.float32)))
    variation = gap.sum(dtype=np.float64) / 2
    return np.array([len(targets), loss, np.maximum(apart, 0.0).sum(), agreements, variation])


def log_sum(logits: Any) -> Any:
    """log(sum(exp)) of each row, in float64."""
    top = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]


def speed(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds to read a prompt and to write each token behind it; memory at a context."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    engine = Engine(
        asked["file"], context=asked["context"], batch=asked["prompt"], threads=asked["threads"]
    )
    prompt = np.arange(asked["prompt"]) % engine.words
    reads, writes = [], []
    for turn in range(asked["repeats"] + 1):  # the first brings the file into memory
        engine.forget()
        took = list(timed(engine, prompt, asked["new_tokens"]))
        if turn:
            reads.append(took[0])
            writes += took[1:]
        tell(done=1)
    memory = psutil.Process().memory_info().rss - before
    return {"prefill": reads, "decode": writes, "memory_bytes": memory}


def timed(engine: Engine, prompt: Any, new_tokens: int) -> Iterator[float]:
    """Seconds of the prompt, then of each token behind it."""
    pieces = [(prompt, 0), *(([int(prompt[0])], len(prompt) + n) for n in range(new_tokens))]
    for tokens, start in pieces:
        begin = time.perf_counter()
        engine.read(tokens, start, all_logits=False)
        yield time.perf_counter() - begin


def main(request: str) -> int:
    """Do what the request asks; 0 if that went well."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    llama_cpp.llama_log_set(listen, None)
    llama_cpp.llama_backend_init()
    actions = {"about": about, "quantise": quantise, "losses": losses, "speed": speed}
    try:
        tell(answer=actions[asked["action"]](asked))
    except EngineError:
        tell(error="; ".join(SAID[-2:]) or "llama.cpp gives no reason")
        return 1
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1]))
