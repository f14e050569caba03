"""Published ways to train after a cut: choices of a `HealingRecipe`, any of which may be others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghostlayers.errors import RecipeError, suggest


@dataclass(frozen=True)
class HealingPreset:
    """What a publication trains, and how.

    Attributes:
        title: what the method is called.
        paper: its number on arXiv.
        choices: fields of a recipe by name.
        differs: what is not as there.
    """

    title: str
    paper: str
    choices: Mapping[str, Any]
    differs: str


HEALING_PRESETS: Mapping[str, HealingPreset] = {
    "self-data-distillation": HealingPreset(
        "Self-Data Distillation",
        "2410.09982",
        {
            "train": "lora",
            "rank": 8,
            "modules": "q_proj,v_proj",
            "learning_rate": "1e-4",
            "loss": "ce",
            "completions": True,
            "positions": 1.0,
            "sequence_length": 512,
        },
        "no code is public; rank, projections and rate are those of the method that it builds on "
        "(arXiv:2402.13669), and chats are packed into windows. The data are not chosen here: "
        "`ghostlayers write-data` makes them",
    ),
}
"""By name."""


def find_healing_preset(name: Any) -> HealingPreset:
    """The preset of this name.

    Raises:
        RecipeError: there is none; the message lists them.
    """
    if name not in HEALING_PRESETS:
        known = suggest(str(name), HEALING_PRESETS)
        raise RecipeError(f"no preset for training is called '{str(name)[:60]}'. {known}")
    return HEALING_PRESETS[name]
