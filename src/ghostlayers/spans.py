"""Spans of removed layers, and the numbering of boundaries before and after a cut.

Boundary b in [0, L] is the residual stream that enters decoder layer b; boundary L is the stream
before the final norm. A span [start, stop) is half-open and always indexes the *original* model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghostlayers.errors import SpanError


@dataclass(frozen=True, order=True)
class Span:
    """A run of removed decoder layers, [start, stop), in the original model's numbering."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise SpanError(f"span [{self.start}, {self.stop}) must satisfy 0 <= start < stop.")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.stop

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"

    @property
    def layers(self) -> range:
        """The removed layers."""
        return range(self.start, self.stop)


MOST_LAYERS = 100_000
"""More than any model has: a larger number is a slip, and such a list would fill the memory."""


def small_number(text: str) -> int | None:
    """A whole number of at most nine digits; None for anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None


def parse_layers(text: str) -> list[int]:
    """Read a list such as ``10-12,14`` (both ends included) as [10, 11, 12, 14].

    Raises:
        SpanError: on anything else, on a range that runs backwards, or on too many.
    """
    layers: list[int] = []
    for part in text.split(","):
        ends = [small_number(end) for end in part.split("-")]
        first, last = ends[0], ends[-1]
        if len(ends) > 2 or first is None or last is None:
            raise SpanError(
                f"cannot read '{part.strip()[:60]}' in the layers '{text[:60]}': expected numbers "
                "and inclusive ranges such as 10-12,14 (layers count from 0)."
            )
        if first > last:
            raise SpanError(f"range '{part.strip()}' runs backwards; write {last}-{first}.")
        if last >= MOST_LAYERS or len(layers) + last - first >= MOST_LAYERS:
            raise SpanError(
                f"'{part.strip()}' names more layers than any model has; expected numbers below "
                f"{MOST_LAYERS:,}."
            )
        layers.extend(range(first, last + 1))
    return layers


def format_layers(layers: Iterable[int]) -> str:
    """Write layers as inclusive ranges: [10, 11, 12, 14] becomes ``10-12,14``."""
    runs = [
        f"{s.start}" if len(s) == 1 else f"{s.start}-{s.stop - 1}" for s in merge_layers(layers)
    ]
    return ",".join(runs) or "none"


def merge_layers(layers: Iterable[int]) -> tuple[Span, ...]:
    """Join adjacent layers into spans, one a gap."""
    spans: list[Span] = []
    for layer in sorted(layers):
        if spans and spans[-1].stop == layer:
            spans[-1] = Span(spans[-1].start, layer + 1)
        else:
            spans.append(Span(layer, layer + 1))
    return tuple(spans)


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[Span, ...]:
    """Turn a list of layers to remove into spans, or say what is wrong with it.

    Raises:
        SpanError: the list is empty, names a layer twice or one that does not exist, or names all.
    """
    if not layers:
        raise SpanError("no layers to remove: name at least one.")
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise SpanError(f"layers {format_layers(repeated)} are named twice; name each layer once.")
    unknown = [layer for layer in layers if not 0 <= layer < num_layers]
    if unknown:
        listed = ",".join(map(str, unknown)) if min(unknown) < 0 else format_layers(unknown)
        raise SpanError(
            f"layers {listed} do not exist: the model has {num_layers} decoder "
            f"layers, 0 to {num_layers - 1}."
        )
    check_count(len(layers), num_layers)
    return merge_layers(layers)


def check_count(count: int, num_layers: int) -> None:
    """Refuse to remove no layer, or all of them."""
    if not 1 <= count < num_layers:
        raise SpanError(
            f"cannot remove {count} of {num_layers} decoder layers; "
            f"remove between 1 and {num_layers - 1}."
        )


def removed_layers(spans: Iterable[Span]) -> list[int]:
    """All removed layers in order."""
    return sorted(layer for span in spans for layer in span.layers)


def kept_layers(spans: Iterable[Span], num_layers: int) -> list[int]:
    """All surviving layers in order."""
    removed = set(removed_layers(spans))
    return [layer for layer in range(num_layers) if layer not in removed]


def pruned_boundary(span: Span, spans: Iterable[Span]) -> int:
    """The boundary of the *pruned* model at which the repair of this span acts.

    It is the number of layers kept before the span: 0 acts before the first kept layer, and the
    number of kept layers acts after the last.
    """
    return span.start - sum(len(other) for other in spans if other.stop <= span.start)
