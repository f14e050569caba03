"""The kinds of faults, each a function from an empty place to a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from faults.kinds import (
    canaries,
    configs,
    disks,
    gguf_files,
    interruptions,
    machines,
    numbers,
    paths,
    recipes,
    records,
    texts,
    tokenizer_files,
    weights,
)
from faults.materials import Place


@dataclass(frozen=True)
class Family:
    """A kind of faults.

    Attributes:
        make: from a place and a number, which together with the seed says all.
        weight: its share of a campaign.
        most: where there are no more of them.
    """

    make: Callable[[Place, int], Any]
    weight: float
    most: int | None = None

    def count(self, wanted: int) -> int:
        """How many of them to try."""
        return wanted if self.most is None else min(wanted, self.most)


FAMILIES = {
    "weights": Family(weights.make, 6),
    "configs": Family(configs.make, 6),
    "GGUF files": Family(gguf_files.make, 5),
    "tokenizers": Family(tokenizer_files.make, 2),
    "texts": Family(texts.make, 3),
    "records": Family(records.make, 4),
    "recipes": Family(recipes.make, 2),
    "numbers": Family(numbers.make, 3),
    "paths": Family(paths.make, 1, len(paths.RELATIONS)),
    "kills": Family(interruptions.make, 4),
    "two at once": Family(interruptions.together, 0.5),
    "full disks": Family(disks.make, 3),
    "environment": Family(machines.make, 0.6),
    "code": Family(canaries.make, 4, canaries.COUNT),
}
