"""Learning rates, as they are written and as a weight gets them."""

from dataclasses import dataclass

from ghostlayers.errors import RecipeError
from ghostlayers.runtime.documents import brief

LEAST_SIZE = 1e-3
"""Of a weight's numbers, so that one that is zero can be trained."""


@dataclass(frozen=True)
class Rate:
    """A learning rate: what AdamW changes a number by at most, about.

    Attributes:
        value: in the weight's own unit, or as a share.
        relative: of the mean size of the weight's numbers, as Adafactor has it (arXiv:1804.04235,
            section 8): weights of one model may be ten times as large as another's.
    """

    value: float
    relative: bool = False

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"

    def of(self, size: float) -> float:
        """For a weight whose numbers have this mean size."""
        return self.value * max(size, LEAST_SIZE) if self.relative else self.value

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """Read ``1e-4``, or ``0.05%``.

        Raises:
            RecipeError: no positive number.
        """
        relative = text.strip().endswith("%")
        try:
            value = float(text.strip().removesuffix("%")) / (100 if relative else 1)
        except ValueError:
            value = 0.0
        if not 0 < value < 10:
            raise RecipeError(
                "--learning-rate: expected a positive number such as 1e-4, or a share of the "
                f"weights' size such as 0.05%, got {brief(text)}."
            )
        return cls(value, relative)


LEARNING_RATES = {
    "operator": Rate(0.01, relative=True),
    "norms": Rate(0.0035, relative=True),
    "suffix": Rate(0.0007, relative=True),
    "lora": Rate(0.007, relative=True),
    "all": Rate(0.0007, relative=True),
}
"""Of each part, if nothing else is said: docs/heal.md tells what was measured."""
