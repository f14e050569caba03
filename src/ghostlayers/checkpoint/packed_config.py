"""What a config says of packed modules by name, after layers went.

Lists name modules in full, by a part of their names, or by a pattern; a reader knows what they mean
only together with the modules that there are. So an entry stays as it is where it means the
modules that it meant before; where a number makes it mean others, those modules are named instead.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghostlayers.model.library_layouts import names

SKIPPED = {
    "awq": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
}
"""The list of what is not packed."""

OWN_DEFAULTS = ("fp8", "mxfp4", "bitsandbytes")
"""Formats whose readers leave some modules plain unasked, unless there is such a list."""

Moved = Mapping[str, str | None]


@dataclass(frozen=True)
class Renaming:
    """How names change where layers went.

    Attributes:
        before: what stands before a layer's number.
        after: and what will.
        layers: the new number of every layer that stays.
    """

    before: str
    after: str
    layers: Mapping[int, int]

    def applies(self, name: str) -> bool:
        """Whether a name is that of a layer, or lies in one."""
        return self._parse(name) is not None

    def __call__(self, name: str) -> str | None:
        """The new name; None if its layer went."""
        match = self._parse(name)
        if match is None:
            return name
        number = self.layers.get(int(match[1]))
        return None if number is None else f"{self.after}.{number}{match[2]}"

    def _parse(self, name: str) -> re.Match[str] | None:
        return re.match(rf"{re.escape(self.before)}\.(\d+)((?:\..*)?)$", name)


def renumbered(
    settings: Mapping[str, Any],
    method: str,
    moved: Moved,
    left: Sequence[str],
    plain: Sequence[str],
) -> dict[str, Any]:
    """A ``quantization_config`` that says of the modules that there are what it said of the base's.

    Args:
        settings: the base's.
        method: its format.
        moved: what every module of the base is called now; None if it went.
        left: modules that were packed and are plain now, by their new names.
        plain: linear modules that are plain in the base, by their old names.
    """
    changed = dict(settings)
    if method == "compressed-tensors":
        return changed | _compressed(changed, moved, left)
    if method == "gptq":
        dynamic = _dynamic(settings.get("dynamic") or {}, moved, left)
        return changed | ({"dynamic": dynamic} if dynamic else {})
    entry = SKIPPED[method]
    listed = settings.get(entry)
    if listed is None and not left:
        return changed
    if listed is None:
        listed = plain if method in OWN_DEFAULTS else []
    return changed | {entry: [*_rewritten(listed, covers, moved), *left]}


def covers(entry: str, module: str) -> bool:
    """Whether an entry of transformers' lists is a module's name, its start, its end, a pattern."""
    try:
        start = re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)
    except re.error:
        start = None
    return start is not None or module.endswith(entry)


def _rewritten(
    entries: Iterable[str], means: Callable[[str, str], bool], moved: Moved
) -> list[str]:
    """Entries of a list that mean the modules that they meant."""
    names: list[str] = []
    for entry in entries:
        names += [entry] if _means_the_same(entry, means, moved) else _meant(entry, means, moved)
    return list(dict.fromkeys(names))


def _means_the_same(entry: str, means: Callable[[str, str], bool], moved: Moved) -> bool:
    before = any(means(entry, old) for old in moved)
    now = {new for new in moved.values() if new is not None and means(entry, new)}
    return (bool(now) or not before) and now == set(_meant(entry, means, moved))


def _meant(entry: str, means: Callable[[str, str], bool], moved: Moved) -> list[str]:
    """The modules that stay of those that an entry means, by their new names."""
    return sorted(new for old, new in moved.items() if new is not None and means(entry, old))


def _compressed(settings: Mapping[str, Any], moved: Moved, left: Collection[str]) -> dict[str, Any]:
    groups = {
        name: group | {"targets": targets}
        for name, group in settings.get("config_groups", {}).items()
        if (targets := _rewritten(group["targets"], names, moved))
    }
    ignored = _rewritten(settings.get("ignore") or [], names, moved)
    return {"config_groups": groups, "ignore": [*dict.fromkeys([*ignored, *left])]}


def _dynamic(rules: Mapping[str, Any], moved: Moved, left: Iterable[str]) -> dict[str, Any]:
    """GPTQ's exceptions: the first pattern of a module's name counts; ``-:`` leaves it plain."""
    patterns: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in left}

    def means(pattern: str, module: str) -> bool:
        return re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, module) is not None

    for pattern, changes in rules.items():
        if _means_the_same(pattern, means, moved):
            patterns[pattern] = changes
        elif meant := _meant(pattern, means, moved):
            sign = pattern[:2] if pattern[:2] in ("+:", "-:") else ""
            patterns[f"{sign}^(?:{'|'.join(map(re.escape, meant))})$"] = changes
    return patterns
