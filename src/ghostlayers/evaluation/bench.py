"""How fast models read and write over a grid of batches and lengths, and what memory they take."""

import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from ghostlayers.evaluation.speed import synchronise
from ghostlayers.runtime import progress
from ghostlayers.runtime.allocator import return_freed_memory
from ghostlayers.runtime.machine import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES_A_SECOND = 200
"""How often the process's memory is looked at while a model runs on a processor."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing.

    Attributes:
        median: in seconds.
        spread: between the quartiles, in seconds.
        repeats: how many.
    """

    median: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The median and the spread of some times."""
        if len(seconds) < 2:
            return cls(seconds[0], 0.0, len(seconds))
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, high - low, len(seconds))


@dataclass(frozen=True)
class Point:
    """One model at one batch and length.

    Attributes:
        model: its name.
        batch: sequences at a time.
        length: tokens of each prompt.
        prefill: reading the prompts, cache and logits of the last position included.
        decode: writing one token to every sequence, behind that prompt.
        cache_bytes: of keys and values (or other state) behind the prompt.
        peak_bytes: beyond the weights while prompts are read and a token is written.
    """

    model: str
    batch: int
    length: int
    prefill: Timing
    decode: Timing
    cache_bytes: int
    peak_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.batch * self.length / self.prefill.median

    @property
    def decode_rate(self) -> float:
        """Written tokens a second, all sequences together."""
        return self.batch / self.decode.median

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        rates = {"prefill_tokens_s": self.prefill_rate, "decode_tokens_s": self.decode_rate}
        return {**asdict(self), **rates}


@torch.no_grad()
def measure_grid(
    models: Mapping[str, Any],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 1,
) -> list[Point]:
    """Time models side by side.

    The models take turns within every repeat, so that a machine that grows warm, or another
    program that comes and goes, meets them all alike.

    Args:
        models: causal language models by name.
        batches: how many sequences at a time.
        lengths: tokens of a prompt.
        new_tokens: written behind each prompt, a step each.
        repeats: of each measurement.
        warmup: rounds before them that do not count.

    Returns:
        A point a model, batch and length, in the order given.
    """
    places = [(batch, length) for batch in batches for length in lengths]
    points = []
    rounds = warmup + repeats
    steps = len(places) * (rounds + 1) * len(models)
    with progress.stage("Timing", steps) as advance:
        for batch, length in places:
            reads: dict[str, list[float]] = {name: [] for name in models}
            writes: dict[str, list[float]] = {name: [] for name in models}
            caches, peaks = dict.fromkeys(models, 0), dict.fromkeys(models, 0)
            for turn in range(rounds):
                for name, model in models.items():
                    read, written, caches[name] = read_and_write(model, batch, length, new_tokens)
                    if turn >= warmup:
                        reads[name].append(read)
                        writes[name].extend(written)
                    advance(1)
            # By itself: what was freed is handed back first, and fetching it anew takes time.
            for name, model in models.items():
                return_freed_memory()
                with _peak_memory(model) as peak:
                    read_and_write(model, batch, length, new_tokens=1)
                peaks[name] = peak()
                advance(1)
            points += [
                Point(
                    name, batch, length, Timing.of(reads[name]), Timing.of(writes[name]),
                    caches[name], peaks[name],
                )
                for name in models
            ]  # fmt: skip
    return points


def read_and_write(
    model: "PreTrainedModel", batch: int, length: int, new_tokens: int
) -> tuple[float, list[float], int]:
    """Seconds of the prompt and of each token behind it; bytes of the cache behind the prompt."""
    device = input_device(model)
    words = model.config.get_text_config().vocab_size
    ids = torch.arange(batch * length, device=device).view(batch, length) % words
    output, read = _timed(device, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    cache = output.past_key_values
    size = cache_bytes(cache)
    written = []
    word = output.logits[:, -1:].argmax(dim=-1)
    for step in range(new_tokens):
        place = torch.tensor([length + step], device=device)

        def one(word: Tensor = word, place: Tensor = place) -> Any:
            return model(
                input_ids=word, past_key_values=cache, use_cache=True, cache_position=place
            )

        with warnings.catch_warnings():  # newer releases of transformers prefer another name
            warnings.simplefilter("ignore", FutureWarning)
            output, seconds = _timed(device, one)
        word = output.logits[:, -1:].argmax(dim=-1)
        written.append(seconds)
    return read, written, size


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - start


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds: keys and values, or a recurrent layer's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(cache))


def tensors_in(cache: Any) -> list[Tensor]:
    """All tensors that a cache, or a layer of one, holds, each once."""
    tensors: dict[int, Tensor] = {}
    _collect(cache, tensors, set())
    return list(tensors.values())


def _collect(value: Any, tensors: dict[int, Tensor], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        tensors[value.data_ptr()] = value
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, tensors, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, tensors, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers"):
        _collect(vars(value), tensors, seen)


@contextmanager
def _peak_memory(model: "PreTrainedModel") -> Iterator[Callable[[], int]]:
    """How much more memory is held at most than before."""
    device = input_device(model)
    if device.type == "cpu":
        with _peak_of_process() as peak:
            yield peak
        return
    module = torch.get_device_module(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    yield lambda: int(module.max_memory_allocated(device) - before)


@contextmanager
def _peak_of_process() -> Iterator[Callable[[], int]]:
    over = threading.Event()
    before = peak = _own_memory()

    def watch() -> None:
        nonlocal peak
        while not over.wait(1 / SAMPLES_A_SECOND):
            peak = max(peak, _own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: int(peak - before)
    finally:
        over.set()
        watcher.join()


def _own_memory() -> int:
    """Resident bytes of the process, without mapped files (weights) where the system tells."""
    held = psutil.Process().memory_info()
    return int(held.rss - getattr(held, "shared", 0))


def operator_share(points: Sequence[Point], dense: str, cut: str, repaired: str) -> float | None:
    """The repair's running time as a share of that of the layers it replaced; None if unknown.

    (repaired - cut) / (dense - cut), of the medians over the grid of prefill and decode times, each
    relative to the dense model's. Below zero it is noise.
    """
    times = {
        (point.model, point.batch, point.length, what): getattr(point, what).median
        for point in points
        for what in ("prefill", "decode")
    }
    places = {key[1:] for key in times}
    try:
        costs = [
            (times[repaired, *place] - times[cut, *place]) / times[dense, *place]
            for place in places
        ]
        gains = [
            (times[dense, *place] - times[cut, *place]) / times[dense, *place] for place in places
        ]
    except KeyError:
        return None
    gain = statistics.median(gains)
    return None if gain <= 0 else statistics.median(costs) / gain
