"""Methods as their authors run them: every choice of a publication and its released code at once.

A preset is data: a YAML file in ``preset_files``, one a method. `Preset.choices` are fields of a
`Recipe`, any of which the caller may choose otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.runtime.documents import brief, check, parse_yaml, shape_of


@dataclass(frozen=True)
class Preset:
    """What a method's authors choose.

    Attributes:
        name: as on the command line.
        title: what the method is called.
        paper: its number on arXiv.
        code: the released code, and the state of it that was read.
        choices: fields of a recipe by name.
        dtype: the type that their code computes in; ``auto`` for the checkpoint's.
        nearest: the preset to take where a model has not what this one needs.
        differs: what is not as in their code, each with the reason.
        also: other names of it.
    """

    name: str
    title: str
    paper: str
    code: str
    choices: Mapping[str, Any]
    dtype: str
    nearest: str = "ghosted"
    differs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Any) -> "Preset":
        """From a file's content.

        Raises:
            RecipeError: a key is missing or unknown, or of another type.
        """
        known = {member.name for member in fields(cls)}
        if not isinstance(values, dict) or not {*values} <= known:
            raise RecipeError(
                f"a preset has the keys {', '.join(sorted(known))}; got {brief(values)}."
            )
        missing = {"name", "title", "paper", "code", "choices", "dtype"} - {*values}
        if missing:
            raise RecipeError(f"a preset lacks {', '.join(sorted(missing))}.")
        said: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if value is not None
        }
        check(said, shape_of(cls), f"preset '{brief(values['name'])}'", RecipeError)
        return cls(**said)


def _read() -> dict[str, Preset]:
    presets = {}
    for file in (files(__package__) / "preset_files").iterdir():
        if file.name.endswith(".yaml"):
            preset = Preset.from_dict(parse_yaml(file.read_text("utf-8"), file.name, RecipeError))
            presets[preset.name] = preset
    return dict(sorted(presets.items()))


PRESETS: Mapping[str, Preset] = _read()
"""Every preset by its own name."""


def find_preset(name: Any) -> Preset:
    """The preset of this name, or of which it is another name.

    Raises:
        RecipeError: there is none; the message lists them.
    """
    names = {also: preset for preset in PRESETS.values() for also in (preset.name, *preset.also)}
    if not isinstance(name, str) or name not in names:
        raise RecipeError(f"unknown preset '{str(name)[:60]}'. {suggest(str(name), names)}")
    return names[name]
