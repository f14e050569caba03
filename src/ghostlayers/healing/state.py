"""All that a training run has come to, as tensors of fixed shapes, which the journal keeps."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostlayers.healing.schedule import MOST_LOOKS
from ghostlayers.healing.trained import Trained
from ghostlayers.statistics.losses import LossSums

BETAS = (0.9, 0.95)
CLIP = 1.0
"""The norm that a gradient is shortened to."""

BINS = 100
"""Stretches of the run whose mean training loss is kept."""


@dataclass(frozen=True)
class Look:
    """A measurement on held-out windows.

    Attributes:
        step: behind which.
        seconds: since training began, interruptions left out.
        losses: of the model as it would be saved.
    """

    step: int
    seconds: float
    losses: LossSums


@dataclass
class State:
    """Weights, moments, the best state so far, and what was measured.

    Attributes:
        trained: the weights.
        optimiser: AdamW without weight decay, one group of weights a part.
        best: the weights of the best state, as they would be saved.
        history: a row a look: step, seconds, and a row of `LossSums`.
        curve: sum of the training loss and positions, [2, bins].
        notes: looks so far, step of the best, its measure, seconds; steps, and windows of each;
            steps that text was read for; seconds of one where the budget is a time.
        text: SHA-256 of what is trained and measured on.
        rates: the highest learning rate of each part, in the order of `parts`.
    """

    trained: Trained
    optimiser: torch.optim.Optimizer
    best: dict[str, Tensor]
    history: Tensor = field(
        default_factory=lambda: torch.zeros(
            MOST_LOOKS + 2, 2 + len(LossSums().row()), dtype=torch.float64
        )
    )
    curve: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.float64))
    notes: Tensor = field(default_factory=lambda: torch.zeros(8, dtype=torch.float64))
    text: Tensor = field(default_factory=lambda: torch.zeros(32, dtype=torch.uint8))
    rates: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def begin(cls, trained: Trained, rates: Mapping[str, float]) -> "State":
        """At the closed form."""
        parts = dict.fromkeys(trained.parts.values())
        groups = [
            {
                "params": [trained.masters[n] for n, p in trained.parts.items() if p == part],
                "lr": rates[part],
            }
            for part in parts
        ]
        on_cpu = all(master.device.type == "cpu" for master in trained.masters.values())
        optimiser = torch.optim.AdamW(  # in one go on a processor, where it is a tenth of a step
            groups, betas=BETAS, weight_decay=0.0, fused=on_cpu or None
        )
        for master in trained.masters.values():
            optimiser.state[master] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        state = cls(trained, optimiser, trained.stored())
        state.rates = torch.tensor([rates[part] for part in parts], dtype=torch.float64)
        state.notes[2] = math.inf
        return state

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, not copies."""
        named: dict[str, Tensor] = {}
        for name, master in self.trained.masters.items():
            own = self.optimiser.state[master]
            named[f"weight {name}"] = master.detach()
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                named[f"{moment} {name}"] = own[moment]
        named |= {f"best {name}": tensor for name, tensor in self.best.items()}
        return named | {
            "history": self.history,
            "curve": self.curve,
            "notes": self.notes,
            "text": self.text,
            "rates": self.rates,
        }

    @property
    def parts(self) -> list[str]:
        """What is trained, in the order of the optimiser's groups."""
        return list(dict.fromkeys(self.trained.parts.values()))

    @property
    def room(self) -> dict[str, Tensor]:
        """The first moments by name: before the first step, zeros that one may write into."""
        moments = self.optimiser.state
        return {name: moments[master]["exp_avg"] for name, master in self.trained.masters.items()}

    @property
    def masters(self) -> list[Tensor]:
        """What the optimiser changes."""
        return list(self.trained.masters.values())

    def step(self, rate: float) -> None:
        """Change the weights by their gradients, at a share of the highest learning rates."""
        for group, highest in zip(self.optimiser.param_groups, self.rates.tolist(), strict=True):
            group["lr"] = rate * highest
        self.optimiser.step()
        self.trained.set_gradients_aside()
        self.trained.write_back()

    def rehearse(self) -> None:
        """All the work of a step, which changes no weight and forgets the gradients."""
        if math.isfinite(self.gradient_norm()):
            self.step(0.0)
        else:
            self.trained.set_gradients_aside()

    def forget(self) -> None:
        """The optimiser as it is before the first step."""
        for own in self.optimiser.state.values():
            for moment in own.values():
                moment.zero_()

    def gradient_norm(self) -> float:
        """The norm of all gradients, which are shortened to `CLIP` where it is greater."""
        return self.trained.shorten_gradients(CLIP)

    def note_loss(self, step: int, steps: int, loss: float, positions: float) -> None:
        """Add a step's loss to the curve."""
        place = min(BINS - 1, step * BINS // steps)
        self.curve[:, place] += torch.tensor([loss, positions], dtype=torch.float64)

    def note_look(self, step: int, measured: LossSums, stored: dict[str, Tensor], by: str) -> bool:
        """Take down a measurement; whether it is the best so far, which is kept."""
        place = int(self.notes[0])
        row = torch.tensor([step, float(self.notes[3])], dtype=torch.float64)
        self.history[place] = torch.cat([row, measured.row()])
        self.notes[0] = place + 1
        measure = measured.kl_nats if by == "kl" else measured.loss_nats
        if not measure < float(self.notes[2]):
            return False
        self.notes[1], self.notes[2] = step, measure
        for name, tensor in stored.items():
            self.best[name].copy_(tensor)
        return True

    def plan(self, steps: int, windows: int, seconds: float = 0.0) -> None:
        """Take down the steps of the run, windows of each, and what a step takes, if it matters."""
        self.notes[4:] = torch.tensor([steps, windows, steps, seconds], dtype=torch.float64)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Count what is done meanwhile among the seconds that training took."""
        began = time.perf_counter()
        yield
        self.notes[3] += time.perf_counter() - began

    def shorten(self, steps: int) -> None:
        """Take fewer steps; the text is that of as many as were planned."""
        self.notes[4] = steps

    @property
    def steps(self) -> int:
        """Of the run; 0 before they are known."""
        return int(self.notes[4])

    @property
    def windows(self) -> int:
        """Of every step."""
        return int(self.notes[5])

    @property
    def planned(self) -> int:
        """Steps that there is text for."""
        return int(self.notes[6])

    @property
    def step_seconds(self) -> float:
        """What a step takes, where the budget is a time; 0 where it is not."""
        return float(self.notes[7])

    @property
    def seconds(self) -> float:
        """That training took so far."""
        return float(self.notes[3])

    @property
    def best_step(self) -> int:
        """Behind which step the best state was; 0 is the closed form."""
        return int(self.notes[1])

    def looks(self) -> list[Look]:
        """Every measurement so far."""
        rows: Sequence[Tensor] = list(self.history[: int(self.notes[0])])
        return [Look(int(r[0]), float(r[1]), LossSums.of_row(r[2:])) for r in rows]

    def training_losses(self) -> list[float]:
        """Mean training loss of each stretch of the run that was gone through."""
        sums, counts = self.curve
        return [float(s / c) for s, c in zip(sums, counts, strict=True) if c]
