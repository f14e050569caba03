"""Learning rates that fit a model: the default ones, or less where a step of them goes too far.

The first step of AdamW moves every number by the rate, against the sign of its gradient. Models
differ in how far that may be: on Gemma 3, whose stream has channels a hundred times as large as
others, a tenth of what is best for a Llama of its size. So the step is tried on other windows
before training: a rate fits if a step three times as long still lowers their loss at least as much.

Both sides are several windows: the fewer they are, the more often others lose by any step, however
short. That is the draw's luck, and says nothing against the rate. Then the step is tried backwards,
where the slope wins as much and the curve takes as much away. In 16 bits a step that is far too
short to matter rounds otherwise, too, and moves the loss; by so much, harm is no harm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ghostlayers.healing.engine import Engine, Lesson
from ghostlayers.healing.positions import draw_positions
from ghostlayers.healing.schedule import HEADS, Work
from ghostlayers.runtime.parallel import from_first

FURTHER = 3.0
"""A step so many times as long must still help: what is best for one step is too much for many."""

LOWEST = 1e-3
"""Of a default rate, below which no lower one is tried."""

WINDOWS = 4
"""Whose gradient the steps follow, and as many others that they are tried on."""

RESTING = (1.0, 0.5)
"""Steps of the lowest rate, there and back, that show how far rounding moves the loss."""

SHARE = 0.125
"""Of their positions, at the most: windows differ more from each other than their positions do."""


def fitting_rates(
    engine: Engine,
    parts: Sequence[str],
    highest: Tensor,
    texts: Tensor,
    share: float,
    room: Mapping[str, Tensor],
) -> Tensor:
    """The rate of every part, at most so high; nothing that is trained is changed.

    Args:
        engine: runs the cut model.
        parts: whose rates are open.
        highest: of each, [parts].
        texts: windows of the training text, [windows, sequence].
        share: of their positions that are learnt from.
        room: of every master's shape, by name, for what it holds meanwhile; zero in the end.
    """
    count = min(WINDOWS, max(1, len(texts) // 2))
    followed, others = (
        [_lesson(engine, row, min(share, SHARE), seed) for row in rows.split(1)]
        for seed, rows in enumerate((texts[:count], texts[-count:]))
    )
    for lesson in followed:  # one at a time, as large as a step's smallest: so is their room
        engine.learn(lesson, lesson.positions.numel())
    start = _losses(engine, others)
    masters = engine.trained.masters
    steps = [_Steps(engine, part, others, room) for part in parts]
    noise = cache(lambda: _noise(steps[0], start, LOWEST * float(highest[0])))
    rates = [
        _longest(of_part, start, float(rate), noise)
        for of_part, rate in zip(steps, highest, strict=True)
    ]
    for name, master in masters.items():
        master.grad = None
        room[name].zero_()
    return torch.tensor(rates, dtype=highest.dtype)


def work_of_trial(parts: int, length: int, work: Work) -> float:
    """What `fitting_rates` takes, in tokens of training.

    Args:
        parts: whose rates are open.
        length: tokens of a window.
        work: what a token costs.
    """
    head = HEADS * work.head * min(work.share, SHARE)
    steps = (1 + 2 * parts) * (work.forward + head)  # at least: lower rates take more
    passes = 2 * work.teacher + work.student + head + steps
    return WINDOWS * length * passes / work.of_training if parts else 0.0


def _lesson(engine: Engine, rows: Tensor, share: float, seed: int) -> Lesson:
    return engine.teach(rows, draw_positions(range(len(rows)), rows.shape[1], share, seed))


def _losses(engine: Engine, lessons: Sequence[Lesson]) -> float:
    """The loss of several lessons, the same in all processes, that they go on alike."""
    return from_first(sum(map(engine.loss, lessons)))


class _Steps:
    """What a step of one part does to the loss of other windows.

    Args:
        engine: runs the cut model.
        part: that steps, against the gradients that its weights hold.
        others: the windows.
        room: for what its weights hold before.
    """

    def __init__(
        self, engine: Engine, part: str, others: Sequence[Lesson], room: Mapping[str, Tensor]
    ) -> None:
        self.engine, self.others = engine, others
        trained = engine.trained
        self._before = {
            name: room[name].copy_(master.detach())
            for name, master in trained.masters.items()
            if trained.parts[name] == part and master.grad is not None
        }

    @torch.no_grad()
    def loss(self, rate: float) -> float:
        """Behind a step of this length."""
        trained = self.engine.trained
        for name, before in self._before.items():
            master = trained.masters[name]
            master.copy_(before - rate * master.grad.sign())  # type: ignore[union-attr]
        trained.write_back()
        try:
            return _losses(self.engine, self.others)
        finally:
            for name, before in self._before.items():
                trained.masters[name].copy_(before)
            trained.write_back()


def _noise(steps: _Steps, start: float, rate: float) -> float:
    """How far rounding alone moves the loss: there and back again, a slope cancels out."""
    lengths = [length * rate for length in RESTING]
    return max(abs(steps.loss(far) + steps.loss(-far) - 2.0 * start) for far in lengths)


def _longest(
    steps: _Steps, start: float, highest: float, noise: Callable[[], float] = lambda: 0.0
) -> float:
    """The highest rate, of thirds of thirds, at which a step three times as long helps as much.

    Args:
        steps: of a part.
        start: the loss before them.
        highest: rate that is tried.
        noise: by how much losses differ without a reason; asked where a step does harm.
    """
    rate, further, here = highest, steps.loss(FURTHER * highest), steps.loss(highest)
    while rate > LOWEST * highest and not _helps_as_much(further, here, start, noise):
        if _leads_uphill(further - start, here - start):
            back = steps.loss(-FURTHER * rate), steps.loss(-rate)
            if _helps_as_much(*back, start, noise):
                break
        rate /= FURTHER
        further, here = here, steps.loss(rate)
    return rate


def _helps_as_much(further: float, here: float, start: float, noise: Callable[[], float]) -> bool:
    """Whether the longer of two steps does; where both do harm, the lesser harm is no help."""
    best = min(here, start)
    return further <= best or further <= best + noise()


def _leads_uphill(further: float, here: float) -> bool:
    """Whether a line and a parabola through both harms rise from the start already.

    Args:
        further: what is lost by a step `FURTHER` times as long.
        here: what is lost by the step.
    """
    return further < FURTHER**2 * here < math.inf
