"""Scoring layers and spans of layers: one sweep of a model over the calibration windows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ghostlayers.cuts import Cut
from ghostlayers.features import stream_feature
from ghostlayers.fitting import Fitting, Gatherer
from ghostlayers.modeling import norm_eps
from ghostlayers.progress import Advance, Progress, Silent
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Repair
from ghostlayers.scores import ScoreTable, SpanScore
from ghostlayers.scores.angular import add_last_tokens
from ghostlayers.scores.births import NormProfile, born_inside
from ghostlayers.scores.cosine import (
    CosineAxis,
    add_window,
    block_influence,
)
from ghostlayers.scores.pairs import empty_pairs
from ghostlayers.scores.residual import (
    TOKENS_PER_CHANNEL,
    TokenSample,
    sample_mask,
    span_residual,
)
from ghostlayers.spans import Span
from ghostlayers.stream import LayerwiseModel, micro_batches
from ghostlayers.tokens import Windows

STREAM_FEATURES = frozenset({"x", "norm", "one"})
"""Features that a sample of the stream alone gives."""

GHOST = find_method("ghost")


def measure_scores(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    *,
    cosine_axis: CosineAxis = "hidden",
    residuals: bool = True,
    keep_sample: bool = False,
    cut: Cut | None = None,
    seed: int = 0,
    batch_size: int = 0,
    progress: Progress | None = None,
    description: str = "Scoring layers",
    memo: "Memo | None" = None,
) -> tuple[ScoreTable, TokenSample | None]:
    """Score every candidate span from one sweep over the windows.

    Nothing of the stream outlives its micro-batch but sums and the sample.

    Args:
        model: the dense model.
        windows: calibration windows.
        spans: candidates.
        cosine_axis: see `scores.cosine.add_window`.
        residuals: also measure how much of each span a linear map replaces.
        keep_sample: return sampled tokens even without residuals.
        cut: score this cut and repaired model instead, its boundaries numbered as `Cut.walk` does.
        seed: chooses the tokens that are sampled, the same for every cut.
        batch_size: windows at a time; 0 chooses.
        progress: told of every window.
        description: of the stage.
        memo: sweeps of the dense model that were made before, and this one afterwards.

    Returns:
        The table, and the sampled tokens behind its residuals (None without).
    """
    cut = cut or Cut(model, {})
    key = (windows.input_ids.data_ptr(), tuple(windows.input_ids.shape), cosine_axis, seed)
    swept = None if memo is None or cut.repairs else memo.get(key)
    if swept is None:
        wanted = residuals or keep_sample or memo is not None
        with (progress or Silent()).stage(description, len(windows)) as advance:
            swept = _sweep_scores(cut, windows, cosine_axis, seed, batch_size, wanted, advance)
        if memo is not None and not cut.repairs:
            memo[key] = swept
    table = _score_table(
        swept.similarity,
        swept.angular,
        swept.profile,
        spans,
        swept.sample if residuals else None,
        progress,
    )
    return table, swept.sample if residuals or keep_sample else None


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


Memo = dict[Any, Swept]
"""Sweeps by what they were made of: one serves every number of layers and every selection."""


def _sweep_scores(
    cut: Cut,
    windows: Windows,
    cosine_axis: CosineAxis,
    seed: int,
    batch_size: int,
    sampled: bool,
    advance: Advance,
) -> Swept:
    """Sums over all windows; nothing of the stream outlives its micro-batch but these."""
    model = cut.model
    boundaries = model.num_layers + 1
    cosines, angles = empty_pairs(boundaries), empty_pairs(boundaries)
    norms: list[Tensor] = []
    sample: TokenSample | None = None
    wanted = TOKENS_PER_CHANNEL * model.model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    masks = sample_mask(len(windows), windows.sequence_length, wanted, generator)
    done = filled = 0
    for ids in micro_batches(model, windows, batch_size):
        streams = _all_boundaries(cut, ids)
        norms.append(_norms(streams))
        angles = add_last_tokens(angles, streams[:, :, -1])
        for window in range(ids.shape[0]):
            cosines = add_window(cosines, streams[:, window], cosine_axis)
        if sampled:
            mask = masks[done : done + ids.shape[0]].to(streams.device)
            sample = _keep_sample(sample, streams[:, mask], int(masks.sum()), filled)
            filled += int(mask.sum())
        del streams  # before the next micro-batch's are made
        done += ids.shape[0]
        advance(ids.shape[0])
    profile = NormProfile(torch.cat(norms, dim=1))
    return Swept(cosines.mean(), angles.mean(), profile, sample)


def measure_norms(model: LayerwiseModel, windows: Windows, *, batch_size: int = 0) -> NormProfile:
    """Norms of every token at every boundary."""
    dense = Cut(model, {})
    norms = [
        _norms(_all_boundaries(dense, ids)) for ids in micro_batches(model, windows, batch_size)
    ]
    return NormProfile(torch.cat(norms, dim=1))


def _norms(streams: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(streams, dim=-1, dtype=torch.float32)
    return norms.flatten(1).cpu()


def _keep_sample(
    sample: TokenSample | None, streams: Tensor, wanted: int, filled: int
) -> TokenSample:
    """Write sampled tokens into the sample, which is allocated whole and once."""
    if sample is None:
        sample = TokenSample(streams.new_empty(streams.shape[0], wanted, streams.shape[2]))
    sample.streams[:, filled : filled + streams.shape[1]] = streams
    return sample


@torch.no_grad()
def _all_boundaries(cut: Cut, ids: Tensor) -> Tensor:
    """The stream at every boundary, [boundaries, batch, sequence, hidden]."""
    batch, stream = cut.model.begin(ids)
    streams = stream.new_empty(cut.model.num_layers + 1, *stream.shape)
    for boundary, hidden in cut.walk(batch, stream):
        streams[boundary] = hidden
    return streams


def _score_table(
    similarity: Tensor,
    angular: Tensor,
    profile: NormProfile,
    spans: Sequence[Span],
    sample: TokenSample | None,
    progress: Progress | None,
) -> ScoreTable:
    scores = []
    total = len(spans) if sample is not None else 0
    with (progress or Silent()).stage("Fitting a map across every span", total) as advance:
        for span in spans:
            residual = None if sample is None else _residual(sample, span)
            cosine = float(similarity[span.start, span.stop])
            score = SpanScore(span, cosine, residual, born_inside(profile, span))
            scores.append(replace(score, angular=float(angular[span.start, span.stop])))
            advance(1 if total else 0)
    return ScoreTable(
        num_layers=similarity.shape[0] - 1,
        similarity=similarity,
        block_influence=tuple(block_influence(similarity)),
        spans=tuple(scores),
        norms=profile,
        angular=angular,
    )


def _residual(sample: TokenSample, span: Span) -> float:
    source, target = sample.streams[span.start], sample.streams[span.stop]
    return span_residual(source, target, sample.held_out().to(source.device))


def fit_sample(
    model: LayerwiseModel,
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
    gatherer = Gatherer(method.needs, token_weight=quick.weighting)
    names = gatherer.features
    read = {name: stream_feature(model, name, source, span) for name in names}
    gatherer.add(source, target, read)
    return quick.fit(gatherer.evidence(norm_eps(model.model.config)))
