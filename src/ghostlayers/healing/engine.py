"""One lesson: what the dense model says of some windows, and what that changes in the cut one.

Up to the first layer that differs both models compute the same, so the dense model's stream there
is where the cut model starts, and the layers before run once.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ghostlayers.calibration.cuts import positions_at_once
from ghostlayers.errors import NonFiniteError
from ghostlayers.healing.head import Head, logit_loss
from ghostlayers.healing.trained import Trained
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream, check_finite
from ghostlayers.recipe.healing import Loss
from ghostlayers.runtime.parallel import all_hold, shards

Positions = Int[Tensor, "windows positions"]


@dataclass(frozen=True)
class Lesson:
    """What the dense model says of some windows.

    Attributes:
        input_ids: [windows, sequence].
        positions: of every window, that predict a next token and are learnt from.
        stream: at the boundary where the cut model starts, [windows, sequence, hidden].
        guide: final hidden states at the positions, [windows, positions, hidden]; where the head
            is not known, the stream at the last boundary of all positions; None without a teacher.
        weights: of every position's loss, [windows, positions]; None where all are one.
    """

    input_ids: Int[Tensor, "windows sequence"]
    positions: Positions
    stream: Stream
    guide: Float[Tensor, "windows positions hidden"] | None
    weights: Float[Tensor, "windows positions"] | None = None

    def part(self, rows: slice) -> "Lesson":
        """Some of the windows."""
        guide = None if self.guide is None else self.guide[rows]
        weights = None if self.weights is None else self.weights[rows]
        return Lesson(self.input_ids[rows], self.positions[rows], self.stream[rows], guide, weights)

    def filled(self, count: int) -> "Lesson":
        """So many windows: behind those that there are the first again, which counts nothing."""
        missing = count - len(self.input_ids)
        if missing <= 0:
            return self
        rows = torch.tensor([*range(len(self.input_ids)), *[0] * missing])
        weights = torch.ones(self.positions.shape) if self.weights is None else self.weights
        weights = weights[rows].clone()
        weights[-missing:] = 0.0
        guide = None if self.guide is None else self.guide[rows]
        return Lesson(self.input_ids[rows], self.positions[rows], self.stream[rows], guide, weights)


class Engine:
    """Runs lessons: the dense model's part, and the cut model's forwards and backwards.

    Args:
        trained: the cut model's weights that are trained.
        loss: what is made small.
        batch_size: windows a call; 0 chooses.
        frugal: keep a layer's input alone for the backward pass, and run it again.
    """

    def __init__(
        self, trained: Trained, loss: Loss, batch_size: int = 0, *, frugal: bool = False
    ) -> None:
        self.trained, self.kind, self.frugal = trained, loss, frugal
        self.dense: DenseModel = trained.cut.dense
        self.student = DenseModel(
            trained.network,
            stored_dtype=self.dense.stored_dtype,
            memory=self.dense.residency.memory,
        )
        self.head = Head.of(self.dense)
        self.batch_size = batch_size

    @property
    def guided(self) -> bool:
        """Whether the loss asks what the dense model says."""
        return self.kind != "ce"

    @torch.no_grad()
    def teach(self, input_ids: Tensor, positions: Positions) -> Lesson:
        """Run the dense model; of a loss without a teacher, the shared layers alone."""
        batch, start, end = run_dense(self.dense, input_ids, self.trained.start, whole=self.guided)
        guide = None
        if self.guided and self.head is None:
            guide = end
        elif self.guided:
            guide = _at(self.dense.final_states(batch, end), positions)
        return Lesson(input_ids, positions, start, guide)

    def learn(self, lesson: Lesson, total: float) -> float:
        """Add the gradients of a lesson's loss to what is trained; the loss, summed.

        Args:
            lesson: some windows.
            total: weight of all positions of the step, which the gradient is a mean over.
        """
        length = lesson.input_ids.shape[1]
        step = self.student.windows_per_call(length, self.batch_size)
        sums = 0.0
        for start in range(0, len(lesson.input_ids), step):
            sums += self._learn_part(lesson.part(slice(start, start + step)), total)
            self.trained.take_gradients()
        return sums

    @torch.no_grad()
    def loss(self, lesson: Lesson) -> float:
        """The loss of a lesson, summed; nothing is learnt. Infinite where it is no number."""
        try:
            return self.learn(lesson, 1.0)
        except NonFiniteError:
            return math.inf

    def _learn_part(self, lesson: Lesson, total: float) -> float:
        batch, stream = self._forward(lesson)
        _check_finite_in_all(stream, self.student.num_layers - 1)
        if self.head is None:
            return self._through_model(stream, lesson, total)
        states = self.student.final_states(batch, stream, differentiable=torch.is_grad_enabled())
        chosen = _at(states, lesson.positions).flatten(0, 1)
        guide = None if lesson.guide is None else lesson.guide.flatten(0, 1)
        targets = _targets(lesson).flatten().to(chosen.device)
        weights = None if lesson.weights is None else lesson.weights.flatten().to(chosen.device)
        if weights is not None:  # what counts for nothing need not go through the head
            some = weights > 0
            guide = None if guide is None else guide[some.to(guide.device)]
            chosen, targets, weights = chosen[some], targets[some], weights[some]
        loss, gradient = self.head.loss(chosen.detach(), guide, targets, self.kind, weights)
        if chosen.requires_grad:
            chosen.backward(gradient / total)
        return loss

    def _forward(self, lesson: Lesson) -> tuple[MicroBatch, Stream]:
        """The cut model's stream at its last boundary, recorded for the backward pass."""
        batch, _ = self.student.begin(lesson.input_ids)
        stream = lesson.stream
        for layer in range(self.trained.start, self.student.num_layers):
            stream = self._layer(layer, batch, stream)
        return batch, stream

    def _layer(self, layer: int, batch: MicroBatch, stream: Stream) -> Any:
        def run(x: Stream) -> Stream:
            return self.student.run_layer(layer, batch, x, differentiable=torch.is_grad_enabled())

        return checkpoint(run, stream, use_reentrant=False) if self.frugal else run(stream)

    def _through_model(self, stream: Stream, lesson: Lesson, total: float) -> float:
        """The loss where the head is not known: the model's own logits, a few positions at a time.

        Gradients by the stream are collected before the layers are gone through.
        """
        leaf = stream.detach().requires_grad_()
        step = positions_at_once(self.dense.network.config.vocab_size, leaf.device)
        sums = 0.0
        for row in range(len(lesson.input_ids)):
            one = slice(row, row + 1)
            targets = _targets(lesson.part(one))[0].to(leaf.device)
            places = lesson.positions[row].to(leaf.device)
            weights = None if lesson.weights is None else lesson.weights[row].to(leaf.device)
            window = MicroBatch(lesson.input_ids[one].to(leaf.device), None, ())
            for start in range(0, len(places), step):
                some = slice(start, start + step)
                logits = self.student.logits(
                    window, leaf[one], places[some], differentiable=torch.is_grad_enabled()
                )[0]
                guide = None
                if lesson.guide is not None:
                    with torch.no_grad():
                        theirs = self.dense.logits(window, lesson.guide[one], places[some])
                    guide = theirs[0].float()
                loss, slope = logit_loss(
                    logits.detach().float(),
                    guide,
                    targets[some],
                    self.kind,
                    None if weights is None else weights[some],
                )
                sums += loss
                if logits.requires_grad:
                    logits.backward((slope / total).to(logits.dtype))
        if stream.requires_grad and leaf.grad is not None:
            stream.backward(leaf.grad)
        return sums


@torch.no_grad()
def run_dense(
    dense: DenseModel, input_ids: Tensor, start: int, *, whole: bool = True
) -> tuple[MicroBatch, Stream, Stream]:
    """The dense model's stream where the cut one starts, and at its last boundary.

    Args:
        dense: the dense model.
        input_ids: windows.
        start: the boundary where the cut model starts.
        whole: go on behind it; otherwise both streams are that one.
    """
    batch, stream = dense.begin(input_ids)
    for layer in range(start):
        stream = dense.run_layer(layer, batch, stream)
    end = stream
    for layer in range(start, dense.num_layers if whole else start):
        end = dense.run_layer(layer, batch, end)
    _check_finite_in_all(end, dense.num_layers - 1)
    return batch, stream, end


def _at(states: Stream, positions: Positions) -> Tensor:
    """Hidden states at some positions of every window, [windows, positions, hidden]."""
    places = positions.to(states.device)[:, :, None].expand(-1, -1, states.shape[-1])
    return states.gather(1, places)


def _targets(lesson: Lesson) -> Int[Tensor, "windows positions"]:
    """The true next tokens."""
    ids = lesson.input_ids.to(lesson.positions.device)
    return ids.gather(1, lesson.positions + 1)


def _check_finite_in_all(stream: Stream, layer: int) -> None:
    """`check_finite`, in all processes of a sharded run at once: none waits for one that stopped.

    Raises:
        NonFiniteError: a stream of any process is NaN or infinite.
    """
    if shards() == 1 or all_hold(bool(torch.isfinite(stream).all())):
        check_finite(stream, layer)
        return
    check_finite(stream, layer)
    raise NonFiniteError(
        f"decoder layer {layer} gave NaN or infinity in another process, which says more."
    )
