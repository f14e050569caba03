"""What is said and recorded of a budget: what was counted, what is foreseen."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostlayers.budgets.size import Room, Weights
from ghostlayers.budgets.timing import Timed
from ghostlayers.errors import counted
from ghostlayers.runtime.sizes import show_bytes
from ghostlayers.spans import Span

if TYPE_CHECKING:
    from ghostlayers.budgets.decide import Budget


_COUNTED = {"Weights": "weights", "Room": "memory", "Timed": "seconds"}


def sentences(budget: "Budget", spans: Sequence[Span]) -> tuple[str, ...]:
    """What a cut comes to first, then how that was counted; of the dense model without spans."""
    measure = budget.measure
    if isinstance(measure, Weights):
        return _of_weights(measure, spans)
    if isinstance(measure, Room):
        return _of_room(measure, spans, budget.limit)
    assert isinstance(measure, Timed)
    return _of_seconds(measure, spans)


def figures_of(budget: "Budget", spans: Sequence[Span]) -> Mapping[str, Any]:
    """The same as plain numbers: bytes or seconds."""
    measure = budget.measure
    figures = {
        "counted": _COUNTED[type(measure).__name__],
        "dense": measure.of(()),
        "predicted": measure.of(spans),
        "limit": budget.limit,
    }
    if isinstance(measure, Weights):
        return {**figures, "unit": "bytes", "type": measure.words}
    if isinstance(measure, Room):
        own = {"weights": measure.weights.of(spans), "caches": measure.cached(spans)}
        more = {"allowance": measure.allowance, "context": measure.context}
        return {**figures, "unit": "bytes", "type": measure.weights.words, **own, **more}
    assert isinstance(measure, Timed)
    point, seconds = measure.point, measure.seconds
    return {
        **figures,
        "unit": "seconds",
        "factor": measure.of(()) / measure.of(spans),
        "speed": point.speed,
        "batch": point.batch,
        "length": point.length,
        "layers_seconds": list(seconds.layers),
        "rest_seconds": seconds.rest,
        "repair_seconds": seconds.operator,
        "device": measure.device,
    }


def _of_weights(weights: Weights, spans: Sequence[Span]) -> tuple[str, ...]:
    dense = weights.of(())
    counted = f"Counted: every parameter in {weights.words}, embeddings included."
    if not spans:
        return f"The model takes {show_bytes(dense)}.", counted
    left, repair = weights.of(spans), weights.of(spans) - weights.bare(spans)
    return (
        f"{_layers(spans)} less: {show_bytes(dense)} become {show_bytes(left)}, "
        f"{1 - left / dense:.1%} smaller, {_repair(show_bytes(repair) if repair else '')}.",
        counted,
    )


def _of_room(room: Room, spans: Sequence[Span], limit: float) -> tuple[str, ...]:
    total = show_bytes(room.of(spans))
    parts = (
        f"weights {show_bytes(room.weights.of(spans))} in {room.weights.words}, caches "
        f"{show_bytes(room.cached(spans))} of one sequence of {room.context:,} tokens in "
        f"{8 * room.itemsize} bits, and {show_bytes(room.allowance)} to compute in"
    )
    which = f"{_layers(spans)} less: {total}" if spans else f"The model takes {total}"
    return (
        f"{which} of {show_bytes(limit)}: {parts}.",
        "Room to compute in is reckoned from widths: logits of one position, and "
        f"{room.tokens} tokens of a prompt at a time. The program itself, the tokenizer and "
        "further sequences come on top.",
    )


def _of_seconds(timed: Timed, spans: Sequence[Span]) -> tuple[str, ...]:
    seconds = timed.seconds
    dense, left = seconds.of(()), seconds.of(spans)
    repair = _repair(_ms(seconds.operator) + " a gap" if seconds.operator else "")
    mean = sum(seconds.layers) / len(seconds.layers)
    measured = (
        f"Measured here, {timed.point}: {_ms(dense)} in all, {_ms(mean)} a layer, "
        f"{_ms(seconds.rest)} around the layers ({timed.device})."
    )
    if not spans:
        return f"The model takes {_ms(dense)}.", measured
    return (
        f"{_layers(spans)} less: {_ms(dense)} become {_ms(left)}, {dense / left:.2f}x as fast, "
        f"{repair}.",
        measured,
    )


def _layers(spans: Sequence[Span]) -> str:
    return counted(sum(map(len, spans)), "layer")


def _repair(cost: str) -> str:
    return f"the repair's {cost} included" if cost else "and the repair costs nothing"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
