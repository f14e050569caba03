"""Losses of cut and repaired models, without building any of them.

The dense model runs once; each cut starts from the dense stream before the first layer that it
changes, and runs the kept layers only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream, check_finite
from ghostlayers.model.taps import Tap, Taps
from ghostlayers.repairs.base import Repair
from ghostlayers.spans import Span
from ghostlayers.statistics.losses import ROW, LossSums, Reference, sum_losses, token_losses
from ghostlayers.statistics.race import Race, run_race
from ghostlayers.surgery.features import act, caught, reader, tap_places
from ghostlayers.surgery.folding import layer_weights
from ghostlayers.text.tokens import Windows

LOGITS_AT_ONCE = 2**24
"""Elements of logits made at a time: 64 MB in float32. Fewer would stream a big head too often."""

LOGITS_ON_CPU = 2**23 - 2**12
"""... on a processor: the C library takes pieces of 32 MiB and more anew from the system each time,
and clearing their pages costs more than what is computed in them."""

POSITIONS_ON_CPU = 64
"""... but of so many positions at least: a head of 262,144 words, read for 32, takes a seventh of a
training step more."""

DENSE = "dense"


class Cut:
    """Removed layers with their repairs, ready to run over the dense model's layers.

    Args:
        model: the dense model.
        repairs: one a gap.
    """

    def __init__(self, model: DenseModel, repairs: Mapping[Span, Repair]) -> None:
        self.model = model
        self.repairs = dict(sorted(repairs.items()))
        self.weights: dict[int, dict[str, Tensor]] = {}
        for span, repair in self.repairs.items():
            self.weights.update(layer_weights(model, span, repair))

    @property
    def kept_layers(self) -> int:
        """Decoder layers that run behind the fork."""
        removed = sum(map(len, self.repairs))
        return self.model.num_layers - self.fork - removed

    @property
    def fork(self) -> int:
        """The last boundary up to which the cut model equals the dense one."""
        return self.fork_from({})

    def fork_from(self, base: Mapping[Span, Repair]) -> int:
        """The last boundary up to which it equals another cut, whose repairs these are."""
        mine, others = self.repairs.items(), base.items()
        changed = [
            span.start - repair.reach
            for span, repair in (*mine, *others)
            if self.repairs.get(span) is not repair or base.get(span) is not repair
        ]
        return min(changed, default=self.model.num_layers)

    def run(self, batch: MicroBatch, stream: Stream, boundary: int | None = None) -> Stream:
        """From the stream at the fork (or at another boundary) to the last boundary."""
        start = self.fork if boundary is None else boundary
        for _, here in self.walk(batch, stream, start):
            stream = here
        return stream

    def walk(
        self, batch: MicroBatch, stream: Stream, start: int = 0, watched: Taps = ()
    ) -> Iterator[tuple[int, Stream]]:
        """The stream at every boundary of the dense model, as this cut leaves it.

        A removed layer hands its input on, and a gap's repair acts at its end: boundary ``start``
        of a gap is the stream that the repair will receive, boundary ``stop`` what it makes of it.
        What ``watched`` taps of every layer that runs can be read at the boundary behind it.
        """
        gaps = {layer: span for span in self.repairs for layer in span.layers}
        features: dict[str, Tensor] = {}
        yield start, stream
        for layer in range(start, self.model.num_layers):
            span = gaps.get(layer)
            if span is None:
                wanted = self._taps(gaps.get(layer + 1))
                stream = self._layer(layer, batch, stream, (*wanted.values(), *watched))
                features = caught(wanted, stream)
            elif layer == span.stop - 1:
                with torch.no_grad():
                    read = reader(self.model, stream, span, features)
                    stream = act(self.repairs[span], stream, read)
            yield layer + 1, stream

    def _taps(self, span: Span | None) -> dict[str, tuple[str, Tap]]:
        """What the repair of a gap reads of the kept layer before it."""
        operator = None if span is None else self.repairs[span].operator
        return {} if operator is None else tap_places(self.model, operator.maps)

    def _layer(self, layer: int, batch: MicroBatch, stream: Stream, taps: Taps) -> Stream:
        weights = self.weights.get(layer)
        stream = self.model.run_layer(layer, batch, stream, weights=weights, taps=taps)
        check_finite(stream, layer)
        return stream


def unrepaired(spans: "tuple[Span, ...] | list[Span]") -> dict[Span, Repair]:
    """The bare cut."""
    return {span: Repair("none") for span in spans}


def measure_cuts(
    runner: Runner,
    windows: Windows,
    cuts: Mapping[str, Mapping[Span, Repair]],
    *,
    divergence: bool = True,
    title: str = "Measuring losses",
) -> dict[str, LossSums]:
    """Losses of the dense model and of cut models.

    Args:
        runner: of the dense model.
        windows: held-out windows.
        cuts: repairs by gap, by name.
        divergence: also compare with the dense model, not only with the text.
        title: of the pass.

    Returns:
        Loss, divergence from dense and agreement of ``dense`` and of every cut.
    """
    model = runner.model
    ready = {name: Cut(model, repairs) for name, repairs in cuts.items()}
    totals = LossRows([DENSE, *cuts], ROW)
    declared = loss_pass(
        model, len(windows), [cut.kept_layers for cut in ready.values()], divergence, title
    )
    for _, ids in runner.visit(declared, windows, totals):
        batch, streams = _cut_streams(model, ids, ready, Cut(model, {}))
        for window in range(ids.shape[0]):
            for name, sums in _window_losses(model, batch, streams, window, divergence).items():
                totals.rows[name] += sums.row()
    return {name: LossSums.of_row(row) for name, row in totals.rows.items()}


DIVERGENCE = 1.6
"""A head whose predictions are compared with the dense model's, in heads that only give a loss.

Measured: ``benchmarks/plan.py`` compares planned with real seconds.
"""


def loss_pass(
    model: DenseModel,
    windows: float,
    behind: Sequence[float],
    divergence: bool,
    title: str,
    *,
    key: str = "losses",
) -> Pass:
    """The pass of `measure_cuts` and of a lap of `race_cuts`.

    Args:
        model: the dense model, which runs whole.
        windows: that it visits.
        behind: for every cut, layers that run from where it leaves the dense model.
        divergence: also compare with the dense model.
        title: on the screen.
        key: in the journal.
    """
    heads = 1 + len(behind) * (DIVERGENCE if divergence else 1.0)
    return Pass(
        key,
        title,
        windows,
        layers=windows * (model.num_layers + sum(behind)),
        heads=windows * heads,
        copies=2 + len(behind),
    )


class LossRows:
    """Losses as one tensor, a row a model, filled or added to as windows are measured.

    Args:
        names: of the models.
        shape: of a row.
    """

    def __init__(self, names: Sequence[Any], *shape: int) -> None:
        self._losses = torch.zeros(len(names), *shape, dtype=torch.float64)
        self.rows = dict(zip(names, self._losses, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        return {"losses": self._losses}


def measure_evidence(
    runner: Runner, held_out: Windows, repairs: Mapping[Span, Repair]
) -> dict[str, LossSums]:
    """Losses of the dense, the cut and the repaired model on windows that nothing was fitted on."""
    if len(held_out) == 0:
        return {}
    models = {"cut": unrepaired(list(repairs))}
    if any(repair.changes_something for repair in repairs.values()):
        models["repaired"] = dict(repairs)
    return measure_cuts(runner, held_out, models, title="Measuring what it costs")


def _cut_streams(
    model: DenseModel, ids: Tensor, cuts: Mapping[str, Cut], base: Cut
) -> tuple[MicroBatch, dict[str, Tensor]]:
    """The stream at the last boundary, of the base and of every cut.

    Each cut starts from the base's stream at the last boundary that both share.
    """
    batch, stream = model.begin(ids)
    places = {name: cut.fork_from(base.repairs) for name, cut in cuts.items()}
    forks: dict[str, Tensor] = {}
    for boundary, hidden in base.walk(batch, stream):
        forks.update({name: hidden for name, place in places.items() if place == boundary})
        stream = hidden
    ends = {name: cut.run(batch, forks.pop(name), places[name]) for name, cut in cuts.items()}
    return batch, {DENSE: stream, **ends}


def race_cuts(
    runner: Runner,
    windows: Windows,
    cuts: Mapping[str, Mapping[Span, Repair]],
    *,
    base: Mapping[Span, Repair] | None = None,
    title: str = "Measuring candidates",
) -> tuple[Race, Tensor]:
    """Which of many cuts loses least; see `scores.race`.

    Where all cuts go further than a ``base``, that runs once instead of the dense model, and each
    starts from it. Other arguments as `measure_cuts`.

    Returns:
        The race, and the base's own mean loss of every window that any cut was measured on.
    """
    model = runner.model
    trunk = Cut(model, base or {})
    ready = {name: Cut(model, repairs) for name, repairs in cuts.items()}
    own: list[Tensor] = []

    def measure(names: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        part = windows.split_at(start)[1].first(stop - start)
        running = {name: ready[name] for name in names}
        declared = loss_pass(
            model,
            len(part),
            [cut.kept_layers for cut in running.values()],
            False,
            f"{title} ({len(names)} on windows {start + 1}-{stop})",
            key=f"race on {start + 1}-{stop}",
        )
        rows = _mean_losses(runner, declared, part, running, trunk)
        own.append(rows[DENSE])
        return rows

    return run_race(list(cuts), measure, len(windows)), torch.cat(own)


def window_losses(
    runner: Runner, windows: Windows, repairs: Mapping[Span, Repair], *, title: str
) -> tuple[Tensor, Tensor]:
    """Mean loss in nats of every window, of a repaired cut and of the dense model, [windows]."""
    model = runner.model
    cut = Cut(model, repairs)
    declared = loss_pass(
        model, len(windows), [cut.kept_layers], False, title, key="losses by window"
    )
    rows = _mean_losses(runner, declared, windows, {"cut": cut}, Cut(model, {}))
    return rows["cut"], rows[DENSE]


def _mean_losses(
    runner: Runner, declared: Pass, windows: Windows, cuts: Mapping[str, Cut], trunk: Cut
) -> dict[str, Tensor]:
    """Mean loss of every window, of the trunk (as ``dense``) and of every cut."""
    losses = LossRows([DENSE, *cuts], len(windows))
    for first, ids in runner.visit(declared, windows, losses):
        batch, streams = _cut_streams(runner.model, ids, cuts, trunk)
        for window in range(ids.shape[0]):
            for name, values in _window_token_losses(runner.model, batch, streams, window).items():
                losses.rows[name][first + window] = values.double().mean()
    return losses.rows


def end_losses(model: DenseModel, batch: MicroBatch, stream: Stream) -> Tensor:
    """Loss in nats at every position, from the stream at the last boundary, [tokens]."""
    windows = range(batch.input_ids.shape[0])
    parts = [_window_token_losses(model, batch, {"": stream}, window)[""] for window in windows]
    return torch.cat(parts)


def _window_token_losses(
    model: DenseModel, batch: MicroBatch, streams: Mapping[str, Tensor], window: int
) -> dict[str, Tensor]:
    losses: dict[str, list[Tensor]] = {name: [] for name in streams}
    for targets, logits in _window_logits(model, batch, streams, window):
        for name in streams:
            losses[name].append(token_losses(logits(name), targets))
    return {name: torch.cat(parts) for name, parts in losses.items()}


def positions_at_once(vocabulary: int, device: torch.device) -> int:
    """Positions whose logits are made together; see `LOGITS_AT_ONCE`."""
    most = LOGITS_AT_ONCE // vocabulary
    if device.type == "cpu":
        most = min(most, max(LOGITS_ON_CPU // vocabulary, POSITIONS_ON_CPU))
    return max(1, most)


def _window_logits(
    model: DenseModel,
    batch: MicroBatch,
    streams: Mapping[str, Tensor],
    window: int,
    others: Mapping[str, DenseModel] | None = None,
) -> Iterator[tuple[Tensor, Callable[[str], Tensor]]]:
    """For a few positions of one window at a time: the true next tokens, and logits by name."""
    row = slice(window, window + 1)
    ids = batch.input_ids[row]
    one = MicroBatch(ids, None, batch.calls)
    length = ids.shape[1] - 1
    owners = others or {}
    step = positions_at_once(model.network.config.vocab_size, model.device)
    for start in range(0, length, step):
        positions = slice(start, min(start + step, length))

        def logits(name: str, positions: slice = positions) -> Tensor:
            return owners.get(name, model).logits(one, streams[name][row], positions)[0]

        yield ids[0, 1:][positions], logits


def losses_beside(
    model: DenseModel,
    input_ids: Int[Tensor, "windows sequence"],
    streams: Mapping[str, Stream],
    others: Mapping[str, DenseModel] | None = None,
) -> dict[str, LossSums]:
    """Losses of streams at the last boundary, and how far they are from the dense one.

    Args:
        model: the dense model.
        input_ids: windows.
        streams: by name, that of ``dense`` among them.
        others: models whose norm and head read a stream instead of the dense model's, by its name.
    """
    batch = MicroBatch(input_ids.to(model.device), None, ())
    totals = {name: LossSums() for name in streams}
    for window in range(len(input_ids)):
        losses = _window_losses(model, batch, streams, window, True, others)
        totals = {name: totals[name] + sums for name, sums in losses.items()}
    return totals


def _window_losses(
    model: DenseModel,
    batch: MicroBatch,
    streams: Mapping[str, Tensor],
    window: int,
    divergence: bool,
    others: Mapping[str, DenseModel] | None = None,
) -> dict[str, LossSums]:
    """Losses of one window, its logits made for a few positions at a time."""
    totals = {name: LossSums() for name in streams}
    for targets, logits in _window_logits(model, batch, streams, window, others):
        dense = logits(DENSE)
        reference = Reference.of(dense) if divergence else None
        for name in streams:
            if name == DENSE:
                sums = sum_losses(dense, targets)
                agreements = sums.num_tokens if divergence else 0  # with itself
                totals[name] = totals[name] + replace(sums, agreements=agreements)
            else:
                totals[name] = totals[name] + sum_losses(logits(name), targets, reference)
    return totals
