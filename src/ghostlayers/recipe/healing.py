"""How a cut model is trained: `HealingRecipe`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.recipe.checks import check_bounds, check_keys, check_types
from ghostlayers.recipe.healing_amounts import read_amount, read_budget, read_mix, read_rates
from ghostlayers.recipe.healing_presets import HEALING_PRESETS, find_healing_preset
from ghostlayers.runtime.documents import brief
from ghostlayers.runtime.settings import TEXT, documented, setting, write_numbers
from ghostlayers.text.tokens import BosPolicy

if TYPE_CHECKING:
    from ghostlayers.recipe.recipe import Recipe

Loss = Literal["kl", "ce", "kl+ce"]

HEALING = "Training"
"""The group of these settings in help."""

PARTS = ("operator", "norms", "suffix", "lora", "all")
"""What can be trained."""

LEARNING_RATES = {"operator": 3e-4, "norms": 1e-3, "suffix": 1e-4, "lora": 1e-3, "all": 1e-4}
"""Of each part at the most, if nothing else is said; see `healing.rates`."""

OWN = "@dense"
"""The corpus that the dense model writes itself, behind beginnings of the others."""

DEFAULT_MINUTES = 5.0
MOST_MINUTES = 1_000_000

HELD_OUT_WINDOWS = 32
"""Windows that a merge measures on, and that a plan counts with, if nothing else is said."""

WINDOW = 256
"""Tokens of a window, if nothing else is said: short ones bring more subjects into a budget."""

WHAT_IS_TRAINED = (
    "operator, the repair itself (or the weights that it was folded into); norms, the gains behind "
    "the first cut; suffix, every weight behind the first cut; all, every decoder layer; lora, "
    "adapters on the projections of every decoder layer"
)


@documented
@dataclass(frozen=True)
class HealingRecipe:
    """What of a cut model is trained, for how long, and on what text."""

    train: str | None = setting(
        None,
        f"What is trained: {WHAT_IS_TRAINED}. Several are joined by a plus: operator+norms.",
        HEALING,
        metavar="PARTS",
        says="operator+norms+all; lora or suffix for all, or none, where it takes half of memory",
    )
    tokens: str | None = setting(
        None, "Train on so many tokens: 25000, 400k, 1M.", HEALING, metavar="N", number=True
    )
    minutes: float | None = setting(
        None,
        "Train for so many minutes, measurements included; some steps are timed first, and half "
        "of the time at least is for training.",
        HEALING,
        says=f"{DEFAULT_MINUTES:g}, unless --tokens is given",
    )
    loss: Loss = setting(
        "kl",
        "What is made small: 'kl', the divergence from the dense model's whole distribution; 'ce', "
        "the loss of the true next token; or the sum of both.",
        HEALING,
    )
    learning_rate: str | None = setting(
        None,
        "At its highest, for all that is trained, or by part: operator=1e-4,norms=1e-3.",
        HEALING,
        metavar="RATE",
        number=True,
        says=", ".join(f"{part} {rate:g}" for part, rate in LEARNING_RATES.items())
        + "; less where a step of that goes too far for the model",
    )
    positions: float | None = setting(
        None,
        "Share of the positions of every window that the loss is taken at, drawn anew for each.",
        HEALING,
        says="a quarter where the head would take more than half of the time, else all",
    )
    rank: int = setting(16, "Of the adapters of 'lora'.", HEALING, least=1)
    step_tokens: int | None = setting(
        None, "Tokens a step.", HEALING, least=2, says="256, and more from 200,000 tokens on"
    )
    modules: str | None = setting(
        None,
        "Projections that 'lora' adapts, by their own names.",
        HEALING,
        metavar="NAMES",
        says="all of the decoder layers",
    )
    preset: str | None = setting(
        None,
        f"A published way to train: {', '.join(HEALING_PRESETS)}. What else is given wins.",
        HEALING,
        metavar="NAME",
    )
    completions: bool = setting(
        False,
        "Of chats, train on the answer alone: the last turn, where it is the model's. Other text "
        "counts as a whole.",
        HEALING,
        says="off: all tokens",
        off="--no-completions",
    )
    cache: str | None = setting(
        None,
        "Disk that may hold what the dense model says of windows which are gone through again: "
        "8GiB. Where that is too little it is computed again.",
        HEALING,
        metavar="SIZE",
        says="half of what is free",
    )
    data: str | None = setting(
        None,
        "Training text: corpora as for prune, several with their shares: c4:0.7,mine.jsonl:0.3. "
        "Chats go through the model's template. The share of @dense is written by the dense model "
        "before training, behind beginnings of the others: @dense:0.5,c4:0.5.",
        TEXT,
        short="-d",
    )
    held_out: str | None = setting(
        None,
        "Another text, on which the model is measured before, on the way and at the end; its best "
        "state there is kept.",
        TEXT,
        says="windows of the training text that are not trained on",
    )
    held_out_windows: int | None = setting(
        None,
        "Windows of it.",
        TEXT,
        least=1,
        says="as many as a tenth of the training's time pays for, 8 to 64; 32 to merge",
    )
    text_column: str | None = setting(
        None,
        "Column that holds the text.",
        TEXT,
        says="text, else a chat, else the only column of strings that are no identifiers",
    )
    separator: str = setting(
        "\n\n", r"Joins documents; \n is a line break.", TEXT, says="a blank line", read="separator"
    )
    sequence_length: int = setting(WINDOW, "Tokens a window.", TEXT)
    bos: BosPolicy = setting("auto", "BOS before each window; 'auto' asks the tokenizer.", TEXT)
    seed: int = setting(0, "Chooses windows, their order, and positions.", TEXT)

    def __post_init__(self) -> None:
        write_numbers(self)
        check_types(self)
        self._check_numbers()
        if self.tokens is not None and self.minutes is not None:
            raise RecipeError("give either --tokens or --minutes, not both.")
        _ = self.rates, self.num_tokens, self.mix  # each refuses what means nothing
        if self.parts is not None:
            self.check_trained(self.parts)
        names = [name for name, _ in self.mix]
        if names.count(OWN) > 1 or names == [OWN]:
            raise RecipeError(
                f"--data {brief(self.data)}: {OWN} stands once, beside corpora whose beginnings "
                f"the dense model continues: {OWN}:0.5,c4:0.5."
            )
        if self.preset is not None:
            find_healing_preset(self.preset)

    def _check_numbers(self) -> None:
        share = self.positions
        if share is not None and not 0 < share <= 1:
            raise RecipeError(f"'positions' must lie above 0 and up to 1, got {share:g}.")
        if self.minutes is not None and not 0 < self.minutes < MOST_MINUTES:
            raise RecipeError(
                f"'minutes' must lie above 0 and below {MOST_MINUTES:,}, got {self.minutes:g}."
            )
        least = {"rank": 1, "step_tokens": 2, "held_out_windows": 1, "sequence_length": 2}
        check_bounds(self, least)

    @property
    def parts(self) -> tuple[str, ...] | None:
        """What is trained, in the order of `PARTS`; None to choose.

        Raises:
            RecipeError: an unknown part, or two that are one in the other.
        """
        if self.train is None:
            return None
        named = [part.strip() for part in self.train.split("+")]
        for part in named:
            if part not in PARTS:
                raise RecipeError(f"--train: nothing is called '{part}'. {suggest(part, PARTS)}")
        if len(set(named)) < len(named):
            raise RecipeError(f"--train {self.train} names a part twice.")
        if {"all", "lora"} <= set(named):
            raise RecipeError(
                f"--train {self.train}: 'lora' puts adapters on the weights that 'all' trains; "
                "leave one of the two out."
            )
        return tuple(part for part in PARTS if part in named)

    def check_trained(self, parts: Sequence[str]) -> None:
        """Refuse what is said of parts that are not trained: it would change nothing.

        Args:
            parts: what is trained.

        Raises:
            RecipeError: a learning rate or ``modules`` of another part.
        """
        trained = "+".join(parts)
        for part in self._named_rates():
            if part and part not in parts:
                raise RecipeError(
                    f"--learning-rate: a rate for '{part}', but what is trained is {trained}. "
                    f"Leave that rate out, or add {part} to --train."
                )
        for name in ("modules", "rank") if self.preset is None and "lora" not in parts else ():
            if getattr(self, name) != getattr(HealingRecipe, name):
                raise RecipeError(
                    f"--{name} is said of the adapters of 'lora', but what is trained is "
                    f"{trained}. Leave it out, or give --train lora."
                )

    @property
    def num_tokens(self) -> int | None:
        """The budget in tokens; None if it is one of time.

        Raises:
            RecipeError: it is no amount.
        """
        return None if self.tokens is None else read_amount(self.tokens)

    @property
    def seconds(self) -> float | None:
        """The budget in seconds; None if it is one of tokens."""
        if self.tokens is not None:
            return None
        return 60.0 * (DEFAULT_MINUTES if self.minutes is None else self.minutes)

    @property
    def rates(self) -> Mapping[str, float]:
        """The highest learning rate of each part: as it is told, or by default at the most."""
        return {**LEARNING_RATES, **self.told_rates}

    @property
    def told_rates(self) -> Mapping[str, float]:
        """Learning rates that were given, by part; one without a part is that of all others.

        Raises:
            RecipeError: an unknown part, or no positive number.
        """
        rates = self._named_rates()
        others = dict.fromkeys(PARTS, rates.pop("")) if "" in rates else {}
        return {**others, **rates}

    def _named_rates(self) -> dict[str, float]:
        """Learning rates by part, as they were given; that without one under the empty name."""
        return {} if self.learning_rate is None else read_rates(self.learning_rate, PARTS)

    @property
    def mix(self) -> tuple[tuple[str, float], ...]:
        """Corpora and their shares, which add up to one; empty if no text is named.

        Raises:
            RecipeError: a share is no positive number, or only some have one.
        """
        return () if self.data is None else read_mix(self.data)

    @property
    def num_held_out_windows(self) -> int:
        """Windows to measure on, where no length of training says more of it."""
        return HELD_OUT_WINDOWS if self.held_out_windows is None else self.held_out_windows

    @property
    def writes(self) -> bool:
        """Whether the dense model is to write some of the text."""
        return any(name == OWN for name, _ in self.mix)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HealingRecipe":
        """A recipe from a mapping such as a YAML file's; a ``preset`` fills in what is not given.

        Raises:
            RecipeError: an unknown key or preset; the message names near ones.
        """
        if values.get("preset") is not None:
            values = {**find_healing_preset(values["preset"]).choices, **values}
        check_keys(cls, values, "for healing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)

    def changed(self, choices: Mapping[str, Any]) -> "HealingRecipe":
        """With some fields replaced; of a preset among them, what is not chosen here either.

        Raises:
            RecipeError: an unknown field, value or preset.
        """
        base = self.to_dict()
        if choices.get("preset") is not None:
            plain = HealingRecipe().to_dict()
            base = {name: value for name, value in base.items() if value != plain[name]}
        return HealingRecipe.from_dict({**base, **choices})


def healing_after(budget: str, recipe: "Recipe") -> HealingRecipe:
    """How a model that a recipe made is trained for a budget: on its calibration text.

    Its windows are as long as those of the recipe at most, which the model has positions for.

    Raises:
        RecipeError: no budget.
    """
    same = ("data", "text_column", "separator", "bos", "seed")
    settings = {name: getattr(recipe, name) for name in same}
    length = min(WINDOW, recipe.sequence_length)
    return HealingRecipe(**read_budget(budget), **settings, sequence_length=length)
