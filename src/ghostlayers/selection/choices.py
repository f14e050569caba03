"""From scores to the layers that go: the table of selections, and pure functions of a score table.

To add a selection: add its row to `SELECTIONS`, a branch to `select` (or a search to `search.py`),
and its row in ``tests/test_selections.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ghostlayers.errors import RecipeError, SpanError, suggest
from ghostlayers.repairs.arguments import Arguments
from ghostlayers.selection.lorp import choose_layers
from ghostlayers.selection.table import ScoreTable, SpanScore
from ghostlayers.spans import Span, merge_layers, small_number

Keep = tuple[int, int]
"""Layers at the start and at the end that are never removed."""

Need = Literal["streams", "residuals", "held-out losses", "losses", "gradients", "weights"]
"""What is measured for a selection: the stream of all calibration windows at every boundary; the
linear repair's residual; losses after repair on held-out windows; losses without a repair, or
gradients of the loss, on the search windows; nothing but the weights."""

SHORTLIST = 3
"""Spans that ``recoverable`` takes from each of its two rankings."""


@dataclass(frozen=True)
class Selection:
    """A row of the table of selections.

    Attributes:
        what: in half a sentence, for help.
        source: the paper, or ours.
        needs: what is measured for it.
        contiguous: it removes one run of layers.
        arguments: what may follow its name after a colon, with what that does.
        protects: layers at the start and at the end that it never removes.
        not_iterated: why it cannot choose one layer at a time; empty if it can.
    """

    what: str
    source: str
    needs: tuple[Need, ...]
    contiguous: bool = False
    arguments: Mapping[str, str] = field(default_factory=dict)
    protects: tuple[int, int] = (0, 0)
    not_iterated: str = ""


_NORMS = "counts gains too, as its code does"
_UNPROTECTED = "takes any"

SELECTIONS: dict[str, Selection] = {
    "streamline": Selection(
        what="one run of layers, highest cosine before/after",
        source="LLM-Streamline, arXiv:2403.19135",
        needs=("streams",),
        contiguous=True,
    ),
    "angular": Selection(
        what="one run of layers, least angle at the last token",
        source="Gromov et al., arXiv:2403.17887",
        needs=("streams",),
        contiguous=True,
    ),
    "shortgpt": Selection(
        what="the layers of lowest Block Influence",
        source="ShortGPT, arXiv:2403.03853",
        needs=("streams",),
    ),
    "lorp": Selection(
        what="redundant layers from clusters of similar ones",
        source="LoRP, arXiv:2605.27786",
        needs=("streams",),
        arguments={"k=": "makes N clusters"},
        protects=(1, 1),
        not_iterated="it shares all layers out among clusters at once, and ranks no single layer",
    ),
    "magnitude": Selection(
        what="the layers of smallest weights, never the first 4 or last 2",
        source="Shortened LLaMA, arXiv:2402.02834",
        needs=("weights",),
        arguments={"unprotected": _UNPROTECTED, "norms": _NORMS},
        protects=(4, 2),
    ),
    "taylor": Selection(
        what="the layers of smallest |weight x gradient|, never the first 4 or last 2",
        source="Shortened LLaMA, arXiv:2402.02834",
        needs=("gradients",),
        arguments={"unprotected": _UNPROTECTED, "norms": _NORMS},
        protects=(4, 2),
    ),
    "perplexity": Selection(
        what="again and again the layer whose removal costs the least loss",
        source="SLEB, arXiv:2402.09025; one-shot: Shortened LLaMA, arXiv:2402.02834",
        needs=("losses",),
        arguments={"one-shot": "measures each once"},
    ),
    "recoverable": Selection(
        what="what others would take and the best by residual, raced by loss after repair",
        source="ours",
        needs=("streams", "residuals", "held-out losses"),
        contiguous=True,
        arguments={"greedy": "goes layer by layer, with the repair in the loop"},
    ),
}
"""The selections by name."""


@dataclass(frozen=True)
class Choice:
    """A selection with its arguments.

    Attributes:
        text: as on the command line.
        name: its row in `SELECTIONS`.
        flags: the arguments that are words.
        clusters: ``k`` of ``lorp``.
    """

    text: str
    name: str
    flags: frozenset[str] = frozenset()
    clusters: int | None = None

    @property
    def selection(self) -> Selection:
        """Its row."""
        return SELECTIONS[self.name]

    @property
    def searches(self) -> bool:
        """Whether it measures a model anew after each removed layer, by itself."""
        if self.name == "perplexity":
            return "one-shot" not in self.flags
        return "greedy" in self.flags

    @property
    def contiguous(self) -> bool:
        """Whether it removes one run of layers."""
        return self.selection.contiguous and not self.searches

    @property
    def scores_streams(self) -> bool:
        """Whether it is decided by the stream, not by weights, gradients or bare losses."""
        return "streams" in self.selection.needs

    @property
    def not_iterated(self) -> str:
        """Why it cannot be iterated; empty if it can."""
        if self.searches:
            return "it measures the model anew after every removed layer already"
        return self.selection.not_iterated

    @property
    def scores_only_weights(self) -> bool:
        """Whether no text is read for it."""
        return self.selection.needs == ("weights",)

    def protected(self, keep: Keep | None = None) -> Keep:
        """Layers at the start and at the end that are never removed: as told, or by its paper."""
        if keep is not None:
            return keep
        return (0, 0) if "unprotected" in self.flags else self.selection.protects


def find_selection(text: str) -> Choice:
    """A selection by name, its arguments included: ``perplexity:one-shot``, ``lorp:k=3``.

    Raises:
        RecipeError: there is none; the message names near ones. Or its arguments mean nothing.
    """
    arguments = Arguments(text, "selection")
    name = arguments.name
    if name not in SELECTIONS:
        raise RecipeError(f"unknown selection '{name}'. {suggest(name, SELECTIONS)}")
    known = SELECTIONS[name].arguments
    flags = {word for word in known if not word.endswith("=") and arguments.flag(word)}
    clusters = None
    if "k=" in known:
        clusters = arguments.whole_number(arguments.value("k"), "the number of clusters k")
    arguments.finish()
    return Choice(text, name, frozenset(flags), clusters)


def parse_keep(text: str) -> Keep:
    """Read ``first:4,last:2``; what is not named is 0.

    Raises:
        RecipeError: it says anything else.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        where, colon, count = (each.strip() for each in part.partition(":"))
        number = small_number(count) if colon else None
        if where not in ("first", "last") or where in found or number is None:
            raise RecipeError(
                f"'keep_layers': cannot read '{part.strip()[:60]}' in '{text[:60]}': expected "
                "numbers of layers such as first:4,last:2."
            )
        found[where] = number
    return found.get("first", 0), found.get("last", 0)


def eligible_layers(
    choice: Choice, num_layers: int, keep: Keep | None = None, *, keep_first: bool = False
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
    choice: Choice, layers: range, count: int, num_layers: int, keep: Keep | None = None
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
            f"cannot remove {count} layers by '{choice.text}': only {len(layers)} of the model's "
            f"{num_layers} decoder layers are eligible{which}, since --keep-layers keeps the first "
            f"{keep[0]} and the last {keep[1]}. Keep fewer, or remove fewer."
        )
    hint = f"; '{choice.name}:unprotected' may remove any" * ("unprotected" in _open_words(choice))
    raise SpanError(
        f"cannot remove {count} layers by '{choice.text}': only {len(layers)} of the model's "
        f"{num_layers} decoder layers are eligible{which}, the others are protected. Remove "
        f"fewer, or choose another selection{hint}."
    )


def _open_words(choice: Choice) -> set[str]:
    return set(choice.selection.arguments) - choice.flags


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
            f"no span of {length} layers fits into {num_layers} decoder layers"
            + (f" when the first {first} and the last {last} stay" if first or last else "")
            + (f"; remove between 1 and {most}." if most > 0 else "; keep fewer.")
        )
    return [Span(start, start + length) for start in starts]


def select_streamline(table: ScoreTable) -> tuple[Span, ...]:
    """The span with the highest cosine (LLM-Streamline, arXiv:2403.19135)."""
    return (max(table.spans, key=lambda score: score.cosine).span,)


def select_angular(table: ScoreTable) -> tuple[Span, ...]:
    """The span of least angular distance at the last token (arXiv:2403.17887)."""
    return (min(table.spans, key=lambda score: score.angular).span,)


def select_lowest(scores: Sequence[float], layers: Sequence[int], count: int) -> tuple[Span, ...]:
    """The eligible layers of lowest scores; equal ones from the first on."""
    return merge_layers(sorted(layers, key=lambda layer: scores[layer])[:count])


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


def select_recoverable(table: ScoreTable) -> tuple[Span, ...]:
    """The cut whose repaired model loses least on held-out calibration windows, mostly a span.

    Cosine and residual only make the shortlist: between spans that are close, the one of lower
    residual is no better on other text (``benchmarks/regret.py``).
    """
    measured = [score for score in table.spans if score.loss is not None]
    if not measured:
        raise SpanError("no span's loss was measured; give held-out windows (at least 1).")
    cuts: list[tuple[float, tuple[Span, ...]]] = [
        (each.behind, (each.span,)) for each in measured if each.finished
    ]
    apart = table.scattered
    if apart is not None and apart.finished:
        cuts.append((apart.behind, merge_layers(apart.layers)))
    return min(cuts, key=lambda cut: cut[0])[1]


def _residual(score: SpanScore) -> float:
    assert score.residual is not None
    return score.residual


SPAN_RULES: dict[str, Callable[[ScoreTable], tuple[Span, ...]]] = {
    "streamline": select_streamline,
    "angular": select_angular,
    "recoverable": select_recoverable,
}
"""Selections that take one of the table's spans."""


def select(
    name: str, table: ScoreTable, count: int, keep: Keep | None = None, *, keep_first: bool = False
) -> tuple[Span, ...]:
    """Apply a selection by name to a model's scores.

    Selections that search (`Choice.searches`) have no scores to apply: see `search`.

    Raises:
        SpanError: more layers are asked for than may be removed.
    """
    choice = find_selection(name)
    if choice.name in SPAN_RULES:
        return SPAN_RULES[choice.name](table)
    layers = eligible_layers(choice, table.num_layers, keep, keep_first=keep_first)
    check_eligible(choice, layers, count, table.num_layers)
    if choice.name == "lorp":
        inputs = table.similarity[: table.num_layers, : table.num_layers]
        return merge_layers(choose_layers(inputs, count, choice.clusters))
    scores = table.block_influence if choice.name == "shortgpt" else table.importance
    return select_lowest(scores, layers, count)
