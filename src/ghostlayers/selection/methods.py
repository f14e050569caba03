"""The selections: how each takes layers from a table of scores, a frozen dataclass each.

To add one: write its class, name it in `SELECTIONS` here, and in ``tests/test_selections.py``.
Another package adds its own by an entry point of the group ``ghostlayers.selections``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ghostlayers.errors import SpanError
from ghostlayers.repairs.arguments import WithArguments, argument, arguments_of
from ghostlayers.repairs.registry import Registry
from ghostlayers.selection.lorp import choose_layers
from ghostlayers.selection.table import ScoreTable
from ghostlayers.spans import Span, merge_layers

Keep = tuple[int, int]
"""Layers at the start and at the end that are never removed."""

Need = Literal["streams", "residuals", "held-out losses", "losses", "gradients", "weights"]
"""What is measured for a selection: the stream of all calibration windows at every boundary; the
linear repair's residual; losses after repair on held-out windows; losses without a repair, or
gradients of the loss, on the search windows; nothing but the weights."""


@dataclass(frozen=True)
class Selection(WithArguments, ABC):
    """A way to choose the layers that go.

    To write one, extend this class by a frozen dataclass that has ``needs`` and `choose`. The first
    line of its docstring says in half a sentence what it takes, for help and reports.

    Attributes:
        keyword: what its text begins with.
        source: the paper, or ours.
        needs: what is measured for it.
        protects: layers at the start and at the end that it never removes.
    """

    source: ClassVar[str] = "ours"
    needs: ClassVar[tuple[Need, ...]]
    protects: ClassVar[Keep] = (0, 0)

    @abstractmethod
    def choose(
        self, table: ScoreTable, layers: Sequence[int], count: int
    ) -> Sequence[Span] | Sequence[int]:
        """The layers that go, as spans or by their numbers.

        Args:
            table: what was measured.
            layers: those that may go.
            count: how many go.
        """

    def take(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        """What `choose` gives, as spans.

        Raises:
            SpanError: it is something else than so many layers.
        """
        taken: Any = self.choose(table, layers, count)
        parts = list(taken) if isinstance(taken, Iterable) else [taken]
        several = [part.layers if isinstance(part, Span) else [part] for part in parts]
        numbers = [number for part in several for number in part]
        known = {n for n in numbers if isinstance(n, int) and 0 <= n < table.num_layers}
        if not len(known) == len(numbers) == count:
            raise SpanError(
                f"selection '{self.name}' must take {count} of {table.num_layers} layers, as spans "
                f"or by their numbers, none twice; it took {str(taken)[:200]}."
            )
        return merge_layers(known)

    @property
    def name(self) -> str:
        """Its keyword."""
        return self.keyword

    @property
    def what(self) -> str:
        """In half a sentence, for help."""
        return self.summary().removesuffix(".")

    @property
    def arguments(self) -> dict[str, str]:
        """What may follow its name after a colon, with what that does."""
        known = arguments_of(type(self))
        return {arg.key + "=" * (arg.kind is not bool): arg.note for arg in known}

    @property
    def flags(self) -> frozenset[str]:
        """The arguments that are words, as far as they were given."""
        given = (arg.written(getattr(self, arg.name)) for arg in arguments_of(type(self)))
        return frozenset(text for text in given if text and "=" not in text)

    @property
    def searches(self) -> bool:
        """Whether it measures a model anew after each removed layer, by itself."""
        return False

    @property
    def contiguous(self) -> bool:
        """Whether it removes one run of layers."""
        return False

    @property
    def scores_streams(self) -> bool:
        """Whether it is decided by the stream, not by weights, gradients or bare losses."""
        return "streams" in self.needs

    @property
    def scores_only_weights(self) -> bool:
        """Whether no text is read for it."""
        return self.needs == ("weights",)

    @property
    def not_iterated(self) -> str:
        """Why it cannot choose one layer at a time; empty if it can."""
        again = "it measures the model anew after every removed layer already"
        return again if self.searches else ""

    def protected(self, keep: Keep | None = None) -> Keep:
        """Layers at the start and at the end that are never removed: as told, or by its paper."""
        return self.protects if keep is None else keep


@dataclass(frozen=True)
class Streamline(Selection):
    """One run of layers, highest cosine before/after."""

    keyword = "streamline"
    source = "LLM-Streamline, arXiv:2403.19135"
    needs = ("streams",)
    contiguous = True

    def choose(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        del layers, count
        return (max(table.spans, key=lambda score: score.cosine).span,)


@dataclass(frozen=True)
class Angular(Selection):
    """One run of layers, least angle at the last token."""

    keyword = "angular"
    source = "Gromov et al., arXiv:2403.17887"
    needs = ("streams",)
    contiguous = True

    def choose(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        del layers, count
        return (min(table.spans, key=lambda score: score.angular).span,)


@dataclass(frozen=True)
class ShortGPT(Selection):
    """The layers of lowest Block Influence."""

    keyword = "shortgpt"
    source = "ShortGPT, arXiv:2403.03853"
    needs = ("streams",)

    def choose(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        return lowest(table.block_influence, layers, count)


@dataclass(frozen=True)
class Lorp(Selection):
    """Redundant layers from clusters of similar ones.

    Attributes:
        k: number of clusters; None for what the locality of the layers says.
    """

    keyword = "lorp"
    source = "LoRP, arXiv:2605.27786"
    needs = ("streams",)
    protects = (1, 1)
    not_iterated = "it shares all layers out among clusters at once, and ranks no single layer"

    k: int | None = argument(None, what="the number of clusters k", note="makes N clusters")

    def choose(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        del layers
        inputs = table.similarity[: table.num_layers, : table.num_layers]
        return merge_layers(choose_layers(inputs, count, self.k))


@dataclass(frozen=True)
class Importance(Selection):
    """The layers of lowest importance, one number a layer."""

    def choose(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        return lowest(table.importance, layers, count)


@dataclass(frozen=True)
class OfWeights(Importance):
    """The layers of lowest importance, a sum over their weights.

    Attributes:
        unprotected: the first four and the last two may go, too.
        norms: the gains of norms count.
    """

    source = "Shortened LLaMA, arXiv:2402.02834"
    protects = (4, 2)

    unprotected: bool = argument(False, note="takes any")
    norms: bool = argument(False, note="counts gains too, as its code does")

    def protected(self, keep: Keep | None = None) -> Keep:
        return super().protected((0, 0) if keep is None and self.unprotected else keep)


@dataclass(frozen=True)
class Magnitude(OfWeights):
    """The layers of smallest weights, never the first 4 or last 2."""

    keyword = "magnitude"
    needs = ("weights",)


@dataclass(frozen=True)
class Taylor(OfWeights):
    """The layers of smallest |weight x gradient|, never the first 4 or last 2."""

    keyword = "taylor"
    needs = ("gradients",)


@dataclass(frozen=True)
class Perplexity(Importance):
    """Again and again the layer whose removal costs the least loss.

    Attributes:
        one_shot: every layer is measured once.
    """

    keyword = "perplexity"
    source = "SLEB, arXiv:2402.09025; one-shot: Shortened LLaMA, arXiv:2402.02834"
    needs = ("losses",)

    one_shot: bool = argument(False, note="measures each once")

    @property
    def searches(self) -> bool:
        return not self.one_shot


@dataclass(frozen=True)
class Recoverable(Selection):
    """What others would take and the best by residual, raced by loss after repair.

    Cosine and residual only make the shortlist: between spans that are close, the one of lower
    residual is no better on other text (``benchmarks/regret.py``).

    Attributes:
        greedy: layer by layer, with the repair in the loop.
    """

    keyword = "recoverable"
    needs = ("streams", "residuals", "held-out losses")

    greedy: bool = argument(False, note="goes layer by layer, with the repair in the loop")

    @property
    def searches(self) -> bool:
        return self.greedy

    @property
    def contiguous(self) -> bool:
        return not self.greedy

    def choose(self, table: ScoreTable, layers: Sequence[int], count: int) -> tuple[Span, ...]:
        """The cut whose repaired model loses least on held-out windows, mostly a span.

        Raises:
            SpanError: no loss was measured.
        """
        del layers, count
        measured = [score for score in table.spans if score.loss is not None]
        if not measured:
            raise SpanError("no span's loss was measured; give held-out windows (at least 1).")
        cuts: list[tuple[float, tuple[Span, ...]]] = [
            (score.behind, (score.span,)) for score in measured if score.finished
        ]
        apart = table.scattered
        if apart is not None and apart.finished:
            cuts.append((apart.behind, merge_layers(apart.layers)))
        return min(cuts, key=lambda cut: cut[0])[1]


def lowest(scores: Sequence[float], layers: Sequence[int], count: int) -> tuple[Span, ...]:
    """The eligible layers of lowest scores; equal ones from the first on."""
    return merge_layers(sorted(layers, key=lambda layer: scores[layer])[:count])


_CLASSES: tuple[type[Selection], ...] = (
    *(Streamline, Angular, ShortGPT, Lorp),
    *(Magnitude, Taylor, Perplexity, Recoverable),
)

SELECTIONS: dict[str, Selection] = {cls.keyword: cls() for cls in _CLASSES}
"""Ours by name, each without arguments."""

SELECTION_REGISTRY: Registry[Selection] = Registry(
    "selection",
    Selection,  # type: ignore[type-abstract]
    {cls.keyword: cls for cls in _CLASSES},
)
"""Ours, and those of other packages."""


def find_selection(given: str | Selection) -> Selection:
    """The selection that a text names, its arguments included: ``perplexity:one-shot``.

    Args:
        given: the text, or an object, which is given back.

    Raises:
        RecipeError: there is none; the message names near ones. Or its arguments mean nothing.
    """
    return SELECTION_REGISTRY.find(given)
