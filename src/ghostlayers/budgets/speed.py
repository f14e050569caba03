"""Seconds of the parts of a model on this machine: layers, all that is around them, the repair.

Measured in the running model, as `bench` measures it: one prompt, and tokens written behind it.
Every decoder layer is timed where it runs, with the caches that it has then; what is left of the
whole is embeddings, norms and head. Timed layers take turns with whole runs that nothing watches,
and only the shares of the layers are taken from the former.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.errors import InputError, RecipeError
from ghostlayers.evaluation.bench import read_and_write
from ghostlayers.evaluation.speed import synchronise
from ghostlayers.model.dense import DenseModel
from ghostlayers.modeling import norm_eps, repair_stream
from ghostlayers.recipe.recipe import Speed
from ghostlayers.repairs import RepairMethod
from ghostlayers.repairs.shapes import operator_shapes
from ghostlayers.runtime import progress
from ghostlayers.runtime.machine import memory_of
from ghostlayers.spans import Span, kept_layers

ROUNDS = 5
"""Prompts read with every layer timed, and as many without."""

WRITTEN = 16
"""Tokens written behind each, as `bench` does."""

WARM_UP = 1

PATIENCE = 30.0
"""Seconds after which no further round begins, once one has counted: a slow machine's few rounds
tell as much as a fast one's many."""

COLD = 64 * 2**20
"""Bytes of operators that take turns while one is timed: in a real model, layers run in between,
and no processor finds it in its caches."""

REPEATS = 32
"""Of an operator; the median counts."""

VECTORS = 8
"""Of the stream's width, that a token takes at the least while a layer runs."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Point:
    """Where a speed is measured.

    Attributes:
        speed: writing a token behind a prompt (``decode``), or reading the prompt (``prefill``).
        batch: sequences at a time.
        length: tokens of each prompt.
    """

    speed: Speed = "decode"
    batch: int = 1
    length: int = 512

    def __str__(self) -> str:
        many = "one sequence" if self.batch == 1 else f"{self.batch} sequences"
        if self.speed == "prefill":
            return f"reading prompts of {self.length} tokens, {many} at a time (prefill)"
        return f"writing a token behind {self.length} others, {many} at a time (decode)"


@dataclass(frozen=True)
class Seconds:
    """What the parts of a model take at one point, in seconds.

    Attributes:
        layers: each decoder layer.
        rest: embeddings, final norm, head and all else around them.
        operator: what the repair of one gap leaves to run; 0 where it folds.
    """

    layers: tuple[float, ...]
    rest: float
    operator: float = 0.0

    def of(self, spans: Sequence[Span]) -> float:
        """The model without these layers, with a repair at every gap; dense without spans."""
        return self.bare(spans) + len(spans) * self.operator

    def bare(self, spans: Sequence[Span]) -> float:
        """The same without a repair."""
        return self.rest + sum(self.layers[i] for i in kept_layers(spans, len(self.layers)))

    @property
    def share_of_a_layer(self) -> float:
        """The repair of one gap as a share of a decoder layer's mean time."""
        return self.operator / statistics.fmean(self.layers)


def time_parts(
    dense: DenseModel,
    point: Point,
    *,
    clock: Clock = time.perf_counter,
) -> Seconds:
    """Time a model's own layers and all that is around them.

    Args:
        dense: with its weights where it computes.
        point: where.
        clock: seconds.

    Raises:
        RecipeError: its layers lie elsewhere, so that bringing them would be timed.
        InputError: it has no places for so many tokens.
    """
    check_point(dense, point)
    whole: list[float] = []
    watched: list[list[float]] = []
    rounds, began = WARM_UP + ROUNDS, clock()
    with progress.stage("Timing the layers", 2 * rounds) as advance:
        for turn in range(rounds):
            if watched and clock() - began > PATIENCE:
                break
            alone = _run(dense, point)
            advance(1)
            with _stamped(dense, clock) as calls:
                _run(dense, point)
            advance(1)
            if turn >= WARM_UP:
                whole.extend(alone)
                watched.extend(_of_point(calls, point))
    return _parts(statistics.median(whole), watched, _kinds(dense))


def check_point(dense: DenseModel, point: Point) -> None:
    """Refuse what cannot be timed; errors as `time_parts`."""
    if dense.residency.offloaded:
        raise RecipeError(
            "--faster times the layers where they compute, but here they lie elsewhere and are "
            "brought in for every call. Give the run more memory, or use --layers or --smaller."
        )
    limit = getattr(dense.network.config.get_text_config(), "max_position_embeddings", None)
    behind = written_at(point)
    if limit is not None and point.length + behind > limit:
        raise InputError(
            f"--at: a prompt of {point.length} tokens and {behind} behind it exceed the model's "
            f"{limit} positions; the longest that works is {point.batch}x{max(1, limit - behind)}."
        )
    width = dense.hidden_size * dense.dtype.itemsize * VECTORS
    fits = int(memory_of(dense.device) // width)
    if point.batch * (point.length + behind) > fits:
        raise InputError(
            f"--at: {point.batch:,} sequences of {point.length:,} tokens are more than this "
            f"machine's memory holds, about {fits:,} tokens of this model in all. Take fewer."
        )


def written_at(point: Point) -> int:
    """Tokens that are written behind each prompt where a speed is measured."""
    return 1 if point.speed == "prefill" else WRITTEN


def _run(dense: DenseModel, point: Point) -> list[float]:
    """Seconds of a whole prompt, or of each token behind it."""
    new = written_at(point)
    read, written, _ = read_and_write(dense.network, point.batch, point.length, new)
    return [read] if point.speed == "prefill" else written


Call = tuple[float, float, tuple[float, ...]]
"""Of the whole model: when it began, when it ended, and seconds of every decoder layer."""


@contextmanager
def _stamped(dense: DenseModel, clock: Clock) -> Iterator[list[Call]]:
    """The calls of a model with the seconds of its layers, the accelerator waited for each time."""
    calls: list[Call] = []
    layers: list[float] = []
    began = [0.0, 0.0]

    def now() -> float:
        synchronise(dense.device)
        return clock()

    def start(place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            began[place] = now()

        return hook

    def of_layer(*_: Any) -> None:
        layers.append(now() - began[1])

    def of_model(*_: Any) -> None:
        calls.append((began[0], now(), tuple(layers)))
        layers.clear()

    handles = [*_hooks(dense.network, start(0), of_model)]
    for layer in dense.layers:
        handles += _hooks(layer, start(1), of_layer)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module, before: Any, after: Any) -> tuple[Any, Any]:
    return module.register_forward_pre_hook(before), module.register_forward_hook(after)


def _of_point(calls: Sequence[Call], point: Point) -> list[list[float]]:
    """Of each call that counts, seconds around the layers and of every layer."""
    counted = calls[:1] if point.speed == "prefill" else calls[1:]
    return [[end - begin - sum(layers), *layers] for begin, end, layers in counted]


def _kinds(dense: DenseModel) -> list[Hashable]:
    """All that a layer's time can depend on: its class and attention, and its weights' sizes."""
    attention = getattr(dense.config, "layer_types", None) or [None] * dense.num_layers
    return [
        (type(layer), kind, *((n, w.shape, w.dtype) for n, w in layer.named_parameters()))
        for layer, kind in zip(dense.layers, attention, strict=False)
    ]


def _parts(whole: float, watched: Sequence[Sequence[float]], kinds: Sequence[Hashable]) -> Seconds:
    """The whole, shared out as the medians of its parts are; layers of one kind take the same.

    A program that comes between lengthens any one part of a call: it is in no median, and falls to
    all parts alike.
    """
    around, *layers = zip(*watched, strict=True)
    rest = max(0.0, statistics.median(around))
    alike: dict[Hashable, list[float]] = {}
    for kind, seconds in zip(kinds, layers, strict=True):
        alike.setdefault(kind, []).extend(seconds)
    medians = {kind: max(0.0, statistics.median(seconds)) for kind, seconds in alike.items()}
    times = [medians[kind] for kind in kinds]
    scale = whole / (rest + sum(times))
    return Seconds(tuple(scale * seconds for seconds in times), scale * rest)


@torch.no_grad()
def time_operator(
    dense: DenseModel,
    method: RepairMethod,
    point: Point,
    *,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds of what a repair leaves to run at one gap; 0 where it folds into weights.

    An operator of the right shapes with random numbers is timed, several of them in turns.
    """
    shapes = operator_shapes(method, dense.hidden_size)
    if not shapes:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    tokens = point.length if point.speed == "prefill" else 1
    stream = _random((point.batch, tokens, dense.hidden_size), generator, dense)
    one = {name: _random(shape, generator, dense) for name, shape in shapes.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in one.values())
    some = [
        {n: tensor.clone() for n, tensor in one.items()} for _ in range(1 + COLD // max(1, size))
    ]
    eps, times = norm_eps(dense.network.config), []
    for turn in range(WARM_UP + REPEATS):
        synchronise(dense.device)
        began = clock()
        repair_stream(stream, some[turn % len(some)], eps)
        synchronise(dense.device)
        times.append(clock() - began)
    return statistics.median(times[WARM_UP:])


def _random(shape: tuple[int, ...], generator: torch.Generator, dense: DenseModel) -> Tensor:
    return torch.randn(shape, generator=generator).to(dense.device, dense.dtype)
