"""What a recommendation is asked for, and the comparison that answers it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ghostlayers.compare import Comparison
from ghostlayers.errors import RecipeError, SpanError
from ghostlayers.recipe.checks import read_share
from ghostlayers.runtime.settings import TEXT, WHAT, documented, setting
from ghostlayers.text.corpora import hub_corpus

ENGINES = {"auto": "transformers, vLLM", "auto:llama.cpp": "llama.cpp"}
"""What loads the result of each repair of the comparison."""

SELECT = "recoverable"


@documented
@dataclass(frozen=True)
class Wish:
    """How much less there is to be, and on what text that is measured.

    Beside what can be asked for: ``choices``, further fields of the comparison by name.
    """

    less: tuple[str, ...] = setting(
        ("10%", "20%", "30%"),
        "How many of the decoder layers go, comma-separated shares.",
        WHAT,
        metavar="SHARES",
        read="names",
        says="10%,20%,30%",
    )
    windows: int = setting(64, "Windows for the scores; 32 of them for the repairs.", TEXT, least=1)
    sequence_length: int = setting(512, "Tokens a window.", TEXT, least=2)
    max_windows: int = setting(
        8, "Evaluate the first so many windows of each corpus.", "Evaluation", least=1
    )
    choices: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for share in self.less:
            if not 0 < read_share("less", share) < 1:
                raise RecipeError(f"'less' must lie between 0% and 100%, got '{share}'.")
        if not self.less:
            raise RecipeError("'less' names no share; give one such as 20%.")

    @classmethod
    def of(cls, **given: Any) -> "Wish":
        """From fields of its own and of a comparison.

        Raises:
            RecipeError: a value that means nothing, or no text to calibrate or to measure on.
        """
        own = {member.name for member in dataclasses.fields(cls)} - {"choices"}
        mine = {name: value for name, value in given.items() if name in own}
        wish = cls(**mine, choices={n: v for n, v in given.items() if n not in own})
        wish.comparison(10)  # refuses what no model could be asked
        return wish

    def layers(self, depth: int) -> dict[int, str]:
        """The share that each number of layers stands for, in a model of so many."""
        if depth < 2:
            raise SpanError("a model of one decoder layer has none to spare.")
        counts = {share: round(read_share("less", share) * depth) for share in self.less}
        return {min(depth - 1, max(1, count)): share for share, count in counts.items()}

    def comparison(self, depth: int) -> Comparison:
        """The comparison that answers it for a model of so many decoder layers.

        Raises:
            RecipeError: no text to calibrate or to measure on; or see `Comparison`.
        """
        data = self.choices.get("data")
        if data is None:
            raise RecipeError(
                "no calibration text: give --data a file of yours, or a corpus name (c4)."
            )
        evaluated = self.choices.get("eval_data") or ((data,) if hub_corpus(data) else ())
        if not evaluated:
            raise RecipeError(
                f"nothing to measure on: of '{data}' there is no second part that the repairs do "
                "not see. Give --eval-data another text."
            )
        return Comparison.from_dict(
            {
                "yardstick": False,
                "prompt": "",
                **self.choices,
                "layers": tuple(self.layers(depth)),
                "select": (SELECT,),
                "repair": tuple(ENGINES),
                "eval_data": tuple(evaluated),
                "max_windows": self.max_windows,
                "windows": self.windows,
                "sequence_length": self.sequence_length,
            }
        )
