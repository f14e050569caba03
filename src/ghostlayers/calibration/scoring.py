"""Scoring layers and spans of layers: one sweep of a model over the calibration windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostlayers.calibration.boundaries import BoundaryStore
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.gathering import Gatherer, Layout
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.modeling import norm_eps
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Repair
from ghostlayers.runtime import progress
from ghostlayers.runtime.parallel import add_up, world
from ghostlayers.selection import ScoreTable, SpanScore
from ghostlayers.selection.angular import add_last_tokens
from ghostlayers.selection.births import NORM_WINDOWS, NormProfile, born_inside
from ghostlayers.selection.cosine import CosineAxis, add_window, block_influence
from ghostlayers.selection.pairs import empty_pairs
from ghostlayers.selection.residual import (
    HELD_OUT_EVERY,
    TOKENS_PER_CHANNEL,
    TokenSample,
    sample_mask,
    span_residual,
)
from ghostlayers.spans import Span
from ghostlayers.statistics.moments import ACCUMULATOR
from ghostlayers.surgery.features import feature_widths, stream_feature
from ghostlayers.text.tokens import Windows

STREAM_FEATURES = frozenset({"x", "norm", "one"})
"""Features that a sample of the stream alone gives."""

GHOST = find_method("ghost")


SWEEP = "Scoring layers"


def measure_scores(
    runner: Runner,
    windows: Windows,
    spans: Sequence[Span],
    *,
    cosine_axis: CosineAxis = "hidden",
    residuals: bool = True,
    keep_sample: bool = False,
    cut: Cut | None = None,
    seed: int = 0,
    title: str = SWEEP,
) -> tuple[ScoreTable, TokenSample | None]:
    """Score every candidate span from one sweep over the windows.

    Nothing of the stream outlives its micro-batch but sums and the sample.

    Args:
        runner: of the dense model.
        windows: calibration windows.
        spans: candidates.
        cosine_axis: see `scores.cosine.add_window`.
        residuals: also measure how much of each span a linear map replaces.
        keep_sample: return sampled tokens even without residuals.
        cut: score this cut and repaired model instead, its boundaries numbered as `Cut.walk` does.
        seed: chooses the tokens that are sampled, the same for every cut.
        title: of the pass.

    Returns:
        The table, and the sampled tokens behind its residuals (None without).
    """
    cut = cut or Cut(runner.model, {})
    # A sweep of the dense model serves every number of layers and every selection.
    known = None if cut.repairs else runner.sweeps
    key = (windows.digest, cosine_axis, seed)
    swept = None if known is None else known.get(key)
    wanted = residuals or keep_sample
    if swept is None or (wanted and swept.sample is None):
        swept = _sweep_scores(runner, cut, windows, cosine_axis, seed, wanted, title)
        if known is not None:
            known[key] = swept
    sample = swept.sample if wanted else None
    measured = _residuals(runner, sample, spans) if residuals and sample is not None else None
    return swept.table(spans, measured), sample


@dataclass(frozen=True)
class Swept:
    """What one sweep over the calibration windows says of every span of any length.

    Attributes:
        similarity: mean cosine of every pair of boundaries, [boundaries, boundaries].
        angular: mean angular distance at the last token, [boundaries, boundaries].
        profile: token norms.
        sample: sampled tokens at every boundary.
    """

    similarity: Tensor
    angular: Tensor
    profile: NormProfile
    sample: TokenSample | None

    def table(self, spans: Sequence[Span], residuals: Tensor | None) -> ScoreTable:
        """What it says of some spans, with their residuals, [spans], where these were measured."""
        scores = [
            SpanScore(
                span,
                float(self.similarity[span.start, span.stop]),
                None if residuals is None else float(residuals[index]),
                born_inside(self.profile, span),
                angular=float(self.angular[span.start, span.stop]),
            )
            for index, span in enumerate(spans)
        ]
        return ScoreTable(
            num_layers=self.similarity.shape[0] - 1,
            similarity=self.similarity,
            block_influence=tuple(block_influence(self.similarity)),
            spans=tuple(scores),
            norms=self.profile,
            angular=self.angular,
        )


class _ScoreSums:
    """What one sweep keeps of every window.

    Args:
        boundaries: of the model.
        windows: that will be swept.
        axis: of the cosine.
        masks: which tokens are sampled, [windows, sequence]; None for none.
        sample: where they go.
    """

    def __init__(
        self,
        boundaries: int,
        windows: Windows,
        axis: CosineAxis,
        masks: Tensor | None = None,
        sample: BoundaryStore | None = None,
    ) -> None:
        self._axis, self._masks, self.sample = axis, masks, sample
        self._length = windows.sequence_length
        self.cosines, self.angles = (
            torch.zeros(boundaries, boundaries, dtype=torch.float64) for _ in range(2)
        )
        self.counts = torch.zeros(2, dtype=torch.float64)
        self.norms = torch.zeros(boundaries, len(windows) * self._length)
        if masks is not None:
            before = masks.flatten(1).sum(dim=1).cumsum(dim=0)
            self._places = [0, *before.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`; a sample in a file is one of the `stores`."""
        sums = {
            "cosines": self.cosines,
            "angles": self.angles,
            "counts": self.counts,
            "norms": self.norms,
        }
        whole = None if self.sample is None else self.sample.tensor
        return sums if whole is None else {**sums, "sample": whole}

    def stores(self) -> list[BoundaryStore]:
        """See `passes.FiledSums`."""
        return [] if self.sample is None or self.sample.tensor is not None else [self.sample]

    def add(self, window: int, streams: Tensor) -> None:
        """Add one window's stream at every boundary, [boundaries, sequence, hidden]."""
        boundaries = len(streams)
        cosines = add_window(empty_pairs(boundaries), streams, self._axis)
        angles = add_last_tokens(empty_pairs(boundaries), streams[:, -1:])
        self.cosines += cosines.total
        self.angles += angles.total
        self.counts += torch.tensor([cosines.count, angles.count])
        first = window * self._length
        self.norms[:, first : first + self._length] = _norms(streams)
        if self.sample is not None and self._masks is not None:
            chosen = self._masks[window].nonzero().flatten().to(streams.device)
            for boundary, rows in enumerate(streams.index_select(1, chosen)):
                self.sample.write(boundary, int(self._places[window]), rows)

    def swept(self) -> "Swept":
        """Means over all windows."""
        cosines, angles = self.counts.tolist()
        return Swept(
            self.cosines / max(cosines, 1),
            self.angles / max(angles, 1),
            NormProfile(self.norms),
            None if self.sample is None else TokenSample(self.sample),
        )


PAIR_COST = 0.35
"""A float32 multiply-add of the cosines, in float64 ones of the Gram product.

Measured: ``benchmarks/plan.py`` compares planned with real seconds.
"""


def sweep_pass(
    model: DenseModel, windows: int, length: int, *, sampled: bool, title: str = SWEEP
) -> Pass:
    """The pass of `measure_scores`: cosines of every pair of boundaries, and a token sample.

    Args:
        model: whose layers run.
        windows: that it visits.
        length: tokens of a window.
        sampled: tokens of every boundary are kept.
        title: on the screen.
    """
    boundaries, on_disk = model.num_layers + 1, model.residency.on_disk
    tokens = min(TOKENS_PER_CHANNEL * model.hidden_size, windows * length) if sampled else 0
    sample = tokens * model.hidden_size * boundaries * model.dtype.itemsize
    return Pass(
        "sweep",
        title,
        windows,
        layers=windows * model.num_layers,
        products=boundaries**2 * model.hidden_size * length * windows * PAIR_COST,
        elsewhere=boundaries,
        held=0 if on_disk else sample,
        disk=sample if on_disk else 0,
    )


def _sweep_scores(
    runner: Runner,
    cut: Cut,
    windows: Windows,
    cosine_axis: CosineAxis,
    seed: int,
    sampled: bool,
    title: str,
) -> Swept:
    """Sums over all windows; nothing of the stream outlives its group of windows but these."""
    model = cut.model
    declared = sweep_pass(
        model, len(windows), windows.sequence_length, sampled=sampled, title=title
    )
    boundaries, hidden = model.num_layers + 1, model.hidden_size
    masks = sample = None
    if sampled:
        wanted = TOKENS_PER_CHANNEL * hidden
        generator = torch.Generator().manual_seed(seed)
        masks = sample_mask(len(windows), windows.sequence_length, wanted, generator)
        shape = (boundaries, int(masks.sum()), hidden)
        on_disk, journal = model.residency.on_disk, runner.journal
        path = journal.file_for(declared.key) if on_disk and journal is not None else None
        sample = BoundaryStore(
            shape,
            model.dtype,
            model.device,
            on_processor=model.residency.offloaded,
            on_disk=on_disk,
            path=path,
        )
    sums = _ScoreSums(boundaries, windows, cosine_axis, masks, sample)
    for start, ids in runner.visit(declared, windows, sums):
        _add_group(sums, cut, start, ids)
    return sums.swept()


def _add_group(sums: _ScoreSums, cut: Cut, start: int, ids: Tensor) -> None:
    """Add a group of windows; a call of its own, so that its streams go before the next come."""
    for window, streams in _all_boundaries(cut, ids):
        sums.add(start + window, streams)


NORMS = "Looking for massive activations"


def measure_norms(runner: Runner, windows: Windows) -> NormProfile:
    """Norms of every token at every boundary."""
    model = runner.model
    dense = Cut(model, {})
    sums = _ScoreSums(model.num_layers + 1, windows, "hidden")
    declared = sweep_pass(model, len(windows), windows.sequence_length, sampled=False, title=NORMS)
    for start, ids in runner.visit(declared, windows, sums):
        _add_group(sums, dense, start, ids)
    return NormProfile(sums.norms)


def find_births(
    runner: Runner, windows: Windows, spans: Sequence[Span], table: ScoreTable | None
) -> tuple[Span, ...]:
    """The removed spans in which a massive activation is born."""
    norms = measure_norms(runner, windows.first(NORM_WINDOWS)) if table is None else table.norms
    return tuple(span for span in spans if born_inside(norms, span))


def _norms(streams: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(streams, dim=-1, dtype=torch.float32)
    return norms.cpu()


@torch.no_grad()
def _all_boundaries(cut: Cut, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each window's stream at every boundary, [boundaries, sequence, hidden].

    The stream of an offloaded model is kept where its layers are: many windows visit one at once.
    """
    batch, stream = cut.model.begin(ids)
    count, length, hidden = stream.shape
    residency = cut.model.residency
    store = BoundaryStore(
        (cut.model.num_layers + 1, count * length, hidden),
        stream.dtype,
        stream.device,
        on_processor=residency.offloaded,
        on_disk=residency.on_disk,
    )
    for boundary, here in cut.walk(batch, stream):
        store.write(boundary, 0, here.flatten(0, 1))
    for window in range(count):
        yield window, store.stretch(window * length, (window + 1) * length)


def residual_pass(model: DenseModel, tokens: int, spans: int) -> Pass:
    """A linear map across every span, from so many sampled tokens: see `residual.span_residual`."""
    hidden = model.hidden_size
    return Pass(
        "residuals",
        f"Fitting a map across {spans} spans",
        # Gram and cross-moment of the tokens that fit; one product with each of the others.
        products=spans * tokens * hidden**2 * (2 - 1 / HELD_OUT_EVERY),
        solutions=spans * 2 * hidden**3 / 3,
        held=4 * hidden**2 * ACCUMULATOR.itemsize,
    )


def _residuals(runner: Runner, sample: TokenSample, spans: Sequence[Span]) -> Tensor:
    """How badly a linear map replaces each span, [spans]; several processes share them out."""
    residuals, here = torch.zeros(len(spans), dtype=torch.float64), world()
    title = residual_pass(runner.model, sample.num_tokens, len(spans)).title
    with progress.stage(title, len(spans)) as advance:
        for index, span in enumerate(spans):
            if here.takes(index):
                source, target = sample.streams[span.start], sample.streams[span.stop]
                residuals[index] = span_residual(
                    source, target, sample.held_out().to(source.device)
                )
            advance(1)
    add_up([residuals])
    return residuals


def fit_sample(
    model: DenseModel,
    sample: TokenSample,
    span: Span,
    fitting: Fitting,
    received: TokenSample | None = None,
) -> Repair:
    """A repair of one span from sampled tokens alone: good enough to rank spans by their loss.

    Methods that read more than the stream are stood in for by Ghost, which they contain or come
    near to. ``received`` samples the same tokens of the stream that the gap will really receive,
    where that is not the dense one.
    """
    source, target = (received or sample).streams[span.start], sample.streams[span.stop]
    method = fitting.method if set(fitting.method.needs.features) <= STREAM_FEATURES else GHOST
    method = GHOST if method.needs.pieces else method
    quick = replace(
        fitting, method=method, options=replace(fitting.options, report_condition=False)
    )
    widths = feature_widths(model, {"x", *method.needs.features})
    layout = Layout(widths, 1, len(source), source.dtype, source.device)
    gatherer = Gatherer(method.needs, layout, token_weight=quick.weighting)
    names = gatherer.features
    read = {name: stream_feature(model, name, source, span) for name in names}
    gatherer.add(0, source, target, read)
    return quick.fit(gatherer.evidence(norm_eps(model.network.config)), last=True)
