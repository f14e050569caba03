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

from ghostlayers import moments
from ghostlayers.features import caught, feature_widths, mlp_output_of, stream_feature, tap_places
from ghostlayers.folding import layer_weights
from ghostlayers.modeling import norm_eps
from ghostlayers.moments import Accumulator, TokenWeight
from ghostlayers.parallel import add_up, by_first
from ghostlayers.passes import share, visit, whole
from ghostlayers.progress import Advance, Progress, Silent
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Method,
    Needs,
    Pieces,
    Repair,
    Stage,
    Tokens,
)
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.repairs.piecewise import common_directions
from ghostlayers.spans import Span
from ghostlayers.stream import (
    LayerwiseModel,
    MicroBatch,
    Stream,
    check_finite,
)
from ghostlayers.tokens import Windows

SAMPLED_TOKENS = 16_384
"""Tokens that clusters and gradient-based objectives see."""

HELD_OUT_SHARE = 8
"""One window in so many chooses a ridge, where one is to be chosen."""

MATRICES_OF_A_FIT = 2
"""Square matrices of all features that solving takes beside the sums: the equilibrated and damped
Gram matrix, which is factored in its place, and a copy of it for its eigenvalues, or the solution.
The last fit of an evidence does without the first (`regress`)."""

COPIES_IN_A_SWEEP = 6
"""Of the stream, while it is gathered: before and behind a gap, and features as wide or wider."""


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

    method: Method
    options: FitOptions = field(default_factory=FitOptions)
    token_weight: TokenWeight | None = None
    repaired_inputs: bool = True
    stored_dtype: torch.dtype = torch.float32

    @property
    def weighting(self) -> TokenWeight:
        """How much each token counts."""
        return self.method.named_weight or self.token_weight or self.method.token_weight

    def fit(self, evidence: Evidence, *, last: bool = False) -> Repair:
        """Solve, and round the operator as it will be stored; every process gets the first's.

        The ``last`` fit of an evidence may use it up.
        """
        evidence = replace(evidence, expendable=last)
        return by_first(lambda: self.method.fit(evidence, self.options).rounded(self.stored_dtype))


@dataclass(frozen=True)
class Layout:
    """What comes to a gap, known before it comes.

    Attributes:
        widths: channels of every feature, ``x`` (the stream) among them.
        num_windows: that will be added, by all processes together.
        window_tokens: tokens of each.
        dtype: of the stream.
        device: where it comes.
    """

    widths: Mapping[str, int]
    num_windows: int
    window_tokens: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @property
    def num_sampled(self) -> int:
        """Tokens that clusters and gradient-based objectives see: the first ones."""
        return min(SAMPLED_TOKENS, self.num_windows * self.window_tokens)


class Gatherer:
    """Grows the evidence for one gap, some windows at a time, in any order.

    Args:
        needs: what the methods to be fitted want.
        layout: of what comes.
        token_weight: how much each token counts.
        centroids: by number of pieces.
        share: of the discrepancy that is the target.
    """

    def __init__(
        self,
        needs: Needs,
        layout: Layout,
        *,
        token_weight: TokenWeight,
        centroids: Mapping[int, Tensor] | None = None,
        share: float = 1.0,
    ) -> None:
        self.features = gathered_features(needs)
        self._needs, self._token_weight, self._share = needs, token_weight, share
        self._layout = layout
        self._centroids = dict(centroids or {})
        hidden, device = layout.widths["x"], layout.device
        blocks = tuple((name, layout.widths[name]) for name in self.features)
        parts = 2 if needs.held_out else 1
        groups = _groups(needs, self.features)
        self._sums = [Accumulator(blocks, hidden, device, groups) for _ in range(parts)]
        stream = (("x", hidden),)
        self._pieces = {
            count: [[Accumulator(stream, hidden, device) for _ in range(count)] for _ in self._sums]
            for count in self._centroids
        }
        self._rotated = (
            torch.zeros(2, hidden, dtype=moments.ACCUMULATOR, device=device)
            if needs.rotated
            else None
        )
        self._kept = self._room_for_tokens() if needs.tokens else {}

    def _room_for_tokens(self) -> dict[str, Tensor]:
        """Rows that are filled in their places, so that those of all processes add up."""
        names = ("source", "target", *(name for name in self.features if name == "m"))
        shape = (self._layout.num_sampled, self._layout.widths["x"])
        dtype, device = self._layout.dtype, self._layout.device
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        found = {f"kept.{name}": each for name, each in self._kept.items()}
        if self._rotated is not None:
            found["rotated"] = self._rotated
        named = {f"sums.{part}": each for part, each in enumerate(self._sums)}
        for count, lists in self._pieces.items():
            for part, pieces in enumerate(lists):
                named.update({f"{count}.{part}.{i}": each for i, each in enumerate(pieces)})
        for prefix, sums in named.items():
            found.update({f"{prefix}.{name}": each for name, each in sums.tensors().items()})
        return found

    def add(
        self, first: int, source: Tensor, target: Tensor, features: Mapping[str, Tensor]
    ) -> None:
        """Add whole windows.

        Args:
            first: number of the first of them.
            source: the stream before the gap, [tokens, hidden].
            target: the stream behind it.
            features: by name, [tokens, width].
        """
        for part, rows in enumerate(self._parts(first, len(source))):
            if rows is None:
                self._add(part, source, target, features)
            elif len(rows):
                here = rows.to(source.device)
                some = {name: each[here] for name, each in features.items()}
                self._add(part, source[here], target[here], some)
        if self._kept:
            self._keep(first * self._layout.window_tokens, source, target, features)

    def _parts(self, first: int, count: int) -> list[Tensor | None]:
        """Which tokens the fit sees, and which choose a ridge; None for all of them."""
        if not self._needs.held_out:
            return [None]
        windows = first + torch.arange(count) // self._layout.window_tokens
        chooses = windows % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
        return [torch.nonzero(~chooses)[:, 0], torch.nonzero(chooses)[:, 0]]

    def _add(
        self, part: int, source: Tensor, target: Tensor, features: Mapping[str, Tensor]
    ) -> None:
        weights = moments.token_weights(target, self._token_weight)
        blocks = [features[name] for name in self.features]
        self._sums[part].add(source, target, blocks, weights)
        for count, centroids in self._centroids.items():
            _add_pieces(self._pieces[count][part], centroids, source, target, weights)
        if self._rotated is not None:
            basis = hadamard(source.shape[1]).to(source.device)
            for row, each in zip(self._rotated, (source, target), strict=True):
                row += (each.double() @ basis).abs().sum(dim=0)

    def _keep(
        self, place: int, source: Tensor, target: Tensor, features: Mapping[str, Tensor]
    ) -> None:
        found = {"source": source, "target": target, **features}
        for name, rows in self._kept.items():
            stretch = rows[place : place + len(source)]
            stretch.copy_(found[name][: len(stretch)])

    def evidence(self, eps: float, output: tuple[Tensor, Tensor | None] | None = None) -> Evidence:
        """Everything so far; ``output`` is the last kept layer's MLP output projection."""
        training, *rest = (each.finished() for each in self._sums)
        held_out = rest[0] if rest and rest[0].num_tokens else None
        whole = training if held_out is None else moments.merge(training, held_out)
        pieces = {
            count: _pieces(self._centroids[count], *sums) for count, sums in self._pieces.items()
        }
        found = Evidence(
            moments=whole,
            training=training,
            held_out=training if held_out is None else held_out,
            rotated=None if self._rotated is None else (self._rotated[0], self._rotated[1]),
            pieces=pieces,
            tokens=self._tokens(),
            mlp_output=None if output is None else output[0],
            mlp_bias=None if output is None else output[1],
            eps=eps,
        )
        return found if self._share == 1.0 else _with_share(found, self._share)

    def _tokens(self) -> Tokens | None:
        if not self._kept:
            return None
        features = {name: each for name, each in self._kept.items() if name == "m"}
        return Tokens(self._kept["source"], self._kept["target"], features)


def _add_pieces(
    sums: Sequence[Accumulator],
    centroids: Tensor,
    source: Tensor,
    target: Tensor,
    weights: Tensor | None,
) -> None:
    nearest = (source @ centroids.to(source.dtype).T).argmax(dim=1)
    for index, each in enumerate(sums):
        members = nearest == index
        if bool(members.any()):
            x = source[members]
            each.add(x, target[members], [x], None if weights is None else weights[members])


def _pieces(
    centroids: Tensor, training: Sequence[Accumulator], held_out: Sequence[Accumulator] = ()
) -> Pieces:
    fit = tuple(each.finished() for each in training)
    if not held_out:
        return Pieces(centroids, fit, fit, fit)
    choose = tuple(each.finished() for each in held_out)
    whole = tuple(moments.merge(*pair) for pair in zip(fit, choose, strict=True))
    return Pieces(centroids, whole, fit, choose)


def _with_share(evidence: Evidence, share: float) -> Evidence:
    """The same tokens with a share of the discrepancy as the target."""
    assert evidence.training is not None
    assert evidence.held_out is not None
    return replace(
        evidence,
        moments=moments.shift_target(evidence.moments, share),
        training=moments.shift_target(evidence.training, share),
        held_out=moments.shift_target(evidence.held_out, share),
    )


def gathered_features(needs: Needs) -> tuple[str, ...]:
    """The blocks that are summed.

    The stream where nothing else is asked for, and ``m`` only where it cannot be made from ``z``.
    """
    names = needs | Needs(("x",)) if not needs.features else needs
    wanted = list(names.features)
    if "m" in wanted and "z" in wanted and not needs.tokens:
        wanted.remove("m")
        if "one" not in wanted:
            wanted.append("one")
    return tuple(wanted)


def sums_bytes(model: LayerwiseModel, fitting: Fitting, spans: Sequence[Span]) -> int:
    """Memory that a fit takes beside weights and streams: see `MATRICES_OF_A_FIT`."""
    method = fitting.method
    gaps = len(spans) if _one_sweep(fitting, len(spans)) else 1
    width = 0
    for needs in (method.needs, *(stage.needs for stage in method.before)):
        names = {"x", *gathered_features(needs)}
        width = max(width, sum(feature_widths(model.model, names).values()))
    hidden = int(model.model.config.hidden_size)
    gathered = (2 if method.needs.held_out else 1) * (1 + sum(method.needs.pieces) * gaps)
    solving = MATRICES_OF_A_FIT * width * width
    return moments.ACCUMULATOR.itemsize * (
        gaps * gathered * (width * width + width * hidden) + solving
    )


def _groups(needs: Needs, gathered: Sequence[str]) -> list[frozenset[str]]:
    """Features whose products are wanted; ``z`` where it stands for ``m``."""
    stands_in = {} if "m" in gathered else {"m": "z"}
    groups = [frozenset(stands_in.get(name, name) for name in each) for each in needs.together]
    return [(each or frozenset({"x"})) | {"one"} for each in groups]


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
    return fit_many(model, windows, spans, {"": fitting}, batch_size=batch_size, progress=progress)[
        ""
    ]


def fit_many(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    fittings: Mapping[str, Fitting],
    *,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[Span, Repair]]:
    """Fit several repairs of the same cut, sharing all that they can; arguments as `fit_gaps`.

    Evidence that several methods want of the same stream is gathered once. A method that cannot be
    fitted stops them all: check it beforehand with `features.check_method`.
    """
    progress = progress or Silent()
    if all(_one_sweep(each, len(spans)) for each in fittings.values()):
        return _fit_in_one_sweep(model, windows, spans, fittings, batch_size, progress)
    return _Walk(model, windows, spans, fittings, batch_size).fit(progress)


def _one_sweep(fitting: Fitting, gaps: int) -> bool:
    """Whether a single sweep over the dense stream gathers all that a method needs."""
    method = fitting.method
    if method.name == "none":
        return True
    alone = gaps == 1 or not fitting.repaired_inputs
    return alone and not method.before and not method.needs.pieces


def _fit_in_one_sweep(
    model: LayerwiseModel,
    windows: Windows,
    spans: Sequence[Span],
    fittings: Mapping[str, Fitting],
    batch_size: int,
    progress: Progress,
) -> dict[str, dict[Span, Repair]]:
    gathered = _Gathered(
        {
            kind: {
                span: Gatherer(needs, layout_of(model, windows, needs, span), token_weight=kind)
                for span in spans
            }
            for kind, needs in _needs_by_weight(list(fittings.values())).items()
        }
    )
    visited = visit(
        model,
        windows,
        gathered,
        description="Gathering moments",
        batch_size=batch_size,
        copies=COPIES_IN_A_SWEEP,
        progress=progress,
    )
    for first, ids in visited:
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
    model: LayerwiseModel, windows: Windows, needs: Needs, span: Span, back: int = 1
) -> Layout:
    """What will come to a gap; ``z``, ``m`` and ``o`` from the layer so many before it."""
    names = {"x", *gathered_features(needs)}
    from_removed = names & {"phi"}
    widths = feature_widths(model.model, names - from_removed, max(0, span.start - back))
    return Layout(
        widths | feature_widths(model.model, from_removed, span.start),
        len(windows),
        windows.sequence_length,
        model.model.dtype,
        model.device,
    )


def _needs_by_weight(fittings: Sequence[Fitting]) -> dict[TokenWeight, Needs]:
    return {
        kind: reduce(or_, (each.method.needs for each in fittings if each.weighting == kind))
        for kind in {fitting.weighting for fitting in fittings}
    }


def _evidence(model: LayerwiseModel, gatherer: Gatherer, span: Span, back: int = 1) -> Evidence:
    output = None
    if {"z", "m"} & set(gatherer.features):
        output = mlp_output_of(model.model, model.layer(span.start - back))
    return gatherer.evidence(norm_eps(model.model.config), output)


@torch.no_grad()
def _gather_dense(
    model: LayerwiseModel,
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
    taps = tap_places(model.model, names)
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
    model: LayerwiseModel,
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


class _Walk:
    """Carries the dense stream and the repaired ones from gap to gap."""

    def __init__(
        self,
        model: LayerwiseModel,
        windows: Windows,
        spans: Sequence[Span],
        fittings: Mapping[str, Fitting],
        batch_size: int,
    ) -> None:
        self.model, self.windows, self.spans = model, windows, spans
        self.fittings = dict(fittings)
        self.batches: list[MicroBatch] = []
        self.firsts: list[int] = []
        dense: list[Stream] = []
        for first, ids in share(model, windows, batch_size):
            batch, stream = model.begin(ids)
            self.batches.append(batch)
            self.firsts.append(first)
            dense.append(stream)
        self.dense = _Track(dense, 0)
        self.tracks: dict[str, _Track] = {}
        self.repairs: dict[str, dict[Span, Repair]] = {name: {} for name in fittings}

    def fit(self, progress: Progress) -> dict[str, dict[Span, Repair]]:
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
            if source is forks and not fitting.method.before:
                repair = fitting.fit(shared(fitting.weighting), last=len(self.fittings) == 1)
            else:
                repair = self._fit_one(fitting, source, span)
            self.repairs[name][span] = repair
            if not last and fitting.repaired_inputs:
                self.tracks[name] = self._repaired(source, span, repair, fitting)
            advance(1)

    def _shared_evidence(self, forks: _Track, span: Span) -> Callable[[TokenWeight], Evidence]:
        """By kind of token weight: what all methods want of the dense stream, gathered once."""
        once = [each for each in self.fittings.values() if not each.method.before]
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
        for stage in fitting.method.stages(span.start - source.boundary):
            gathered = self._gather(fitting, stage, source, span, done)
            evidence = _evidence(self.model, gathered, span, stage.back)
            repair = replace(fitting, method=replace(fitting.method, fit=stage.fit)).fit(
                evidence, last=True
            )
            left = repair.relative_residual * evidence.moments.target_energy
            whole = whole or evidence.moments.target_energy / stage.share**2
            folds = tuple(replace(fold, layers_back=stage.back) for fold in repair.folds)
            done = replace(repair, folds=(*done.folds, *folds))
        return replace(done, relative_residual=left / whole if whole else 0.0)

    def _gather(
        self, fitting: Fitting, stage: Stage, source: _Track, span: Span, done: Repair
    ) -> Gatherer:
        needs, stored = stage.needs, fitting.stored_dtype
        centroids = self._centroids(needs, source, span, done, stored) if needs.pieces else {}
        gatherer = Gatherer(
            needs,
            layout_of(self.model, self.windows, needs, span, stage.back),
            token_weight=fitting.weighting,
            centroids=centroids,
            share=stage.share,
        )
        names = gathered_features(needs)

        def fill() -> None:
            for index, x, found in self._at_gap(source, span, names, stage.back, done, stored):
                batch = self.batches[index]
                with torch.no_grad():
                    read = _features(self.model, names, batch, x, found, span)
                target = batch.tokens(self.dense.streams[index])
                gatherer.add(self.firsts[index], batch.tokens(x), target, read)

        whole(gatherer, fill, description=f"Fitting the gap {span}", windows=len(self.windows))
        return gatherer

    @torch.no_grad()
    def _at_gap(
        self,
        source: _Track,
        span: Span,
        names: Sequence[str],
        back: int,
        done: Repair,
        stored_dtype: torch.dtype,
    ) -> Iterator[tuple[int, Stream, dict[str, Tensor]]]:
        """The stream in front of the gap with the folds so far, and what layer -back computed."""
        model = self.model
        changed = layer_weights(model.model, model.layers, span, done, stored_dtype)
        taps = tap_places(model.model, names)
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
        self, needs: Needs, source: _Track, span: Span, done: Repair, stored_dtype: torch.dtype
    ) -> dict[int, Tensor]:
        layout = layout_of(self.model, self.windows, needs, span)
        shape = (layout.num_sampled, layout.widths["x"])
        sample = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        for index, x, _ in self._at_gap(source, span, (), 1, done, stored_dtype):
            rows = sample[self.firsts[index] * layout.window_tokens :][: x[..., 0].numel()]
            rows.copy_(self.batches[index].tokens(x)[: len(rows)])
        add_up([sample])
        return {count: common_directions(sample, count) for count in needs.pieces}

    @torch.no_grad()
    def _repaired(self, source: _Track, span: Span, repair: Repair, fitting: Fitting) -> _Track:
        """The stream behind the gap, where the next kept layer will read it."""
        names = () if repair.operator is None else tuple(repair.operator.maps)
        streams = [
            act(repair, x, reader(self.model, x, span, found))
            for _, x, found in self._at_gap(source, span, names, 1, repair, fitting.stored_dtype)
        ]
        return _Track(streams, span.stop)


def reader(
    model: LayerwiseModel, stream: Stream, span: Span, found: Mapping[str, Tensor]
) -> Callable[[str], Tensor]:
    """Reads features at a gap: tapped ones, or computed from the stream."""

    def read(name: str) -> Tensor:
        return found[name] if name in found else stream_feature(model, name, stream, span)

    return read


def act(repair: Repair, stream: Stream, read: Callable[[str], Tensor] | None = None) -> Stream:
    """What a repair does to the stream at its gap; folds have acted before."""
    if repair.scale != 1.0:
        stream = stream * repair.scale
    return stream if repair.operator is None else repair.operator.apply(stream, read)
