"""From scores to the layers that go: pure functions of a score table."""

from typing import Literal

from ghostlayers.errors import SpanError
from ghostlayers.scores.table import ScoreTable, SpanScore
from ghostlayers.spans import Span, merge_layers

Edges = Literal["allow", "protect"]

TIE_ERRORS = 2.0
"""Losses whose difference is less than so many of its standard errors decide nothing."""

SHORTLIST = 3
"""Spans that ``recoverable`` takes from each of its two rankings."""


def candidate_spans(num_layers: int, length: int, edges: Edges = "allow") -> list[Span]:
    """Every contiguous span of a length.

    Args:
        num_layers: decoder layers of the model.
        length: layers to remove.
        edges: ``protect`` leaves out spans that start at layer 0 or reach the last layer, as the
            released Ghosted Layers code does.

    Raises:
        SpanError: no span of this length is left.
    """
    inset = 1 if edges == "protect" else 0
    starts = range(inset, num_layers - length + 1 - inset)
    if length < 1 or not starts or length >= num_layers:
        raise SpanError(
            f"no span of {length} layers fits into {num_layers} decoder layers"
            + (" when the first and the last layer are protected" if inset else "")
            + f"; remove between 1 and {num_layers - 1 - 2 * inset}."
        )
    return [Span(start, start + length) for start in starts]


def select_streamline(table: ScoreTable) -> tuple[Span, ...]:
    """The span with the highest cosine (LLM-Streamline, arXiv:2403.19135)."""
    return (max(table.spans, key=lambda score: score.cosine).span,)


def select_shortgpt(table: ScoreTable, count: int, edges: Edges) -> tuple[Span, ...]:
    """The layers of lowest Block Influence (ShortGPT, arXiv:2403.03853).

    The released Ghosted Layers code never removes the last layer; ``protect`` reproduces that.
    """
    eligible = range(table.num_layers - (1 if edges == "protect" else 0))
    if count > len(eligible):
        raise SpanError(f"cannot remove {count} of {len(eligible)} eligible layers; ask for fewer.")
    return merge_layers(sorted(eligible, key=lambda i: table.block_influence[i])[:count])


def shortlist(table: ScoreTable, size: int = SHORTLIST) -> tuple[Span, ...]:
    """The best spans by cosine and the best by residual, in order of their start.

    Neither ranking may decide alone: on some models the one, on others the other, picks a span
    that is far from the best. The loss after the repair decides between them.
    """
    by_cosine = sorted(table.spans, key=lambda score: -score.cosine)[:size]
    with_residual = [score for score in table.spans if score.residual is not None]
    by_residual = sorted(with_residual, key=_residual)[:size]
    return tuple(sorted({score.span for score in [*by_cosine, *by_residual]}))


def select_recoverable(table: ScoreTable) -> tuple[Span, ...]:
    """The span whose repaired model loses least on held-out calibration windows.

    Among spans whose losses there cannot be told apart, the one that a linear map replaces best:
    the residual carries over to other text where a difference within its error does not.
    """
    measured = [score for score in table.spans if score.loss is not None]
    if not measured:
        raise SpanError("no span's loss was measured; give held-out windows (at least 1).")
    tied = [score for score in measured if score.behind <= TIE_ERRORS * score.behind_error]
    return (min(tied, key=_residual).span,)


def _residual(score: SpanScore) -> float:
    assert score.residual is not None
    return score.residual


SELECTIONS: dict[str, str] = {
    "streamline": "one contiguous span, highest cosine before/after (arXiv:2403.19135)",
    "shortgpt": "the layers of lowest Block Influence, not contiguous (arXiv:2403.03853)",
    "recoverable": "shortlist by cosine and by residual, then the loss measured after repair",
}
"""The selections by name, with what each does."""


def select(name: str, table: ScoreTable, count: int, edges: Edges) -> tuple[Span, ...]:
    """Apply a selection by name."""
    if name == "shortgpt":
        return select_shortgpt(table, count, edges)
    return select_streamline(table) if name == "streamline" else select_recoverable(table)
