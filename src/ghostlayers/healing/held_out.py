"""What the model that would be saved loses on windows that it is not trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostlayers.calibration.cuts import DENSE, losses_beside
from ghostlayers.healing.engine import run_dense
from ghostlayers.healing.trained import Trained
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import Stream
from ghostlayers.statistics.losses import LossSums
from ghostlayers.text.tokens import Windows

HEALED = "healed"


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

    def _ready(self, ids: Tensor) -> Ready:
        _, start, end = run_dense(self.dense, ids, self.trained.start)
        return Ready(ids, start, end)

    @torch.no_grad()
    def dense_losses(self) -> LossSums:
        """The dense model's own losses."""
        total = LossSums()
        for group in self._groups:
            total = total + losses_beside(self.dense, group.input_ids, {DENSE: group.end})[DENSE]
        return total

    @torch.no_grad()
    def losses(self, network: Any) -> LossSums:
        """Losses of a network that differs from the cut one in trained weights alone."""
        model, total = DenseModel(network), LossSums()
        for group in self._groups:
            batch, _ = model.begin(group.input_ids)
            stream = group.start
            for layer in range(self.trained.start, model.num_layers):
                stream = model.run_layer(layer, batch, stream)
            streams = {DENSE: group.end, HEALED: stream}
            losses = losses_beside(self.dense, group.input_ids, streams, {HEALED: model})
            total = total + losses[HEALED]
        return total
