"""From scores to the layers that go: which may, which are candidates, which are taken."""

from ghostlayers.errors import RecipeError, SpanError, counted
from ghostlayers.selection.methods import SELECTIONS, Keep, Selection, find_selection
from ghostlayers.selection.table import ScoreTable, SpanScore
from ghostlayers.spans import Span, small_number

SHORTLIST = 3
"""Spans that ``recoverable`` takes from each of its two rankings."""


def parse_keep(text: str) -> Keep:
    """Read ``first:4,last:2``; what is not named is 0.

    Raises:
        RecipeError: it says anything else.
    """
    counts: dict[str, int] = {}
    for part in text.split(","):
        where, colon, count = (piece.strip() for piece in part.partition(":"))
        number = small_number(count) if colon else None
        if where not in ("first", "last") or where in counts or number is None:
            raise RecipeError(
                f"'keep_layers': cannot read '{part.strip()[:60]}' in '{text[:60]}': expected "
                "numbers of layers such as first:4,last:2."
            )
        counts[where] = number
    return counts.get("first", 0), counts.get("last", 0)


def eligible_layers(
    choice: Selection, num_layers: int, keep: Keep | None = None, *, keep_first: bool = False
) -> range:
    """The layers that a selection may remove.

    Args:
        choice: the selection.
        num_layers: decoder layers of the model.
        keep: layers at the start and at the end that stay, instead of those its paper protects.
        keep_first: layer 0 must stay, because the repair needs a kept layer before each gap.
    """
    first, last = choice.protected(keep)
    return range(max(first, int(keep_first)), max(0, num_layers - last))


def check_eligible(
    choice: Selection, layers: range, count: int, num_layers: int, keep: Keep | None = None
) -> None:
    """Refuse to remove more layers than a selection may.

    Raises:
        SpanError: the message says how many it may, and which.
    """
    if count <= len(layers):
        return
    which = f" ({layers[0]} to {layers[-1]})" if layers else ""
    if keep is not None:
        raise SpanError(
            f"cannot remove {counted(count, 'layer')} by '{choice}': only {len(layers)} of the "
            f"model's {num_layers} decoder layers are eligible{which}, since --keep-layers keeps "
            f"the first {keep[0]} and the last {keep[1]}. Keep fewer, or remove fewer."
        )
    protected = "unprotected" in set(choice.arguments) - choice.flags
    hint = f"; '{choice.name}:unprotected' may remove any" if protected else ""
    raise SpanError(
        f"cannot remove {counted(count, 'layer')} by '{choice}': only {len(layers)} of the "
        f"model's {num_layers} decoder layers are eligible{which}, the others are protected. "
        f"Remove fewer, or choose another selection{hint}."
    )


def candidate_spans(num_layers: int, length: int, keep: Keep | None = None) -> list[Span]:
    """Every contiguous span of a length.

    Args:
        num_layers: decoder layers of the model.
        length: layers to remove.
        keep: layers at the start and at the end that stay.

    Raises:
        SpanError: no span of this length is left.
    """
    first, last = keep or (0, 0)
    starts = range(first, num_layers - length + 1 - last)
    if length < 1 or not starts or length >= num_layers:
        most = min(num_layers - 1, num_layers - first - last)
        raise SpanError(
            f"no span of {counted(length, 'layer')} fits into {num_layers} decoder layers"
            + (f" when the first {first} and the last {last} stay" if first or last else "")
            + (f"; remove between 1 and {most}." if most > 0 else "; keep fewer.")
        )
    return [Span(start, start + length) for start in starts]


def shortlist(table: ScoreTable, size: int = SHORTLIST) -> tuple[Span, ...]:
    """The best spans by cosine, by residual and by angle, in order of their start.

    Neither ranking may decide alone: on some models the one, on others the other, picks a span
    that is far from the best. The loss after the repair decides between them.
    """
    by_cosine = sorted(table.spans, key=lambda score: -score.cosine)[:size]
    by_angle = sorted(table.spans, key=lambda score: score.angular)[:1]
    with_residual = [score for score in table.spans if score.residual is not None]
    by_residual = sorted(with_residual, key=_residual)[:size]
    return tuple(sorted({score.span for score in [*by_cosine, *by_angle, *by_residual]}))


def _residual(score: SpanScore) -> float:
    assert score.residual is not None
    return score.residual


def select(
    given: str | Selection,
    table: ScoreTable,
    count: int,
    keep: Keep | None = None,
    *,
    keep_first: bool = False,
) -> tuple[Span, ...]:
    """Apply a selection, or one of this name, to a model's scores.

    Selections that search (`Selection.searches`) have no scores to apply: see `search`.

    Raises:
        SpanError: more layers are asked for than may be removed.
    """
    choice = find_selection(given)
    layers = eligible_layers(choice, table.num_layers, keep, keep_first=keep_first)
    if not choice.contiguous:
        check_eligible(choice, layers, count, table.num_layers)
    return choice.take(table, layers, count)


__all__ = [
    "SELECTIONS",
    "SHORTLIST",
    "Keep",
    "Selection",
    "candidate_spans",
    "check_eligible",
    "eligible_layers",
    "find_selection",
    "parse_keep",
    "select",
    "shortlist",
]
