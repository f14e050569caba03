"""How far the streams of cut models lie from the dense one's, boundary by boundary."""

from collections.abc import Callable, Mapping

import torch

from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.stream import Stream, micro_batches
from ghostlayers.repairs.base import Repair
from ghostlayers.spans import Span
from ghostlayers.text.tokens import Windows


@torch.no_grad()
def stream_distances(
    runner: Runner, windows: Windows, cuts: Mapping[str, Mapping[Span, Repair]]
) -> dict[str, dict[int, float]]:
    """How far cut models' streams lie from the dense one behind the first gap.

    Returns:
        By name and boundary of the dense model, the mean over tokens of ||h - h_dense||^2 /
        ||h_dense||^2.
    """
    model = runner.model
    ready = {name: Cut(model, repairs) for name, repairs in cuts.items()}
    sums: dict[str, dict[int, float]] = {name: {} for name in cuts}
    tokens = 0
    for ids in micro_batches(model, windows, runner.batch_size):
        batch, stream = model.begin(ids)
        dense = dict(Cut(model, {}).walk(batch, stream))
        tokens += ids.numel()
        for name, cut in ready.items():
            note = _distance_to(dense, sums[name])
            first = min(cut.repairs).stop
            for boundary, hidden in cut.walk(batch, dense[cut.fork], cut.fork):
                inside = any(span.start < boundary < span.stop for span in cut.repairs)
                if boundary >= first and not inside:
                    note(boundary, hidden)
    return {
        name: {boundary: total / tokens for boundary, total in distances.items()}
        for name, distances in sums.items()
    }


def _distance_to(
    dense: Mapping[int, Stream], distances: dict[int, float]
) -> Callable[[int, Stream], None]:
    """Adds up squared distances to the dense stream, relative to each token's own norm."""

    def note(boundary: int, hidden: Stream) -> None:
        want = dense[boundary].double()
        far = (hidden.double() - want).square().sum(dim=-1)
        near = want.square().sum(dim=-1).clamp_min(torch.finfo(far.dtype).tiny)
        distances[boundary] = distances.get(boundary, 0.0) + float((far / near).sum())

    return note
