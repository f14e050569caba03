"""How long training goes on, and what is done when: pure numbers."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

LAST_RATE = 0.1
"""The learning rate at the end, of its highest."""

MOST_LOOKS = 10
"""Measurements on held-out windows after the start."""

SHARE_OF_LOOKS = 0.1
"""Of the work, that these may take."""

HELD_OUT = (8, 64)
"""Windows that are measured on, at the least and at the most, if nothing is said."""

HEADS = 3.5
"""Passes through the head for a token: of both models, and back; the softmaxes cost half of one."""

TRIALS = (3, 12)
"""Steps that tell how long one takes, at the least and at the most."""

SHARE_OF_TRIALS = 0.1
"""Of the time, that these may take."""

STEP_TOKENS = 256
LONG_RUNS = ((200_000, 512), (500_000, 1024), (1_000_000, 2048), (4_000_000, 8192))
"""Tokens from which on a step has more of them. A run needs some hundreds of steps more than it
needs each of them to be exact (``docs/results/healing.md``)."""


@dataclass(frozen=True)
class Work:
    """What a token costs, in forward passes of one decoder layer.

    Attributes:
        teacher: of the dense model's pass.
        student: of the cut model's pass and what goes backwards through it.
        forward: of the cut model's pass alone.
        head: of one pass through the head.
        share: of the positions that are learnt from.
    """

    teacher: float
    student: float
    forward: float
    head: float
    share: float

    @property
    def of_training(self) -> float:
        """A token that is trained on: the head runs for both models, and back."""
        return self.teacher + self.student + HEADS * self.head * self.share

    @property
    def of_looking(self) -> float:
        """A token of a held-out window."""
        return self.forward + 2.0 * self.head


def rate(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its highest: rising, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))


def looks(steps: int, step_tokens: int, held_out_tokens: int, work: Work) -> tuple[int, ...]:
    """The steps behind which held-out windows are measured; the last one is among them."""
    training = steps * step_tokens * work.of_training
    looking = max(held_out_tokens * work.of_looking, 1e-9)
    count = min(steps, MOST_LOOKS, max(1, round(SHARE_OF_LOOKS * training / looking)))
    return tuple(sorted({round(steps * (number + 1) / count) for number in range(count)}))


def held_out_windows(tokens: float, window: int, work: Work) -> int:
    """Windows to measure on before and after so many tokens, in a share of their time.

    Args:
        tokens: of training.
        window: tokens of a window.
        work: what a token costs.
    """
    measured = work.teacher + 2.0 * work.of_looking
    wanted = SHARE_OF_LOOKS * tokens * work.of_training / (window * measured)
    least, most = HELD_OUT
    return min(max(round(wanted), least), most)


def tokens_a_step(tokens: float, asked: int | None) -> int:
    """Tokens of a step, of a run of so many."""
    if asked is not None:
        return asked
    chosen = STEP_TOKENS
    for least, size in LONG_RUNS:
        chosen = size if tokens >= least else chosen
    return chosen


def trials(seconds: float, first: float) -> int:
    """Steps that tell how long one takes.

    Args:
        seconds: of the run.
        first: that the first of them took.
    """
    least, most = TRIALS
    return min(max(int(SHARE_OF_TRIALS * seconds / first), least), most)


def steady(taken: Sequence[float]) -> float:
    """What a step takes, from trials: the first ones take up to twice as long as those of a run."""
    return median_low(taken[len(taken) // 2 :])


def time_to_train(seconds: float, spent: float) -> float:
    """About what is left of a time for training itself; half of it at least.

    Args:
        seconds: the time.
        spent: before training begins.
    """
    return max(seconds / 2.0, (seconds - spent) / (1.0 + SHARE_OF_LOOKS))


def steps_within(
    seconds: float, step: float, look: float, looks: Callable[[int], int], bounds: tuple[int, int]
) -> int:
    """Steps that a time is enough for, with the measurements behind them.

    Args:
        seconds: that are left.
        step: seconds of one.
        look: seconds of a measurement on held-out windows.
        looks: how many of these a run of so many steps has; never fewer in a longer one.
        bounds: steps at the least and at the most.
    """
    least, most = bounds
    enough = bisect_right(range(most + 1), seconds, key=lambda n: n * step + looks(n) * look) - 1
    return max(least, enough)


def steps_for(tokens: float, window: int, windows_a_step: int) -> int:
    """Steps of so many windows that see so many tokens."""
    return max(1, math.ceil(tokens / (window * windows_a_step)))
