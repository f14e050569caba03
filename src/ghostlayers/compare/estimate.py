"""How long a comparison will take, from a probe of a second or two on this machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ghostlayers.spans import Span
from ghostlayers.stream import LayerwiseModel, micro_batches
from ghostlayers.tokens import Windows


@dataclass(frozen=True)
class Speed:
    """Seconds that the parts of a run take here.

    Attributes:
        layer: one window through one decoder layer.
        head: one window through the head, its losses included.
        product: one multiply-add in float64.
    """

    layer: float
    head: float
    product: float


@torch.no_grad()
def probe(model: LayerwiseModel, windows: Windows) -> Speed:
    """Time a few layers, the head and a float64 product on one micro-batch."""
    ids = next(micro_batches(model, windows))
    batch, stream = model.begin(ids)
    some = range(min(3, model.num_layers))
    end = stream

    def layers() -> None:
        nonlocal end
        end = stream
        for layer in some:
            end = model.run_layer(layer, batch, end)

    def head() -> None:
        logits = model.logits(batch, end, slice(0, min(128, ids.shape[1])))
        logits.float().log_softmax(dim=-1).sum()

    width = min(1024, model.model.config.hidden_size)
    block = torch.ones(1024, width, dtype=torch.float64, device=stream.device)
    share = min(128, ids.shape[1]) / ids.shape[1]
    return Speed(
        layer=_seconds(layers) / len(some) / len(ids),
        head=_seconds(head) / share / len(ids),
        product=_seconds(lambda: block.T @ block) / (1024 * width * width),
    )


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first run pays for allocation
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Workload:
    """What a cut costs, in units of `Speed`.

    Attributes:
        fit_windows: windows that repairs are fitted on.
        eval_windows: windows of all corpora together.
        features: columns of the Gram matrix.
        repairs: models that are evaluated.
        tokens: of a window.
        extra_forwards: whole forward passes of one window for speed and continuations, a repair.
        stage_layers: layers that repairs with several stages run again, all repairs together.
    """

    fit_windows: int
    eval_windows: int
    features: int
    repairs: int
    tokens: int
    extra_forwards: float = 0.0
    stage_layers: int = 0


def cut_seconds(speed: Speed, work: Workload, spans: Sequence[Span], num_layers: int) -> float:
    """Predicted seconds of one cut: fit, losses of all repairs, speed."""
    start, stop = spans[0].start, spans[-1].stop
    removed = sum(map(len, spans))
    fit = work.fit_windows * (
        speed.layer * stop + speed.product * work.tokens * work.features**2 * 0.6
    )
    # Behind the first gap every repair leaves another stream, carried to the last gap by itself.
    between = spans[-1].start - start - sum(map(len, spans[:-1]))
    fit += work.fit_windows * speed.layer * (work.repairs * between + work.stage_layers)
    behind = num_layers - removed - start + 1
    losses = work.eval_windows * (
        speed.layer * (num_layers + work.repairs * behind) + speed.head * (work.repairs + 1)
    )
    whole = speed.layer * (num_layers - removed) + 0.1 * speed.head
    return fit + losses + work.repairs * work.extra_forwards * whole
