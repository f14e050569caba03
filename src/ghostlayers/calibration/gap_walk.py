"""Fitting gap after gap, each on the stream that the repairs before it leave."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ghostlayers.calibration.fits import (
    Fitting,
    evidence_at,
    features_at,
    in_stages,
    layout_of,
    needs_by_weight,
)
from ghostlayers.calibration.gathering import Gatherer, gathered_features
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.stream import MicroBatch, Stream, check_finite
from ghostlayers.model.taps import Tap
from ghostlayers.modeling import norm_eps
from ghostlayers.repairs.base import Evidence, Fold, Needs, Repair
from ghostlayers.repairs.method import Stage
from ghostlayers.repairs.piecewise import common_directions
from ghostlayers.repairs.through_norm import SOLVES, ChannelSums, Writing, whitened
from ghostlayers.runtime import progress
from ghostlayers.runtime.parallel import add_up
from ghostlayers.runtime.progress import Advance
from ghostlayers.spans import Span
from ghostlayers.statistics import moments
from ghostlayers.statistics.moments import TokenWeight
from ghostlayers.surgery.features import (
    act,
    caught,
    mlp_output_of,
    reader,
    refits_through_norm,
    tap_places,
    writing_places,
)
from ghostlayers.surgery.folding import layer_weights
from ghostlayers.text.tokens import Windows


@dataclass
class _Track:
    """The stream of all windows as one method's repairs leave it, at one boundary."""

    streams: list[Stream]
    boundary: int


@dataclass(frozen=True)
class _WritingSums:
    """What one pass says about a projection with a norm behind it.

    Attributes:
        channels: how well it writes what it should.
        gatherer: of the least-squares problem that gives the next one.
    """

    channels: ChannelSums
    gatherer: Gatherer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        gathered = {} if self.gatherer is None else self.gatherer.tensors()
        return gathered | {"channels": self.channels.sums}


class GapWalk:
    """Carries the dense stream and the repaired ones from gap to gap."""

    def __init__(
        self,
        runner: Runner,
        windows: Windows,
        spans: Sequence[Span],
        fittings: Mapping[str, Fitting],
    ) -> None:
        self.runner, self.model = runner, runner.model
        self.windows, self.spans = windows, spans
        self.fittings = dict(fittings)
        self.batches: list[MicroBatch] = []
        self.firsts: list[int] = []
        dense: list[Stream] = []
        for first, ids in runner.share(windows):
            batch, stream = self.model.begin(ids)
            self.batches.append(batch)
            self.firsts.append(first)
            dense.append(stream)
        self.dense = _Track(dense, 0)
        self.tracks: dict[str, _Track] = {}
        self.repairs: dict[str, dict[Span, Repair]] = {name: {} for name in fittings}

    def fit(self) -> dict[str, dict[Span, Repair]]:
        """One gap after another."""
        between = sum(after.start - before.stop for before, after in pairwise(self.spans))
        steps = self.spans[-1].stop + len(self.fittings) * (between + len(self.spans))
        with progress.stage("Fitting gap after gap", steps) as advance:
            for index, span in enumerate(self.spans):
                self._fit_gap(index, span, advance)
        return self.repairs

    def _fit_gap(self, index: int, span: Span, advance: Advance) -> None:
        previous = self.spans[index - 1].stop if index else 0
        depth = min(
            max(fitting.method.reach for fitting in self.fittings.values()), span.start - previous
        )
        base = span.start - depth
        self._carry(self.dense, base, advance)
        forks = _Track(list(self.dense.streams), base)
        self._carry(self.dense, span.stop, advance)
        last = index == len(self.spans) - 1
        shared = self._shared_evidence(forks, span)
        for name, fitting in self.fittings.items():
            track = self.tracks.get(name)
            if track is None or not fitting.repaired_inputs:
                source = forks
            else:
                self._carry(track, base, advance)
                source = track
            if source is forks and not in_stages(self.model, fitting.method):
                repair = fitting.fit(shared(fitting.weighting), last=len(self.fittings) == 1)
            else:
                repair = self._fit_one(fitting, source, span)
            self.repairs[name][span] = repair
            if not last and fitting.repaired_inputs:
                self.tracks[name] = self._repaired(source, span, repair)
            advance(1)

    def _shared_evidence(self, forks: _Track, span: Span) -> Callable[[TokenWeight], Evidence]:
        """By kind of token weight: what all methods want of the dense stream, gathered once."""
        once = [
            fitting
            for fitting in self.fittings.values()
            if not in_stages(self.model, fitting.method)
        ]
        needs = needs_by_weight(once)

        @cache
        def shared(kind: TokenWeight) -> Evidence:
            how = next(fitting for fitting in once if fitting.weighting == kind)
            stage = Stage(how.method.fit, needs[kind])
            gathered = self._gather(how, stage, forks, span, Repair("none"))
            return evidence_at(self.model, gathered, span)

        return shared

    def _carry(self, track: _Track, boundary: int, advance: Advance) -> None:
        """Move streams to a later boundary in place: old ones are freed as they go."""
        for layer in range(track.boundary, boundary):
            for index, batch in enumerate(self.batches):
                track.streams[index] = self.model.run_layer(layer, batch, track.streams[index])
                check_finite(track.streams[index], layer)
            advance(1)
        track.boundary = boundary

    def _fit_one(self, fitting: Fitting, source: _Track, span: Span) -> Repair:
        """All stages of one method at one gap, each on the stream that the ones before it left."""
        done = Repair(fitting.method.name)
        whole = left = 0.0
        through_norm = refits_through_norm(self.model, fitting.method)
        fit = self._fit_stage_through_norm if through_norm else self._fit_stage
        for stage in fitting.method.stages(span.start - source.boundary):
            repair, energy = fit(fitting, stage, source, span, done)
            assert repair.relative_residual is not None
            left = repair.relative_residual * energy * stage.share**2
            whole = whole or energy
            folds = tuple(replace(fold, layers_back=stage.back) for fold in repair.folds)
            done = replace(repair, folds=(*done.folds, *folds))
        return replace(done, relative_residual=left / whole if whole else 0.0)

    def _fit_stage(
        self, fitting: Fitting, stage: Stage, source: _Track, span: Span, done: Repair
    ) -> tuple[Repair, float]:
        """One stage's repair, and the energy of the whole discrepancy before it."""
        gathered = self._gather(fitting, stage, source, span, done)
        evidence = evidence_at(self.model, gathered, span, stage.back)
        repair = fitting.fit(evidence, stage.fit, last=True)
        return repair, evidence.moments.target_energy / stage.share**2

    def _fit_stage_through_norm(
        self, fitting: Fitting, stage: Stage, source: _Track, span: Span, done: Repair
    ) -> tuple[Repair, float]:
        """The same for a projection behind which a norm stands; see `through_norm`."""
        there, _ = mlp_output_of(self.model, self.model.layer(span.start - stage.back))
        before = there.double()  # a copy: the layer may be taken out again
        writing = Writing(before, norm_eps(self.model.network.config))
        repair = Repair(fitting.method.name)
        for step in range(SOLVES + 1):
            needs = stage.needs if step < SOLVES else None
            sums = self._gather_writing(fitting, stage, needs, writing, (source, span, done))
            if sums.gatherer is None:
                break
            evidence = sums.gatherer.evidence(writing.eps)
            repair = fitting.fit(evidence, stage.fit, last=True)
            weight = whitened(
                repair.folds[0].delta, sums.channels.power, evidence.moments.total_weight
            )
            writing = replace(writing, weight=weight)
        channels = sums.channels
        fold = Fold(stage.back, writing.weight - before, gain=channels.gain)
        whole = channels.discrepancy
        share = channels.left / (whole * stage.share**2) if whole else 0.0
        return replace(repair, folds=(fold,), relative_residual=share), whole

    def _gather_writing(
        self,
        fitting: Fitting,
        stage: Stage,
        needs: Needs | None,
        writing: Writing,
        where: "tuple[_Track, Span, Repair]",
    ) -> "_WritingSums":
        source, span, done = where
        kind = fitting.weighting
        sums = _WritingSums(ChannelSums(writing.weight.shape[1], self.model.device))
        if needs is not None:
            layout = layout_of(self.model, self.windows, needs, span, stage.back)
            sums = replace(sums, gatherer=Gatherer(needs, layout, token_weight=kind))
        places = writing_places(self.model)

        def fill() -> None:
            for index, x, tapped in self._at_gap(source, span, places, stage.back, done):
                tokens = self.batches[index].tokens
                target = tokens(self.dense.streams[index]).float()
                change = target - tokens(x).float()
                wanted = tokens(tapped["written"]).float() + stage.share * change
                z, weights = tokens(tapped["z"]), moments.token_weights(target, kind)
                sums.channels.add(wanted, writing.normalised(z), change, weights)
                if sums.gatherer is not None:
                    features = {"z": writing.scaled(z), "one": torch.ones_like(z[:, :1])}
                    sums.gatherer.add(
                        self.firsts[index], torch.zeros_like(wanted), wanted, features, weights
                    )

        self.runner.whole(f"gap {span}", len(self.windows), sums, fill)
        return sums

    def _gather(
        self, fitting: Fitting, stage: Stage, source: _Track, span: Span, done: Repair
    ) -> Gatherer:
        needs = stage.needs
        centroids = self._centroids(needs, source, span, done) if needs.pieces else {}
        gatherer = Gatherer(
            needs,
            layout_of(self.model, self.windows, needs, span, stage.back),
            token_weight=fitting.weighting,
            centroids=centroids,
            share=stage.share,
        )
        names = gathered_features(needs)
        taps = tap_places(self.model, names)

        def fill() -> None:
            for index, x, tapped in self._at_gap(source, span, taps, stage.back, done):
                batch = self.batches[index]
                with torch.no_grad():
                    read = features_at(self.model, names, batch, x, tapped, span)
                target = batch.tokens(self.dense.streams[index])
                gatherer.add(self.firsts[index], batch.tokens(x), target, read)

        self.runner.whole(f"gap {span}", len(self.windows), gatherer, fill)
        return gatherer

    @torch.no_grad()
    def _at_gap(
        self,
        source: _Track,
        span: Span,
        taps: Mapping[str, tuple[str, Tap]],
        back: int,
        done: Repair,
    ) -> Iterator[tuple[int, Stream, dict[str, Tensor]]]:
        """The stream in front of the gap with the folds so far, and what layer -back computed."""
        model = self.model
        changed = layer_weights(model, span, done)
        for index, batch in enumerate(self.batches):
            stream = source.streams[index]
            tapped: dict[str, Tensor] = {}
            for layer in range(source.boundary, span.start):
                wanted = taps if layer == span.start - back else {}
                stream = model.run_layer(
                    layer, batch, stream, weights=changed.get(layer), taps=tuple(wanted.values())
                )
                check_finite(stream, layer)
                tapped.update(caught(wanted, stream))
            yield index, stream, tapped

    def _centroids(
        self, needs: Needs, source: _Track, span: Span, done: Repair
    ) -> dict[int, Tensor]:
        layout = layout_of(self.model, self.windows, needs, span)
        shape = (layout.num_sampled, layout.widths["x"])
        sample = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        for index, x, _ in self._at_gap(source, span, {}, 1, done):
            rows = sample[self.firsts[index] * layout.window_tokens :][: x[..., 0].numel()]
            rows.copy_(self.batches[index].tokens(x)[: len(rows)])
        add_up([sample])
        return {count: common_directions(sample, count) for count in needs.pieces}

    @torch.no_grad()
    def _repaired(self, source: _Track, span: Span, repair: Repair) -> _Track:
        """The stream behind the gap, where the next kept layer will read it."""
        names = () if repair.operator is None else tuple(repair.operator.maps)
        taps = tap_places(self.model, names)
        streams = [
            act(repair, x, reader(self.model, x, span, tapped))
            for _, x, tapped in self._at_gap(source, span, taps, 1, repair)
        ]
        return _Track(streams, span.stop)
