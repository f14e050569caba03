"""Fitting repairs: what is gathered at each gap, on which stream, and in which order.

With one gap, or on the dense model's own stream, one sweep gathers everything and no activation
outlives its micro-batch. Where a later gap must be fitted on the stream that the earlier repairs
leave, or a method refits several layers one after another, the stream of all windows is kept at the
boundaries that matter, in the model's own type.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from itertools import pairwise
from operator import or_

import torch
from torch import Tensor

from ghostlayers.calibration.gathering import Gatherer, Layout, gathered_features
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream, Tap, check_finite
from ghostlayers.modeling import norm_eps
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Evidence, FitOptions, Fold, Needs, Repair
from ghostlayers.repairs.method import Fit, RepairMethod, Stage
from ghostlayers.repairs.piecewise import common_directions
from ghostlayers.repairs.stack import stack
from ghostlayers.repairs.through_norm import SOLVES, ChannelSums, Writing, whitened
from ghostlayers.runtime.parallel import add_up, by_first
from ghostlayers.runtime.progress import Advance
from ghostlayers.spans import Span, removed_layers
from ghostlayers.statistics import moments
from ghostlayers.statistics.moments import TokenWeight
from ghostlayers.surgery.features import (
    act,
    caught,
    feature_widths,
    mlp_output_of,
    reader,
    refits_through_norm,
    tap_places,
    writing_places,
)
from ghostlayers.surgery.folding import layer_weights
from ghostlayers.text.tokens import Windows

MATRICES_OF_A_FIT = 2
"""Square matrices of all features that solving takes beside the sums: the equilibrated and damped
Gram matrix, which is factored in its place, and a copy of it for its eigenvalues, or the solution.
The last fit of an evidence does without the first (`regress`)."""

COPIES_IN_A_SWEEP = 6
"""Of the stream, while it is gathered: before and behind a gap, and features as wide or wider."""


KEPT_OF_A_TOKEN = 3
"""Vectors of every token that a descent keeps: the stream before and after, the MLP's output."""


@dataclass(frozen=True)
class Fitting:
    """How gaps are fitted.

    Attributes:
        method: the repair.
        options: its damping.
        token_weight: how much each token counts; None for what suits the method.
        repaired_inputs: fit each gap on the stream repaired so far, not on the dense one.
        stored_dtype: repairs are rounded to it once, as the checkpoint will hold them.
    """

    method: RepairMethod
    options: FitOptions = field(default_factory=FitOptions)
    token_weight: TokenWeight | None = None
    repaired_inputs: bool = True
    stored_dtype: torch.dtype = torch.float32

    @property
    def weighting(self) -> TokenWeight:
        """How much each token counts."""
        return self.method.named_weight or self.token_weight or self.method.token_weight

    def fit(self, evidence: Evidence, by: Fit | None = None, *, last: bool = False) -> Repair:
        """Solve, and round the operator as it will be stored; every process gets the first's.

        A stage is fitted ``by`` its own fit. The ``last`` fit of an evidence may use it up.
        """
        evidence = replace(evidence, expendable=last)
        fit = by or self.method.fit
        return by_first(lambda: fit(evidence, self.options).rounded(self.stored_dtype))


def sums_bytes(model: DenseModel, fitting: Fitting, spans: Sequence[Span]) -> int:
    """Memory that a fit takes beside weights and streams: see `MATRICES_OF_A_FIT`."""
    method = fitting.method
    spans = parts_of(method, spans)
    gaps = len(spans) if _one_sweep(model, fitting, len(spans)) else 1
    width = 0
    for needs in (method.needs, *(stage.needs for stage in method.before)):
        names = {"x", *gathered_features(needs)}
        width = max(width, sum(feature_widths(model, names).values()))
    hidden = int(model.hidden_size)
    gathered = (2 if method.needs.held_out else 1) * (1 + sum(method.needs.pieces) * gaps)
    solving = MATRICES_OF_A_FIT * width * width
    return moments.ACCUMULATOR.itemsize * (
        gaps * gathered * (width * width + width * hidden) + solving
    )


def tokens_bytes(
    model: DenseModel, fitting: Fitting, num_tokens: int, spans: Sequence[Span]
) -> int:
    """Memory that a fit by descent takes, which sees all tokens again and again."""
    if not fitting.method.needs.tokens:
        return 0
    hidden = int(model.hidden_size)
    gaps = len(spans) if _one_sweep(model, fitting, len(spans)) else 1
    return gaps * KEPT_OF_A_TOKEN * num_tokens * hidden * int(model.dtype.itemsize)


SOLUTIONS_OF_A_FIT = 5.0
"""Solving with its condition number, in Cholesky factorisations of the same width.

Measured: ``benchmarks/plan.py`` compares planned with real seconds.
"""


def fit_pass(
    model: DenseModel, spans: Sequence[Span], fitting: Fitting, windows: int, length: int
) -> Pass:
    """What `fit_many` does for one fitting: layers, moments, solving, and what it holds.

    Args:
        model: the dense model.
        spans: the gaps.
        fitting: how.
        windows: that it is fitted on.
        length: tokens of each.
    """
    method = fitting.method
    spans = parts_of(method, spans)
    gathered = tuple(feature_widths(model, gathered_features(method.needs)).items())
    width, pieces = sum(size for _, size in gathered), sum(method.needs.pieces)
    products = moments.products_of_a_token(gathered, model.hidden_size)
    if pieces:  # every token is in the moments of one piece, too
        products += moments.products_of_a_token((("x", model.hidden_size),), model.hidden_size)
    staged, stages = in_stages(model, method), 1 + len(method.before)
    solves = stages * (SOLVES if refits_through_norm(model, method) else 1)
    walked = len(spans) > 1 and fitting.repaired_inputs
    streams = 3 if walked or pieces or staged else 0
    stream = length * model.hidden_size * model.dtype.itemsize
    return Pass(
        "moments",
        "Fitting the repairs",
        windows,
        layers=windows * _layers_of_a_fit(model, spans, fitting),
        products=windows * length * products * len(spans) * solves,
        solutions=len(spans) * (solves + pieces) * SOLUTIONS_OF_A_FIT * width**3 / 3,
        copies=COPIES_IN_A_SWEEP,
        held=sums_bytes(model, fitting, spans)
        + tokens_bytes(model, fitting, windows * length, spans)
        + windows * streams * stream,
    )


def _layers_of_a_fit(model: DenseModel, spans: Sequence[Span], fitting: Fitting) -> int:
    """Decoder layers that a window passes: up to the last gap, and again from gap to gap."""
    method = fitting.method
    between = spans[-1].start - spans[0].stop if len(spans) > 1 and fitting.repaired_inputs else 0
    # A stage is a pass over the kept layers that the method reads or changes.
    passes = (1 + len(method.before)) * (SOLVES + 1 if refits_through_norm(model, method) else 1)
    again = len(spans) * passes * method.reach if in_stages(model, method) else 0
    return spans[-1].stop + between + again


def fit_gaps(
    runner: Runner, windows: Windows, spans: Sequence[Span], fitting: Fitting
) -> dict[Span, Repair]:
    """Fit one repair a gap.

    Args:
        runner: of the dense model.
        windows: what to fit on.
        spans: the gaps, in order.
        fitting: how.

    Raises:
        NumericalError: the fit is impossible.
    """
    return fit_many(runner, windows, spans, {"": fitting})[""]


def fit_many(
    runner: Runner,
    windows: Windows,
    spans: Sequence[Span],
    fittings: Mapping[str, Fitting],
) -> dict[str, dict[Span, Repair]]:
    """Fit several repairs of the same cut, sharing all that they can; arguments as `fit_gaps`.

    Evidence that several methods want of the same stream is gathered once. A method that cannot be
    fitted stops them all: check it beforehand with `features.check_method`.
    """
    model, num_tokens = runner.model, windows.input_ids.numel()
    size = sum(
        sums_bytes(model, each, spans) + tokens_bytes(model, each, num_tokens, spans)
        for each in fittings.values()
    )
    with model.residency.memory.taking(size):
        return _fit_many(runner, windows, spans, fittings)


def _fit_many(
    runner: Runner, windows: Windows, spans: Sequence[Span], fittings: Mapping[str, Fitting]
) -> dict[str, dict[Span, Repair]]:
    found: dict[str, dict[Span, Repair]] = {}
    for per_layer in (False, True):
        these = {n: f for n, f in fittings.items() if stacks(f.method, spans) == per_layer}
        if not these:
            continue
        if not per_layer:
            found |= _fit_together(runner, windows, spans, these)
            continue
        exact = {name: replace(f, stored_dtype=torch.float64) for name, f in these.items()}
        parts = parts_of(next(iter(these.values())).method, spans)
        single = _fit_together(runner, windows, parts, exact)
        found |= {
            name: {span: each.rounded(these[name].stored_dtype) for span, each in whole.items()}
            for name, whole in ((name, stack(repairs)) for name, repairs in single.items())
        }
    return {name: found[name] for name in fittings}


def stacks(method: RepairMethod, spans: Sequence[Span]) -> bool:
    """Whether every removed layer gets an operator of its own: where they lie apart, if at all."""
    return method.per_layer and len(spans) > 1


def parts_of(method: RepairMethod, spans: Sequence[Span]) -> Sequence[Span]:
    """What gets an operator of its own: every gap, or every removed layer."""
    if not stacks(method, spans):
        return spans
    return [Span(layer, layer + 1) for layer in removed_layers(spans)]


def _fit_together(
    runner: Runner,
    windows: Windows,
    spans: Sequence[Span],
    fittings: Mapping[str, Fitting],
) -> dict[str, dict[Span, Repair]]:
    if all(_one_sweep(runner.model, each, len(spans)) for each in fittings.values()):
        return _fit_in_one_sweep(runner, windows, spans, fittings)
    return _Walk(runner, windows, spans, fittings).fit()


def _one_sweep(model: DenseModel, fitting: Fitting, gaps: int) -> bool:
    """Whether a single sweep over the dense stream gathers all that a method needs."""
    method = fitting.method
    if method.name == "none":
        return True
    alone = gaps == 1 or not fitting.repaired_inputs
    return alone and not in_stages(model, method) and not method.needs.pieces


def in_stages(model: DenseModel, method: RepairMethod) -> bool:
    """Whether a fit goes over the kept layers before a gap several times."""
    return bool(method.before) or refits_through_norm(model, method)


def _fit_in_one_sweep(
    runner: Runner,
    windows: Windows,
    spans: Sequence[Span],
    fittings: Mapping[str, Fitting],
) -> dict[str, dict[Span, Repair]]:
    model = runner.model
    gathered = _Gathered(
        {
            kind: {
                span: Gatherer(needs, layout_of(model, windows, needs, span), token_weight=kind)
                for span in spans
            }
            for kind, needs in _needs_by_weight(list(fittings.values())).items()
        }
    )
    declared = Pass("moments", "Gathering moments", len(windows), copies=COPIES_IN_A_SWEEP)
    for first, ids in runner.visit(declared, windows, gathered):
        _gather_dense(model, first, ids, spans, gathered.by_weight)
    gatherers = gathered.by_weight
    found = {
        kind: {span: _evidence(model, each, span) for span, each in by_span.items()}
        for kind, by_span in gatherers.items()
    }
    return {
        name: {
            span: fitting.fit(found[fitting.weighting][span], last=len(fittings) == 1)
            for span in spans
        }
        for name, fitting in fittings.items()
    }


@dataclass(frozen=True)
class _Gathered:
    """The evidence of several gaps, as one pass makes it."""

    by_weight: dict[TokenWeight, dict[Span, Gatherer]]

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        return {
            f"{kind}.{span}.{name}": each
            for kind, by_span in sorted(self.by_weight.items())
            for span, gatherer in by_span.items()
            for name, each in gatherer.tensors().items()
        }


def layout_of(
    model: DenseModel, windows: Windows, needs: Needs, span: Span, back: int = 1
) -> Layout:
    """What will come to a gap; ``z``, ``m`` and ``o`` from the layer so many before it."""
    names = {"x", *gathered_features(needs)}
    from_removed = names & {"phi"}
    widths = feature_widths(model, names - from_removed, max(0, span.start - back))
    return Layout(
        widths | feature_widths(model, from_removed, span.start),
        len(windows),
        windows.sequence_length,
        model.dtype,
        model.device,
    )


def _needs_by_weight(fittings: Sequence[Fitting]) -> dict[TokenWeight, Needs]:
    return {
        kind: reduce(or_, (each.method.needs for each in fittings if each.weighting == kind))
        for kind in {fitting.weighting for fitting in fittings}
    }


def _evidence(model: DenseModel, gatherer: Gatherer, span: Span, back: int = 1) -> Evidence:
    output = None
    if {"z", "m"} & set(gatherer.features):
        output = mlp_output_of(model, model.layer(span.start - back))
    return gatherer.evidence(norm_eps(model.network.config), output)


@torch.no_grad()
def _gather_dense(
    model: DenseModel,
    first: int,
    ids: Tensor,
    spans: Sequence[Span],
    gatherers: Mapping[TokenWeight, Mapping[Span, Gatherer]],
) -> None:
    """Add the dense stream of some windows to the evidence of every gap."""
    batch, hidden = model.begin(ids)
    names = tuple(
        {name for each in gatherers.values() for g in each.values() for name in g.features}
    )
    before: dict[Span, tuple[Tensor, dict[str, Tensor]]] = {}
    stop = max(span.stop for span in spans)
    taps = tap_places(model, names)
    caught_now: dict[str, Tensor] = {}
    for boundary in range(stop + 1):
        for span in spans:
            if boundary == span.stop:
                x, features = before.pop(span)
                for each in gatherers.values():
                    each[span].add(first, x, batch.tokens(hidden), features)
            if boundary == span.start:
                read = _features(model, names, batch, hidden, caught_now, span)
                before[span] = (batch.tokens(hidden), read)
        if boundary < stop:
            wanted = taps if any(span.start == boundary + 1 for span in spans) else {}
            hidden = model.run_layer(boundary, batch, hidden, taps=tuple(wanted.values()))
            check_finite(hidden, boundary)
            caught_now = caught(wanted, hidden)


def _features(
    model: DenseModel,
    names: Sequence[str],
    batch: MicroBatch,
    stream: Stream,
    tapped: Mapping[str, Tensor],
    span: Span,
) -> dict[str, Tensor]:
    """Features by name, [tokens, width], padding left out."""
    read = reader(model, stream, span, tapped)
    return {name: batch.tokens(read(name)) for name in names}


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


class _Walk:
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
        with self.runner.progress.stage("Fitting gap after gap", steps) as advance:
            for index, span in enumerate(self.spans):
                self._fit_gap(index, span, advance)
        return self.repairs

    def _fit_gap(self, index: int, span: Span, advance: Advance) -> None:
        previous = self.spans[index - 1].stop if index else 0
        depth = min(
            max(each.method.reach for each in self.fittings.values()), span.start - previous
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
        once = [each for each in self.fittings.values() if not in_stages(self.model, each.method)]
        needs = _needs_by_weight(once)

        @cache
        def shared(kind: TokenWeight) -> Evidence:
            how = next(each for each in once if each.weighting == kind)
            stage = Stage(how.method.fit, needs[kind])
            gathered = self._gather(how, stage, forks, span, Repair("none"))
            return _evidence(self.model, gathered, span)

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
        evidence = _evidence(self.model, gathered, span, stage.back)
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
            for index, x, found in self._at_gap(source, span, places, stage.back, done):
                tokens = self.batches[index].tokens
                target = tokens(self.dense.streams[index]).float()
                change = target - tokens(x).float()
                wanted = tokens(found["written"]).float() + stage.share * change
                z, weights = tokens(found["z"]), moments.token_weights(target, kind)
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
            for index, x, found in self._at_gap(source, span, taps, stage.back, done):
                batch = self.batches[index]
                with torch.no_grad():
                    read = _features(self.model, names, batch, x, found, span)
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
            found: dict[str, Tensor] = {}
            for layer in range(source.boundary, span.start):
                wanted = taps if layer == span.start - back else {}
                stream = model.run_layer(
                    layer, batch, stream, weights=changed.get(layer), taps=tuple(wanted.values())
                )
                check_finite(stream, layer)
                found.update(caught(wanted, stream))
            yield index, stream, found

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
            act(repair, x, reader(self.model, x, span, found))
            for _, x, found in self._at_gap(source, span, taps, 1, repair)
        ]
        return _Track(streams, span.stop)


def make_fitting(
    loaded: DenseModel, recipe: Recipe, repair: str | RepairMethod | None = None
) -> Fitting:
    """How the recipe wants gaps fitted, with another repair than its own if one is named."""
    return Fitting(
        method=find_method(recipe.repair if repair is None else repair),
        options=FitOptions(ridge=recipe.ridge, absolute_ridge=recipe.absolute_ridge),
        token_weight=None if recipe.token_weight == "auto" else recipe.token_weight,
        repaired_inputs=recipe.inputs == "repaired",
        stored_dtype=loaded.stored_dtype,
    )
