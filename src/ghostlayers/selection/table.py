"""What was measured about every span that could be removed."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import NonFiniteError
from ghostlayers.selection.births import NormProfile
from ghostlayers.spans import Span


@dataclass(frozen=True)
class SpanScore:
    """One candidate span.

    Attributes:
        span: the layers that would go.
        cosine: mean cosine of the stream before and after; high means similar.
        residual: mean token-relative residual of the uniformly weighted linear repair on held-out
            tokens; low means replaceable. None if not measured.
        birth: whether a massive activation is born inside.
        loss: nats a token on held-out calibration windows with this span removed and repaired;
            None where not measured.
        behind: how many nats more than the best measured span, on the tokens that both were
            measured on.
        behind_error: standard error of that difference.
        loss_tokens: predictions behind the loss; a span that falls hopelessly behind is given up
            early, and its ``loss`` is then the best one's plus ``behind``.
        angular: mean angular distance of the stream before and after, at the last token of each
            window, from 0 to 1; low means similar.
        finished: it was not given up, so that it may win.
    """

    span: Span
    cosine: float
    residual: float | None
    birth: bool
    loss: float | None = None
    behind: float = 0.0
    behind_error: float = 0.0
    loss_tokens: int = 0
    angular: float = 0.0
    finished: bool = True


@dataclass(frozen=True)
class Scattered:
    """Layers that lie apart, raced against the spans.

    Attributes:
        layers: those of lowest Block Influence.
        loss: as that of a span.
        behind: the same.
        behind_error: the same.
        finished: the same.
    """

    layers: tuple[int, ...]
    loss: float
    behind: float
    behind_error: float
    finished: bool = True


@dataclass(frozen=True)
class Step:
    """One layer that a search removed.

    Attributes:
        layer: in the original model's numbering.
        loss: nats a token without it and all layers before it in the search, on the windows that
            the search measured on (after repair where it repairs); None where no loss decided.
    """

    layer: int
    loss: float | None = None


@dataclass(frozen=True)
class ScoreTable:
    """Scores of a model's layers and of its spans of one length.

    Attributes:
        num_layers: decoder layers of the model.
        similarity: mean cosine of every pair of boundaries, [L + 1, L + 1].
        block_influence: one a layer (ShortGPT).
        spans: every contiguous candidate.
        norms: token norms at every boundary.
        dense_loss: the untouched model's loss on the windows on which ``loss`` was measured.
        num_loss_tokens: predictions behind each loss.
        angular: mean angular distance of every pair of boundaries at the last token of each
            window, [L + 1, L + 1].
        importance: one a layer, lowest first to go, where the selection measures one: the loss in
            nats without the layer (``perplexity``), the sum of |w| (``magnitude``) or of |w dL/dw|
            (``taylor``).
        steps: the layers in the order in which a search removed them.
        scattered: a cut that is no span, where one was raced against the spans.
    """

    num_layers: int
    similarity: Float[Tensor, "boundaries boundaries"]
    block_influence: tuple[float, ...]
    spans: tuple[SpanScore, ...]
    norms: NormProfile
    dense_loss: float | None = None
    num_loss_tokens: int = 0
    angular: Float[Tensor, "boundaries boundaries"] | None = None
    importance: tuple[float, ...] = ()
    steps: tuple[Step, ...] = ()
    scattered: Scattered | None = None

    def __post_init__(self) -> None:
        """Refuse scores that are no numbers: what they sort would be anybody's choice.

        Raises:
            NonFiniteError: one is NaN, or infinite where none may be.
        """
        rows = [(score.cosine, score.angular, score.residual, score.loss) for score in self.spans]
        measured = [value for row in rows for value in row if value is not None]
        finite = all(map(math.isfinite, (*self.block_influence, *measured)))
        if not finite or any(map(math.isnan, self.importance)):
            raise NonFiniteError(
                "the scores of this model hold NaN or infinity: check its weights, or try --dtype "
                "float32."
            )
