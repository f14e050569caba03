"""The one door for weights: what the files hold against what the model's class wants.

transformers makes up at random what no file has, drops what its class does not use, and says so in
a report that nobody reads. Here the two are compared by name and shape, both ways, before anything
is computed: all of what the files hold is computed with, and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ghostlayers.errors import ModelError
from ghostlayers.model.tensor_files import Held
from ghostlayers.modeling import some

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADS = ("score.", "classifier.", "qa_outputs.", "v_head.", "reward_head.", "value_head.", "cls.")
"""Beginnings of names that other heads than a language model's have."""


@dataclass(frozen=True)
class Findings:
    """How the files of a model and its class differ, as transformers found it.

    Attributes:
        missing: names that the class wants and no file has.
        unused: names that the files have and the class does not use.
        misshapen: name, shape in the file, shape in the class.
    """

    missing: list[str]
    unused: list[str]
    misshapen: tuple[tuple[str, Any, Any], ...]

    @classmethod
    def of(cls, model: nn.Module, info: Mapping[str, Any], held: Mapping[str, Held]) -> "Findings":
        """From what ``from_pretrained(..., output_loading_info=True)`` returns.

        It does not look at the shapes of what stays on disk until it is needed, and takes one of
        two names that mean one weight, with the prefix of the base model and without, unsaid.
        """
        shapes = {(name, tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]}
        for name, tensor in model.named_parameters():
            if tensor.is_meta and name in held and held[name].shape != tensor.shape:
                shapes.add((name, tuple(held[name].shape), tuple(tensor.shape)))
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        twice = {name for name in held if prefix != "." and f"{prefix}{name}" in held}
        unused = sorted({*info["unexpected_keys"], *twice})
        return cls(sorted(info["missing_keys"]), unused, tuple(sorted(shapes)))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unused or self.misshapen)


def check_whole(
    name: str, model: "PreTrainedModel", findings: Findings, held: Mapping[str, Held]
) -> None:
    """Refuse a model that is not all of what its files hold, or more.

    Args:
        name: of the model, as the caller gave it.
        model: as it was loaded.
        findings: what transformers found.
        held: what the files hold.

    Raises:
        ModelError: with the names, the likely reason and the way out.
    """
    if not findings:
        return
    parts = []
    if findings.missing:
        parts.append(f"{type(model).__name__} wants {some(findings.missing)}, which no file has")
    if findings.unused:
        parts.append(f"the files hold {some(findings.unused)}, which the class does not use")
    if findings.misshapen:
        tensor, there, wanted = findings.misshapen[0]
        more = len(findings.misshapen) - 1
        also = f" (and {more} more)" if more else ""
        parts.append(f"'{tensor}' is {_shape(there)} in the file, {_shape(wanted)} wanted{also}")
    raise ModelError(
        f"'{name}' is not whole: {'; '.join(parts)}. {_reason(model.config, findings, held)}"
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _reason(config: "PretrainedConfig", findings: Findings, held: Mapping[str, Held]) -> str:
    """Why they differ, most likely, and what to do."""
    unused, missing = findings.unused, findings.missing
    if any("repair_before_" in name or "repair_after_" in name for name in unused):
        return (
            "The files hold the operators of a repaired checkpoint, but config.json no longer says "
            "so: it was edited. Get the folder again, or make it again."
        )
    if any(name.startswith(HEADS) for name in unused):
        return (
            "It has another head than a language model's (a classifier, a reward model, ...). "
            "Start from the causal language model that it was made of."
        )
    prefix = _common_prefix(findings)
    if prefix is not None:
        return (
            f"Every name in the files begins with '{prefix}', as a wrapper leaves it when its "
            "state is saved instead of the model's. Save the model itself again (with "
            "save_pretrained on the unwrapped or merged model)."
        )
    if missing and not unused and all("expert" in name for name in missing):
        return "Experts were lost, perhaps in a merge or a conversion. Get the model again."
    depths = _depths(config, missing, unused)
    if depths is not None:
        return (
            f"config.json says {depths[0]} decoder layers, the files hold {depths[1]}: one of the "
            "two was edited. Make them agree, or get the model again."
        )
    if missing and not unused and all("head" in name or "embed_out" in name for name in missing):
        return (
            "By config.json the head is not the embedding, but the files have none of its own. If "
            "it is, set tie_word_embeddings to true there; else get the model again."
        )
    if held and len(missing) > len(held) // 2:
        kind = getattr(config, "model_type", "?")
        return (
            f"The files are of another family or another class than config.json says ('{kind}', "
            f"{_told_class(config)}). Put the config.json beside them that they were saved with."
        )
    if findings.misshapen and not (missing or unused):
        return "The files and config.json are not of one model. Get both again."
    return (
        "A file is damaged, of another model, or was edited; made-up numbers would take the place "
        "of what is missing. Get the model again."
    )


def _told_class(config: "PretrainedConfig") -> str:
    return ", ".join(getattr(config, "architectures", None) or ["no class"])


def _common_prefix(findings: Findings) -> str | None:
    """What a wrapper put before every name: without it, the names are those that are missing."""
    missing, unused = set(findings.missing), findings.unused
    if not unused:
        return None
    parts = unused[0].split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        plain = [name.removeprefix(prefix) for name in unused if name.startswith(prefix)]
        matches = sum(name in missing or f"model.{name}" in missing for name in plain)
        if matches > len(unused) // 2:
            return prefix
    return None


def _depths(
    config: "PretrainedConfig", missing: Sequence[str], unused: Sequence[str]
) -> tuple[int, int] | None:
    """Decoder layers in the config and in the files, if whole layers are all that differs."""
    count = getattr(config, "num_hidden_layers", None)
    numbers = [_layer_of(name) for name in (*missing, *unused)]
    if not isinstance(count, int) or None in numbers or bool(missing) == bool(unused):
        return None
    whole = {number for number in numbers if number is not None}
    there = max(whole) + 1 if unused else min(whole)
    ends = min(whole) == count if unused else max(whole) == count - 1 and there > 0
    return (count, there) if ends else None


def _layer_of(name: str) -> int | None:
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return None if match is None else int(match[1])
