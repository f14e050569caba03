"""How a cut shifts what the MLPs behind it compute: pre-activations and dead units by layer.

AP (Selective Activation for De-sparsifying Pruned Neural Networks, arXiv:2212.06145) prunes so that
fewer units die. Here nothing is pruned by it: it is a measurement, of gates that never die
altogether. A shift of means is what a gain or a bias could still take back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.anatomy import Anatomy
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream, micro_batches
from ghostlayers.model.taps import Tap
from ghostlayers.repairs.base import Repair
from ghostlayers.spans import Span
from ghostlayers.text.tokens import Windows

ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
"""What MLPs call the function that gates go into."""

DEAD = 0.01
"""A unit is dead for a token if it gives less than this share of what all give, by their RMS."""


@dataclass(frozen=True)
class GateShift:
    """One layer of a cut model beside the same layer of the dense one.

    Attributes:
        layer: of the dense model.
        mean_shift: RMS over units of the difference of mean pre-activations, in the dense unit's
            standard deviations.
        spread: standard deviation of pre-activations as a share of the dense layer's, by their
            variances' sums over units.
        dead: share of units and tokens with |act(g) u| below `DEAD` of that token's RMS.
        dense_dead: that of the dense layer.
    """

    layer: int
    mean_shift: float
    spread: float
    dead: float
    dense_dead: float


class _Sums:
    """Over the tokens of one layer of one model, in float64."""

    def __init__(self) -> None:
        self.tokens, self.dead = 0, 0.0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def add(
        self, gates: Float[Tensor, "tokens units"], written: Float[Tensor, "tokens units"]
    ) -> None:
        wide = gates.double()
        self.tokens += len(wide)
        self.total = self.total + wide.sum(dim=0)
        self.squares = self.squares + wide.square().sum(dim=0)
        sizes = written.double().abs()
        least = DEAD * sizes.square().mean(dim=1, keepdim=True).sqrt()
        self.dead += float((sizes < least).double().mean(dim=1).sum())

    @property
    def mean(self) -> Float[Tensor, " units"]:
        return self.total / self.tokens

    @property
    def variance(self) -> Float[Tensor, " units"]:
        return (self.squares / self.tokens - self.mean.square()).clamp_min(0.0)

    def beside(self, dense: "_Sums", layer: int) -> GateShift:
        """What changed; units that never move in the dense model have no mean shift."""
        moves = dense.variance > 0
        shift = (self.mean - dense.mean)[moves] / dense.variance[moves].sqrt()
        return GateShift(
            layer,
            float(shift.square().mean().sqrt()) if len(shift) else 0.0,
            float((self.variance.sum() / dense.variance.sum()).sqrt()),
            self.dead / self.tokens,
            dense.dead / dense.tokens,
        )


def gate_places(model: DenseModel) -> tuple[str, str] | None:
    """Paths of the activation in every layer's MLP, and of the projection behind it.

    Returns:
        None where not every layer has one of each: with experts, or with a function in its place.
    """
    anatomy = model.anatomy_or_reason
    if not isinstance(anatomy, Anatomy) or anatomy.experts:
        return None
    inside = f"{anatomy.mlp}." if anatomy.mlp else ""
    for name in ACTIVATIONS:
        path = f"{inside}{name}"
        if all(_is_module(layer, path) for layer in model.layers):
            return path, anatomy.mlp_output
    return None


def _is_module(layer: nn.Module, path: str) -> bool:
    return path in dict(layer.named_modules())


@torch.no_grad()
def gate_shifts(
    runner: Runner, windows: Windows, cuts: Mapping[str, Mapping[Span, Repair]]
) -> dict[str, list[GateShift]]:
    """Pre-activations and dead units of the kept layers behind the first gap, beside the dense.

    Args:
        runner: of the dense model.
        windows: text that nothing was fitted on.
        cuts: repairs by gap, by name.

    Returns:
        By name; no layers where it is not known what their gates are.
    """
    model = runner.model
    places = gate_places(model)
    if places is None:
        return {name: [] for name in cuts}
    ready = {"": Cut(model, {}), **{name: Cut(model, repairs) for name, repairs in cuts.items()}}
    sums: dict[str, dict[int, _Sums]] = {name: {} for name in ready}
    for ids in micro_batches(model, windows, runner.batch_size):
        batch, stream = model.begin(ids)
        for name, cut in ready.items():
            _add_up(cut, batch, stream, places, sums[name])
    return {name: _shifts(cut, sums[name], sums[""]) for name, cut in ready.items() if name}


def _add_up(
    cut: Cut, batch: MicroBatch, stream: Stream, places: Sequence[str], sums: dict[int, _Sums]
) -> None:
    gates, written = Tap(), Tap()
    watched = [(places[0], gates), (places[1], written)]
    for boundary, _ in cut.walk(batch, stream, watched=watched):
        if gates.value is not None:  # no layer ran before the first boundary and in a gap
            layer = sums.setdefault(boundary - 1, _Sums())
            layer.add(gates.caught().flatten(0, -2), written.caught().flatten(0, -2))


def _shifts(cut: Cut, sums: Mapping[int, _Sums], dense: Mapping[int, _Sums]) -> list[GateShift]:
    behind = min(span.stop for span in cut.repairs)
    return [sums[layer].beside(dense[layer], layer) for layer in sorted(sums) if layer >= behind]
