"""What is measured on the dense model: scores of spans, moments of gaps, losses of cuts.

Everything here is a walk over the sweep of `stream`, one micro-batch of windows at a time, so that
no activation outlives its micro-batch except where a later gap needs the stream of all windows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ghostlayers import moments
from ghostlayers.evaluation.losses import LossSums, sum_losses, token_losses
from ghostlayers.moments import Moments
from ghostlayers.progress import Advance, Progress, Silent
from ghostlayers.repairs.base import FitOptions, Method, Repair
from ghostlayers.scores import ScoreTable, SpanScore
from ghostlayers.scores.births import NormProfile, born_inside
from ghostlayers.scores.cosine import (
    CosineAxis,
    add_window,
    block_influence,
    empty_cosines,
    mean_cosine,
)
from ghostlayers.scores.residual import (
    TOKENS_PER_CHANNEL,
    TokenSample,
    sample_mask,
    span_residual,
)
from ghostlayers.spans import Span
from ghostlayers.stream import LayerwiseModel, MicroBatch, Stream, check_finite, sweep
from ghostlayers.tokens import Windows

TOKENS_PER_BATCH = 1024
"""Tokens of a micro-batch on a processor, where more only costs memory."""

TOKENS_PER_BATCH_ON_ACCELERATOR = 8192
"""... and on an accelerator, which needs many to be busy."""

LOGITS_AT_ONCE = 2**24
"""Elements of logits made at a time: 64 MB in float32. Fewer would stream a big head too often."""

HOPELESS = 4.0
"""Standard errors behind the best at which a candidate leaves the race."""

DENSE = "dense"


@dataclass(frozen=True)
class Fitting:
    """How gaps are fitted.

    Attributes:
        method: the repair.
        options: its damping.
        relative_weights: weight each token by 1/||y||^2.
        repaired_inputs: fit each gap on the stream repaired so far, not on the dense one.
        stored_dtype: operators are rounded to it once, as the checkpoint will hold them.
    """

    method: Method
    options: FitOptions = field(default_factory=FitOptions)
    relative_weights: bool = True
    repaired_inputs: bool = True
    stored_dtype: torch.dtype = torch.float32

    def update(self, sums: Moments | None, batch: MicroBatch, x: Stream, y: Stream) -> Moments:
        """Add a micro-batch's tokens to the moments that the method needs."""
        return self.update_tokens(sums, batch.tokens(x), batch.tokens(y))

    def update_tokens(self, sums: Moments | None, source: Tensor, target: Tensor) -> Moments:
        """Add tokens, [tokens, hidden] before and after the gap."""
        hidden = source.shape[1]
        sums = sums or moments.empty(hidden, hidden, source.device)
        weights = moments.relative_weights(target) if self._weighs() else None
        if self.method.basis is not None:
            basis = self.method.basis(hidden).to(source.device)
            source, target = source.double() @ basis, target.double() @ basis
        return moments.update(sums, source, target, weights=weights)

    def _weighs(self) -> bool:
        return self.relative_weights and self.method.weighs_tokens

    def fit(self, sums: Moments) -> Repair:
        """Solve, and round the operator as it will be stored."""
        repair = self.method.fit(sums, self.options)
        if repair.delta is None:
            return repair
        return replace(repair, delta=repair.delta.to(self.stored_dtype).double())


def micro_batches(model: LayerwiseModel, windows: Windows, batch_size: int = 0) -> Iterator[Tensor]:
    """Token ids of a few windows at a time; 0 chooses how many."""
    on_processor = model.device.type == "cpu"
    tokens = TOKENS_PER_BATCH if on_processor else TOKENS_PER_BATCH_ON_ACCELERATOR
    yield from windows.input_ids.split(batch_size or max(1, tokens // windows.sequence_length))


def apply_repair(stream: Stream, delta: Tensor | None) -> Stream:
    """The stream x + x M, computed as the saved model computes it."""
    if delta is None:
        return stream
    weight = delta.T.to(device=stream.device, dtype=stream.dtype).contiguous()
    return stream + F.linear(stream, weight)


def measure_scores(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    *,
    cosine_axis: CosineAxis = "hidden",
    residuals: bool = True,
    seed: int = 0,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> tuple[ScoreTable, TokenSample | None]:
    """Score every candidate span from one sweep over the windows.

    Args:
        model: the dense model.
        windows: calibration windows.
        spans: candidates.
        cosine_axis: see `scores.cosine.add_window`.
        residuals: also measure how much of each span a linear map replaces.
        seed: chooses the tokens that the residual is measured on.
        batch_size: windows at a time; 0 chooses.
        progress: told of every window.

    Returns:
        The table, and the sampled tokens behind its residuals (None without).
    """
    boundaries = model.num_layers + 1
    cosines = empty_cosines(boundaries)
    norms: list[Tensor] = []
    sample: TokenSample | None = None
    wanted = TOKENS_PER_CHANNEL * model.model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    masks = sample_mask(len(windows), windows.sequence_length, wanted, generator)
    done = filled = 0
    with (progress or Silent()).stage("Scoring layers", len(windows)) as advance:
        for ids in micro_batches(model, windows, batch_size):
            streams = _all_boundaries(model, ids)
            norms.append(_norms(streams))
            for window in range(ids.shape[0]):
                cosines = add_window(cosines, streams[:, window], cosine_axis)
            if residuals:
                mask = masks[done : done + ids.shape[0]].to(streams.device)
                sample = _keep_sample(sample, streams[:, mask], int(masks.sum()), filled)
                filled += int(mask.sum())
            del streams  # before the next micro-batch's are made
            done += ids.shape[0]
            advance(ids.shape[0])
    table = _score_table(
        mean_cosine(cosines), NormProfile(torch.cat(norms, dim=1)), spans, sample, progress
    )
    return table, sample


def measure_norms(model: LayerwiseModel, windows: Windows, *, batch_size: int = 0) -> NormProfile:
    """Norms of every token at every boundary."""
    norms = [
        _norms(_all_boundaries(model, ids)) for ids in micro_batches(model, windows, batch_size)
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
def _all_boundaries(model: LayerwiseModel, ids: Tensor) -> Tensor:
    """The stream at every boundary, [boundaries, batch, sequence, hidden]."""
    batch, stream = model.begin(ids)
    streams = stream.new_empty(model.num_layers + 1, *stream.shape)
    for boundary, (hidden,) in sweep(model, [batch], [stream], stop=model.num_layers):
        streams[boundary] = hidden
    return streams


def _score_table(
    similarity: Tensor,
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
            scores.append(SpanScore(span, cosine, residual, born_inside(profile, span)))
            advance(1 if total else 0)
    return ScoreTable(
        num_layers=similarity.shape[0] - 1,
        similarity=similarity,
        block_influence=tuple(block_influence(similarity)),
        spans=tuple(scores),
        norms=profile,
    )


def _residual(sample: TokenSample, span: Span) -> float:
    source, target = sample.streams[span.start], sample.streams[span.stop]
    return span_residual(source, target, sample.held_out().to(source.device))


def fit_sample(sample: TokenSample, span: Span, fitting: Fitting) -> Repair:
    """A repair of one span from sampled tokens alone: good enough to rank spans by their loss."""
    source, target = sample.streams[span.start], sample.streams[span.stop]
    quick = replace(fitting, options=replace(fitting.options, report_condition=False))
    return quick.fit(quick.update_tokens(None, source, target))


def fit_gaps(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    fitting: Fitting,
    *,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> dict[Span, Repair]:
    """Fit one repair a gap.

    Args:
        model: the dense model.
        windows: what to fit on.
        spans: the gaps, in order.
        fitting: how.
        batch_size: windows at a time; 0 chooses.
        progress: told of every window.

    Raises:
        NumericalError: the fit is impossible.
    """
    progress = progress or Silent()
    if len(spans) > 1 and fitting.repaired_inputs and fitting.method.name != "none":
        return _fit_repaired(model, windows, spans, fitting, batch_size, progress)
    sums = gather_moments(model, windows, spans, fitting, batch_size=batch_size, progress=progress)
    return {span: fitting.fit(sums[span]) for span in spans}


def gather_moments(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    fitting: Fitting,
    *,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> dict[Span, Moments]:
    """Moments of the dense stream across every gap, from one sweep; arguments as `fit_gaps`."""
    sums: dict[Span, Moments] = {}
    with (progress or Silent()).stage("Gathering moments", len(windows)) as advance:
        for ids in micro_batches(model, windows, batch_size):
            _add_moments(model, ids, spans, fitting, sums)
            advance(ids.shape[0])
    return sums


def _add_moments(
    model: LayerwiseModel,
    ids: Tensor,
    spans: Sequence[Span],
    fitting: Fitting,
    sums: dict[Span, Moments],
) -> None:
    """Add one micro-batch of the dense stream to the moments of every gap."""
    batch, stream = model.begin(ids)
    before: dict[Span, Tensor] = {}
    stop = max(span.stop for span in spans)
    for boundary, (hidden,) in sweep(model, [batch], [stream], stop=stop):
        for span in spans:
            if boundary == span.stop:
                source = before.pop(span)
                sums[span] = fitting.update(sums.get(span), batch, source, hidden)
            if boundary == span.start:
                before[span] = hidden


def _fit_repaired(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    fitting: Fitting,
    batch_size: int,
    progress: Progress,
) -> dict[Span, Repair]:
    """Carry the dense and the repaired stream of all windows side by side, gap after gap."""
    batches: list[MicroBatch] = []
    dense: list[Stream] = []
    for ids in micro_batches(model, windows, batch_size):
        batch, stream = model.begin(ids)
        batches.append(batch)
        dense.append(stream)
    repaired: list[Stream] = []
    repairs: dict[Span, Repair] = {}
    here = 0
    steps = spans[-1].stop + sum(after.start - before.stop for before, after in pairwise(spans))
    with progress.stage("Fitting gap after gap", steps) as advance:
        for span in spans:
            _carry(model, batches, dense, here, span.start, advance)
            if repaired:
                _carry(model, batches, repaired, here, span.start, advance)
            else:
                repaired = list(dense)  # nothing is removed before the first gap
            _carry(model, batches, dense, span.start, span.stop, advance)
            repairs[span] = fitting.fit(_sum_moments(fitting, batches, repaired, dense))
            if span != spans[-1]:
                for index, stream in enumerate(repaired):
                    repaired[index] = apply_repair(stream, repairs[span].delta)
            here = span.stop
    return repairs


def _sum_moments(
    fitting: Fitting, batches: Sequence[MicroBatch], source: list[Stream], target: list[Stream]
) -> Moments:
    sums: Moments | None = None
    for batch, x, y in zip(batches, source, target, strict=True):
        sums = fitting.update(sums, batch, x, y)
    assert sums is not None
    return sums


def _carry(
    model: LayerwiseModel,
    batches: Sequence[MicroBatch],
    streams: list[Stream],
    start: int,
    stop: int,
    advance: Advance,
) -> None:
    """Move streams from one boundary to another, in place: old ones are freed as they go."""
    for layer in range(start, stop):
        for index, batch in enumerate(batches):
            streams[index] = model.run_layer(layer, batch, streams[index])
            check_finite(streams[index], layer)
        advance(1)


Cut = Mapping[Span, Tensor | None]
"""Removed spans, each with its M or None."""


def measure_cuts(
    model: LayerwiseModel,
    windows: Windows,
    cuts: Mapping[str, Cut],
    *,
    batch_size: int = 0,
    divergence: bool = True,
    progress: Progress | None = None,
    description: str = "Measuring losses",
) -> dict[str, LossSums]:
    """Losses of the dense model and of cut models, without building any of them.

    The dense model runs once; each cut starts from the dense stream before its first gap.

    Args:
        model: the dense model.
        windows: held-out windows.
        cuts: by name.
        batch_size: windows at a time; 0 chooses.
        divergence: also compare with the dense model, not only with the text.
        progress: told of every window.
        description: of the stage.

    Returns:
        Loss, divergence from dense and agreement of ``dense`` and of every cut.
    """
    totals = {name: LossSums() for name in (DENSE, *cuts)}
    with (progress or Silent()).stage(description, len(windows)) as advance:
        for ids in micro_batches(model, windows, batch_size):
            batch, streams = _cut_streams(model, ids, cuts)
            for window in range(ids.shape[0]):
                for name, sums in _window_losses(model, batch, streams, window, divergence).items():
                    totals[name] = totals[name] + sums
            advance(ids.shape[0])
    return totals


def _cut_streams(
    model: LayerwiseModel, ids: Tensor, cuts: Mapping[str, Cut]
) -> tuple[MicroBatch, dict[str, Tensor]]:
    """The stream at the last boundary, of the dense model and of every cut."""
    batch, stream = model.begin(ids)
    starts = {name: min(cut).start for name, cut in cuts.items()}
    forks: dict[str, Tensor] = {}
    hidden = stream
    for boundary, (hidden,) in sweep(model, [batch], [stream], stop=model.num_layers):
        forks.update({name: hidden for name, start in starts.items() if start == boundary})
    ends = {name: run_cut(model, batch, forks[name], cut) for name, cut in cuts.items()}
    return batch, {DENSE: hidden, **ends}


def run_cut(model: LayerwiseModel, batch: MicroBatch, stream: Stream, cut: Cut) -> Stream:
    """From the stream before a cut's first gap to the last boundary, over kept layers only."""
    here = min(cut).start
    for span in sorted(cut):
        stream = _run_layers(model, batch, stream, here, span.start)
        stream = apply_repair(stream, cut[span])
        here = span.stop
    return _run_layers(model, batch, stream, here, model.num_layers)


def _run_layers(
    model: LayerwiseModel, batch: MicroBatch, stream: Stream, start: int, stop: int
) -> Stream:
    for layer in range(start, stop):
        stream = model.run_layer(layer, batch, stream)
        check_finite(stream, layer)
    return stream


@dataclass(frozen=True)
class Race:
    """Losses of cuts that were compared on the same tokens.

    Attributes:
        dense: the untouched model's loss at every position, in nats, [tokens].
        cuts: those of every cut, on the first tokens only where it was given up early.
    """

    dense: Tensor
    cuts: dict[str, Tensor]

    @property
    def best(self) -> str:
        """The cut that loses least among those that were measured to the end."""
        finished = [name for name, each in self.cuts.items() if len(each) == len(self.dense)]
        return min(finished, key=lambda name: float(self.cuts[name].mean()))

    def behind(self, name: str, other: str | None = None) -> tuple[float, float]:
        """How much more a cut loses than another (the best), with its standard error.

        Both over the tokens that the cut was measured on: the difference on the same tokens varies
        much less than the losses do.
        """
        mine = self.cuts[name]
        difference = mine - self.cuts[other or self.best][: len(mine)]
        error = float(difference.std()) / len(mine) ** 0.5 if len(mine) > 1 else 0.0
        return float(difference.mean()), error


def race_cuts(
    model: LayerwiseModel,
    windows: Windows,
    cuts: Mapping[str, Cut],
    *,
    batch_size: int = 0,
    progress: Progress | None = None,
    description: str = "Measuring candidates",
) -> Race:
    """Losses of many cuts, giving up those that fall hopelessly behind.

    After each micro-batch a cut leaves whose loss exceeds the best one's by more than `HOPELESS`
    standard errors of their difference on the same tokens. Arguments as `measure_cuts`.
    """
    race = Race(torch.empty(0), {name: torch.empty(0) for name in cuts})
    running = dict(cuts)
    with (progress or Silent()).stage(description, len(windows)) as advance:
        for ids in micro_batches(model, windows, batch_size):
            batch, streams = _cut_streams(model, ids, running)
            losses = {name: torch.empty(0) for name in streams}
            for window in range(ids.shape[0]):
                for name, each in _window_token_losses(model, batch, streams, window).items():
                    losses[name] = torch.cat([losses[name], each.cpu()])
            dense = torch.cat([race.dense, losses[DENSE]])
            joined = {n: torch.cat([race.cuts[n], losses[n]]) for n in running}
            race = Race(dense, {**race.cuts, **joined})
            running = {n: cut for n, cut in running.items() if not _hopeless(race, n)}
            advance(ids.shape[0])
    return race


def _hopeless(race: Race, name: str) -> bool:
    difference, error = race.behind(name)
    return name != race.best and difference > HOPELESS * error


def _window_token_losses(
    model: LayerwiseModel, batch: MicroBatch, streams: Mapping[str, Tensor], window: int
) -> dict[str, Tensor]:
    losses: dict[str, list[Tensor]] = {name: [] for name in streams}
    for targets, logits in _window_logits(model, batch, streams, window):
        for name in streams:
            losses[name].append(token_losses(logits(name), targets))
    return {name: torch.cat(each) for name, each in losses.items()}


def _window_logits(
    model: LayerwiseModel, batch: MicroBatch, streams: Mapping[str, Tensor], window: int
) -> Iterator[tuple[Tensor, Callable[[str], Tensor]]]:
    """For a few positions of one window at a time: the true next tokens, and logits by name."""
    row = slice(window, window + 1)
    ids = batch.input_ids[row]
    one = MicroBatch(ids, None, batch.calls)
    length = ids.shape[1] - 1
    step = max(1, LOGITS_AT_ONCE // model.model.config.vocab_size)
    for start in range(0, length, step):
        positions = slice(start, min(start + step, length))

        def logits(name: str, positions: slice = positions) -> Tensor:
            return model.logits(one, streams[name][row], positions)[0]

        yield ids[0, 1:][positions], logits


def _window_losses(
    model: LayerwiseModel,
    batch: MicroBatch,
    streams: Mapping[str, Tensor],
    window: int,
    divergence: bool,
) -> dict[str, LossSums]:
    """Losses of one window, its logits made for a few positions at a time."""
    totals = {name: LossSums() for name in streams}
    for targets, logits in _window_logits(model, batch, streams, window):
        dense = logits(DENSE)
        for name in streams:
            mine = dense if name == DENSE else logits(name)
            totals[name] = totals[name] + sum_losses(mine, targets, dense if divergence else None)
    return totals
