"""What passes come to in time and memory on this machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from ghostlayers.calibration.passes import Pass
from ghostlayers.model.dense import DenseModel, memory_for
from ghostlayers.model.offload import workspace
from ghostlayers.plan.probe import Speed, head_flops, layer_flops
from ghostlayers.recipe.decision import Decision


@dataclass(frozen=True)
class Predicted:
    """A line of a plan: a piece of work in the units that one waits and pays in.

    Attributes:
        name: what is done.
        seconds: on this machine.
        flops: floating-point operations.
        memory: bytes that the process holds at the peak.
        disk: bytes on disk, files for a while among them.
    """

    name: str
    seconds: float
    flops: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Plan:
    """What a run takes, a line for each piece of its work, in order.

    Attributes:
        lines: the pieces.
        budget: how a budget of bytes or speed comes to the number of layers, as foreseen before
            they are chosen.
        available: bytes of memory that there are for the process, or that it may have.
    """

    lines: tuple[Predicted, ...] = ()
    budget: Decision | None = None
    available: float = math.inf

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(line.seconds for line in self.lines)

    @property
    def flops(self) -> float:
        """In all."""
        return sum(line.flops for line in self.lines)

    @property
    def memory(self) -> int:
        """At the highest peak."""
        return max((line.memory for line in self.lines), default=0)

    @property
    def disk(self) -> int:
        """Written in all."""
        return sum(line.disk for line in self.lines)


@dataclass(frozen=True)
class Prices:
    """What passes of one model take here.

    Attributes:
        model: the dense model.
        length: tokens of a window.
        speed: as probed.
        held_now: bytes that the process holds already.
        processes: that share the windows.
    """

    model: DenseModel
    length: int
    speed: Speed
    held_now: int
    processes: int = 1

    def of(self, declared: Pass) -> Predicted:
        """A pass's price."""
        speed = self.speed
        shared = declared.layers * speed.layer + declared.heads * speed.head
        shared += declared.products * speed.product
        seconds = shared / self.processes + declared.solutions * speed.solution + declared.fixed
        # The next layer is read while one computes, but copied into place by itself.
        seconds += self._brought(declared) * speed.bring
        flops = declared.layers * layer_flops(self.model, self.length)
        flops += declared.heads * head_flops(self.model, self.length)
        flops += 2 * (declared.products + declared.solutions)
        on_disk = self.model.residency.on_disk
        space = workspace(self.model.config, self.model.dtype, self.model.device)
        stream = self.model.stream_bytes(self.length)
        elsewhere = declared.elsewhere * stream
        held = declared.held + declared.copies * stream + (0 if on_disk else elsewhere)
        return Predicted(
            declared.title,
            seconds,
            flops,
            self.held_now + space + held,
            declared.disk + (elsewhere * self._at_once(declared) if on_disk else 0),
        )

    def plan(self, lines: Iterable[Predicted]) -> Plan:
        """All that is done with the model, beside the memory that there is for it."""
        return Plan(tuple(lines), available=memory_for(self.model))

    def together(self, title: str, passes: Iterable[Pass]) -> Predicted:
        """The price of several passes as one line."""
        lines = [self.of(declared) for declared in passes]
        return Predicted(
            title,
            sum(line.seconds for line in lines),
            sum(line.flops for line in lines),
            max((line.memory for line in lines), default=0),
            sum(line.disk for line in lines),
        )

    def _brought(self, declared: Pass) -> float:
        """Decoder layers of an offloaded model that a pass brings in."""
        if not self.model.residency.offloaded or not declared.windows:
            return declared.brought or 0.0
        groups = math.ceil(declared.windows / self._at_once(declared))
        return declared.layers / declared.windows * groups

    def _at_once(self, declared: Pass) -> int:
        """Windows that pass a layer of an offloaded model together."""
        windows = math.ceil(declared.windows)
        return self.model.windows_at_once(
            windows, self.length, copies=declared.copies, elsewhere=declared.elsewhere
        )


def prices(model: DenseModel, speed: Speed, sequence_length: int, processes: int = 1) -> Prices:
    """What passes take for this model on this machine."""
    held = int(psutil.Process().memory_info().rss)
    if model.device.type != "cpu":
        held = torch.get_device_module(model.device).memory_allocated()
    return Prices(model, sequence_length, speed, held, processes)
