"""The units of a plan: what its stages count, and what that comes to in time and memory."""

from dataclasses import dataclass

import psutil
import torch

from ghostlayers.model.dense import DenseModel
from ghostlayers.model.offload import workspace
from ghostlayers.plan.probe import Speed, head_flops, layer_flops


@dataclass(frozen=True)
class Stage:
    """One line of a plan.

    Attributes:
        name: what is done.
        layers: windows through one decoder layer.
        heads: windows through the head.
        products: multiply-adds of sums, in float64.
        solutions: multiply-adds of solving, in float64.
        brought: decoder layers brought in from where they lie; 0 if all are in memory.
        held: bytes beside weights and workspace, at its peak.
        disk: bytes on disk, files for a while among them.
        fixed: seconds that none of these explain, such as starting a process.
    """

    name: str
    layers: float = 0.0
    heads: float = 0.0
    products: float = 0.0
    solutions: float = 0.0
    brought: float = 0.0
    held: int = 0
    disk: int = 0
    fixed: float = 0.0

    def __add__(self, other: "Stage") -> "Stage":
        """Both, under this one's name."""
        return Stage(
            self.name,
            self.layers + other.layers,
            self.heads + other.heads,
            self.products + other.products,
            self.solutions + other.solutions,
            self.brought + other.brought,
            max(self.held, other.held),
            self.disk + other.disk,
            self.fixed + other.fixed,
        )


@dataclass(frozen=True)
class Predicted:
    """A stage in the units that one waits and pays in.

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
    """All stages of a run, in order."""

    stages: tuple[Predicted, ...] = ()

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(each.seconds for each in self.stages)

    @property
    def flops(self) -> float:
        """In all."""
        return sum(each.flops for each in self.stages)

    @property
    def memory(self) -> int:
        """At the highest peak."""
        return max((each.memory for each in self.stages), default=0)

    @property
    def disk(self) -> int:
        """Written in all."""
        return sum(each.disk for each in self.stages)


@dataclass(frozen=True)
class Prices:
    """What units of a plan take here.

    Attributes:
        speed: as probed.
        layer_flops: of one window through one layer.
        head_flops: of one window through the head.
        held_now: bytes that the process holds already.
        workspace: bytes that a micro-batch takes while a layer runs.
        processes: that share the windows.
    """

    speed: Speed
    layer_flops: int
    head_flops: int
    held_now: int
    workspace: int
    processes: int = 1

    def of(self, stage: Stage) -> Predicted:
        """A stage's price."""
        shared = stage.layers * self.speed.layer + stage.heads * self.speed.head
        shared += stage.products * self.speed.product
        seconds = shared / self.processes + stage.solutions * self.speed.solution + stage.fixed
        # The next layer is read while one computes, but copied into place by itself.
        seconds += stage.brought * self.speed.bring
        flops = stage.layers * self.layer_flops + stage.heads * self.head_flops
        flops += 2 * (stage.products + stage.solutions)
        return Predicted(
            stage.name,
            seconds,
            flops,
            self.held_now + self.workspace + stage.held,
            stage.disk,
        )


def prices(model: DenseModel, speed: Speed, sequence_length: int, processes: int) -> Prices:
    """What units of a plan take for this model on this machine."""
    held = int(psutil.Process().memory_info().rss)
    if model.device.type != "cpu":
        held = torch.get_device_module(model.device).memory_allocated()
    return Prices(
        speed=speed,
        layer_flops=layer_flops(model, sequence_length),
        head_flops=head_flops(model, sequence_length),
        held_now=held,
        workspace=workspace(model.config, model.dtype, model.device),
        processes=processes,
    )
