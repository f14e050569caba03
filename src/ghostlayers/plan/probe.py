"""How fast this machine is: a probe of a second or two, and what parts of a run cost by it."""

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ghostlayers.evaluation.speed import synchronise
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import micro_batches
from ghostlayers.runtime import progress
from ghostlayers.statistics.moments import ACCUMULATOR
from ghostlayers.text.tokens import Windows

PROBED_LAYERS = 3
PROBED_ROWS = 1024
PROBED_WIDTH = 1024
"""Columns of the product and of the system that are timed; wider ones are counted from these."""

PROBED_BYTES = 64 * 2**20
"""Written to time a disk."""

HASHED_BYTES = 16 * 2**20

WRITTEN_UNNOTICED = 2**30
"""Bytes up to which nobody waits for a disk: the system keeps them in memory."""

REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Seconds that the parts of a run take here.

    Attributes:
        layer: one window through one decoder layer.
        head: one window through the head, its losses included.
        product: one multiply-add in float64.
        solution: one multiply-add of solving a system in float64.
        bring: one decoder layer brought in from where it lies; 0 if all are in memory.
    """

    layer: float
    head: float
    product: float
    solution: float = 0.0
    bring: float = 0.0


def probe_blindly(model: DenseModel, sequence_length: int, batch_size: int = 0) -> Speed:
    """`probe` on random tokens, before any text is read."""
    count = model.windows_per_call(sequence_length, batch_size)
    generator = torch.Generator().manual_seed(0)
    words = model.network.config.get_text_config().vocab_size
    ids = torch.randint(0, words, (count, sequence_length), generator=generator)
    return probe(model, Windows(ids, bos=False, available=count, documents=()), batch_size)


@torch.no_grad()
def probe(model: DenseModel, windows: Windows, batch_size: int = 0) -> Speed:
    """Time a few layers, the head, a float64 product and a small system on one micro-batch."""
    ids = next(micro_batches(model, windows, batch_size))
    batch, stream = model.begin(ids)
    some = range(min(PROBED_LAYERS, model.num_layers))
    bring = _bring_seconds(model) if model.residency.offloaded else 0.0
    end = stream

    def layer(index: int) -> Callable[[], None]:
        def run() -> None:
            nonlocal end
            end = model.run_layer(index, batch, stream)

        return run

    def head() -> None:
        logits = model.logits(batch, end, slice(0, min(128, ids.shape[1])))
        logits.float().log_softmax(dim=-1).sum()

    width, device = min(PROBED_WIDTH, model.hidden_size), stream.device
    block = torch.ones(PROBED_ROWS, width, dtype=ACCUMULATOR, device=device)
    system = torch.eye(width, dtype=ACCUMULATOR, device=device) * 2
    share = min(128, ids.shape[1]) / ids.shape[1]
    # A layer stays in memory while it is timed: bringing it in is counted by itself.
    timed = [
        *(layer(index) for index in some),
        head,
        lambda: block.T @ block,
        lambda: torch.linalg.cholesky(system),
    ]
    *layers, of_head, of_product, of_system = _all_seconds(timed, device)
    return Speed(
        layer=statistics.fmean(layers) / len(ids),
        head=of_head / share / len(ids),
        product=of_product / (PROBED_ROWS * width * width),
        solution=of_system / (width**3 / 3),
        bring=bring,
    )


def _all_seconds(timed: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """How long each of some pieces of work takes; of long windows, minutes in all."""
    seconds = []
    with progress.stage("Timing this machine", len(timed)) as advance:
        for work in timed:
            seconds.append(_seconds(work, device))
            advance()
    return seconds


def _bring_seconds(model: DenseModel) -> float:
    times = []
    # Every other layer: the one behind each is fetched already.
    for index in range(0, min(2 * PROBED_LAYERS, model.num_layers), 2):
        model.residency.release()
        began = time.perf_counter()
        model.residency.bring(index)
        times.append(time.perf_counter() - began)
    return statistics.fmean(times)


def writing_seconds(size: int, folder: Path | None = None) -> float:
    """To write so many bytes in a folder, from a file that is written, timed and gone at once.

    Args:
        size: bytes; for few of them nothing is timed and the answer is 0.
        folder: a path; the nearest folder on it that exists is written to. The one for temporary
            files if not given.
    """
    if size <= WRITTEN_UNNOTICED:
        return 0.0
    path = Path(tempfile.gettempdir()) if folder is None else folder.absolute()
    exists = next(folder_above for folder_above in (path, *path.parents) if folder_above.is_dir())
    with tempfile.TemporaryFile(dir=exists) as file:
        block = os.urandom(PROBED_BYTES)
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - began) * size / PROBED_BYTES


def hashing_seconds(size: int) -> float:
    """To take the SHA-256 of so many bytes."""
    block = bytes(HASHED_BYTES)
    began = time.perf_counter()
    hashlib.sha256(block)
    return (time.perf_counter() - began) * size / HASHED_BYTES


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs; the first one pays for allocation and does not count."""
    work()
    synchronise(device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def layer_flops(model: DenseModel, sequence_length: int) -> int:
    """Of one window through one decoder layer: two a weight and token, and its attention."""
    weights = sum(weight.numel() for weight in model.layers[0].parameters())
    hidden = model.hidden_size
    return int(2 * weights * sequence_length + 2 * 2 * sequence_length**2 * hidden // 2)


def head_flops(model: DenseModel, sequence_length: int) -> int:
    """Of one window through the head."""
    config = model.network.config.get_text_config()
    return int(2 * config.hidden_size * config.vocab_size * sequence_length)
