"""What the model that would be saved loses on windows that it is not trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostlayers.calibration.cuts import LOGITS_AT_ONCE
from ghostlayers.healing.engine import _window
from ghostlayers.healing.trained import Trained
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream
from ghostlayers.statistics.losses import LossSums, Reference, sum_losses
from ghostlayers.text.tokens import Windows


@dataclass(frozen=True)
class Ready:
    """A group of held-out windows, as far as both models compute the same."""

    input_ids: Tensor
    start: Stream
    end: Stream


class HeldOut:
    """Held-out windows, the dense model's streams on them, and its losses.

    Args:
        trained: the cut model; the dense one runs at once, and not again.
        windows: few: what the dense model makes of them is kept in memory.
        batch_size: windows a call; 0 chooses.
    """

    def __init__(self, trained: Trained, windows: Windows, batch_size: int = 0) -> None:
        self.trained, self.windows = trained, windows
        self.dense = trained.cut.dense
        self._step = self.dense.windows_at_once(
            len(windows), windows.sequence_length, batch_size, copies=2
        )
        self._groups = [self._ready(ids) for ids in windows.input_ids.split(self._step)]

    @torch.no_grad()
    def _ready(self, ids: Tensor) -> Ready:
        batch, stream = self.dense.begin(ids)
        start = stream
        for layer in range(self.dense.num_layers):
            if layer == self.trained.start:
                start = stream
            stream = self.dense.run_layer(layer, batch, stream)
        return Ready(ids, start, stream)

    def dense_losses(self) -> LossSums:
        """The dense model's own losses."""
        return sum((self._losses(self.dense, each, each.end) for each in self._groups), LossSums())

    @torch.no_grad()
    def losses(self, network: Any) -> LossSums:
        """Losses of a network that differs from the cut one in trained weights alone."""
        model, total = DenseModel(network), LossSums()
        for each in self._groups:
            batch, _ = model.begin(each.input_ids)
            stream = each.start
            for layer in range(self.trained.start, model.num_layers):
                stream = model.run_layer(layer, batch, stream)
            total = total + self._losses(model, each, stream)
        return total

    @torch.no_grad()
    def _losses(self, model: DenseModel, group: Ready, stream: Stream) -> LossSums:
        own, _ = model.begin(group.input_ids)
        teacher, _ = self.dense.begin(group.input_ids)
        step = max(1, LOGITS_AT_ONCE // self.dense.config.vocab_size)
        total = LossSums()
        for row in range(len(group.input_ids)):
            one = slice(row, row + 1)
            mine, theirs = _window(own, one), _window(teacher, one)
            total = total + self._window_losses(
                model, mine, theirs, stream[one], group.end[one], step
            )
        return total

    def _window_losses(
        self,
        model: DenseModel,
        mine: MicroBatch,
        theirs: MicroBatch,
        stream: Stream,
        end: Stream,
        step: int,
    ) -> LossSums:
        targets, total = mine.input_ids[0, 1:], LossSums()
        for start in range(0, len(targets), step):
            some = slice(start, min(start + step, len(targets)))
            reference = Reference.of(self.dense.logits(theirs, end, some)[0])
            logits = model.logits(mine, stream, some)[0]
            total = total + sum_losses(logits, targets[some], reference)
        return total
