"""What a budget came to: the number of layers, why, and what was foreseen of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ghostlayers.runtime.sizes import show_bytes


@dataclass(frozen=True)
class Decision:
    """The number of layers that a budget asks for.

    Attributes:
        asked: the budget, as one would type it.
        layers: how many go; 0 where that is still to be found.
        says: what was counted or measured, what is foreseen, and what else was seen; sentences.
        figures: the same as numbers, for records.
        instead: a type in which the whole model would meet the budget, and its bytes.
        alternative: what that would do to the loss, once it is measured.
    """

    asked: str
    layers: int
    says: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    instead: tuple[str, float] | None = None
    alternative: Mapping[str, Any] | None = None

    @property
    def counted(self) -> str:
        """What was: weights, memory, seconds, loss."""
        return str(self.figures.get("counted", ""))

    @property
    def quantising(self) -> str | None:
        """What quantising does instead, where that loses less; None otherwise."""
        other = self.alternative
        if other is None or not other["loss_nats"] < other["cut_loss_nats"]:
            return None
        return (
            f"Quantising meets this budget at less loss: {other['type'].upper()} takes "
            f"{show_bytes(other['bytes'])} in all and has a loss of {other['loss_nats']:.3f} on "
            f"the same {other['windows']} windows, this result {other['cut_loss_nats']:.3f}. "
            "(Rounded by the gguf library.)"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for records."""
        return {
            "asked": self.asked,
            "layers": self.layers,
            "said": list(self.says),
            **self.figures,
            "quantising": None if self.alternative is None else dict(self.alternative),
        }
