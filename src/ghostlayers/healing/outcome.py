"""What a training run comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ghostlayers.healing.state import Look
from ghostlayers.healing.text import Text
from ghostlayers.statistics.losses import LossSums


@dataclass(frozen=True)
class Outcome:
    """What a training run came to.

    Attributes:
        network: the cut model with its best weights, as they will be saved; with its last ones,
            where none were better than the closed form.
        parts: what was trained.
        num_trained: numbers that were trained.
        steps: that were taken.
        step_tokens: of each.
        share: of the positions that were learnt from.
        best_step: behind which the best state was; 0 is the closed form.
        looks: every measurement on held-out windows, the one before training first.
        dense: the dense model's losses there.
        training_losses: the mean loss of equal stretches of the run.
        rates: the highest learning rate of each part.
        seconds: that training took, measurements included, interruptions left out.
        text: what was trained and measured on.
        adapters: of ``lora``, by PEFT's names; those that are merged in the network.
        adapted: the projections that carry them.
        complete: whether these were all steps of the run.
    """

    network: Any
    parts: tuple[str, ...]
    num_trained: int
    steps: int
    step_tokens: int
    share: float
    best_step: int
    looks: tuple[Look, ...]
    dense: LossSums
    training_losses: tuple[float, ...]
    rates: Mapping[str, float]
    seconds: float
    text: Text
    adapters: Mapping[str, Tensor] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()
    complete: bool = True

    @property
    def better(self) -> bool:
        """Whether any state was better than the closed form."""
        return self.best_step > 0

    @property
    def start(self) -> LossSums:
        """Losses before training."""
        return self.looks[0].losses

    @property
    def end(self) -> LossSums:
        """Losses of the network."""
        if not self.better:
            return self.looks[-1].losses
        return next(look.losses for look in self.looks if look.step == self.best_step)
