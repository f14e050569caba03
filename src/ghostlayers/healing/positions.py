"""Which positions of a window are learnt from."""

from typing import Any

import torch
from torch import Tensor


def positions_of(length: int, share: float) -> int:
    """How many positions of a window are learnt from."""
    return max(1, round(share * (length - 1)))


def draw_positions(numbers: Any, length: int, share: float, seed: int) -> Tensor:
    """Positions of some windows that are learnt from, in order, drawn by the window's number.

    Args:
        numbers: of the windows in the order of training; of a repeated one, its first.
        length: tokens of a window; the last one predicts nothing.
        share: of the positions.
        seed: of the run.

    Returns:
        [windows, positions].
    """
    count, rows = positions_of(length, share), []
    for number in numbers:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        rows.append(torch.randperm(length - 1, generator=generator)[:count].sort().values)
    return torch.stack(rows)


def weights_at(counts: Tensor | None, positions: Tensor) -> Tensor | None:
    """Weights of positions: one where the token that they predict counts, else none.

    Args:
        counts: of every token, [windows, sequence]; None where all count.
        positions: of every window, [windows, positions].
    """
    return None if counts is None else counts.gather(1, positions + 1).float()
