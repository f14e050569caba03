"""The one door for weights: what the files hold against what the model's class wants.

transformers makes up at random what no file has, drops what its class does not use, and says so in
a report that nobody reads. Here the two are compared by name and shape, both ways, before anything
is computed: all of what the files hold is computed with, and nothing else.

Every tensor remembers the type that its file has, which need not be the type it is computed in: a
new checkpoint holds it as the old one did.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.errors import ModelError
from ghostlayers.runtime.files import while_unchanged

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of plain weights by their names in a safetensors header."""

SHOWN = 3
"""Names of tensors that a message tells."""

MARK = "ghostlayers_stored"
"""The attribute under which a tensor remembers what its file holds."""


@dataclass(frozen=True)
class Held:
    """A tensor in a file.

    Attributes:
        file: where.
        name: under which name.
        dtype: of its numbers; None for what are no plain weights.
        shape: as the file has it.
        written: what its file calls the type.
    """

    file: Path
    name: str
    dtype: torch.dtype | None
    shape: torch.Size
    written: str = ""

    @property
    def bytes(self) -> int:
        """That it takes, about."""
        return self.shape.numel() * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True)
class Findings:
    """How the files of a model and its class differ, as transformers found it.

    Attributes:
        missing: names that the class wants and no file has.
        unused: names that the files have and the class does not use.
        misshapen: name, shape in the file, shape in the class.
    """

    missing: tuple[str, ...]
    unused: tuple[str, ...]
    misshapen: tuple[tuple[str, Any, Any], ...]

    @classmethod
    def of(cls, model: nn.Module, info: Mapping[str, Any], held: Mapping[str, Held]) -> "Findings":
        """From what ``from_pretrained(..., output_loading_info=True)`` returns.

        It does not look at the shapes of what stays on disk until it is needed.
        """
        shapes = {(name, tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]}
        for name, tensor in model.named_parameters():
            if tensor.is_meta and name in held and held[name].shape != tensor.shape:
                shapes.add((name, tuple(held[name].shape), tuple(tensor.shape)))
        unused = tuple(sorted(info["unexpected_keys"]))
        return cls(tuple(sorted(info["missing_keys"])), unused, tuple(sorted(shapes)))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unused or self.misshapen)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from; none where there are no such files.

    Raises:
        ModelError: the index of several files is damaged, one of them is missing, or there is one
            file beside the several.
    """
    one, index = folder / ONE_FILE, folder / INDEX
    if not index.is_file():
        return [one] if one.is_file() else []
    files = [folder / name for name in sorted(set(_places(index).values()))]
    missing = [each.name for each in files if not each.is_file()]
    if missing:
        raise ModelError(f"'{folder}' lacks {_some(missing)}, which {INDEX} names. Get it again.")
    if one.is_file() and files != [one]:
        raise ModelError(
            f"'{folder}' holds two sets of weights: {ONE_FILE}, and the files that {INDEX} names. "
            "Readers differ in which they take: move one of the two away."
        )
    return files


def _places(index: Path) -> dict[str, str]:
    """Which file of the folder holds which tensor, as an index says."""
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if all(Path(name).name == name for name in places.values()):
            return places
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(_damaged(index)) from error
    raise ModelError(_damaged(index))


def _damaged(index: Path) -> str:
    return (
        f"'{index}' is damaged: expected 'weight_map' with a file of the same folder for every "
        "tensor. Get it again."
    )


def held_in(folder: Path) -> dict[str, Held]:
    """What a model's folder holds, by name.

    Raises:
        ModelError: see `weight_files`; or a tensor lies elsewhere than the index says, or twice.
    """
    held = held_tensors(weight_files(folder))
    index = folder / INDEX
    for name, place in _places(index).items() if index.is_file() else ():
        found = held.get(name)
        if found is not None and found.file.name != place:
            raise ModelError(
                f"'{folder}' is not whole: {INDEX} says that '{name}' lies in {place}, but "
                f"{found.file.name} holds it. Get the folder again."
            )
    return held


def held_tensors(files: Sequence[Path]) -> dict[str, Held]:
    """What safetensors files hold, by name, from their headers alone.

    Raises:
        ModelError: two of them hold a tensor of one name.
    """
    from safetensors import safe_open

    found: dict[str, Held] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise ModelError(
                        f"'{path.parent}' holds '{name}' twice, in {found[name].file.name} and "
                        f"{path.name}, and which counts depends on the reader. Get it again."
                    )
                part = file.get_slice(name)
                kind = TYPES.get(part.get_dtype())
                shape = torch.Size(part.get_shape())
                found[name] = Held(path, name, kind, shape, part.get_dtype())
    return found


def main_type(held: Iterable[Held]) -> torch.dtype | None:
    """The type that most bytes of plain weights have; None where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for each in held:
        if each.dtype is not None:
            sizes[each.dtype] += each.bytes
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None


def remember_types(model: Any, held: Mapping[str, Held], main: torch.dtype) -> None:
    """Let tensors remember their files: those of another type than most, and rounded ones.

    Raises:
        ModelError: a file holds packed numbers or integers where the model has plain ones.
    """
    ends = Counter(map(_unprefixed, held))
    by_end = {end: each for n, each in held.items() if ends[end := _unprefixed(n)] == 1}
    for name, tensor in _tensors(model):
        found = held.get(name) or by_end.get(_unprefixed(name))
        pieces = (found,) if found else _pieces(model, name, tensor, held)
        if tensor.is_floating_point():
            _check_plain(pieces)
        if any(_differs(each, main, tensor.dtype) for each in pieces):
            setattr(tensor, MARK, found or pieces)


def _check_plain(pieces: Iterable[Held]) -> None:
    for each in pieces:
        if each.dtype is None:
            raise ModelError(
                f"'{each.file}' holds '{each.name}' in {each.written}, but config.json names no "
                f"quantisation: expected one of {', '.join(TYPES)}. Numbers in any other type "
                "mean nothing without their scales. Get the model again, or start from the one "
                "that was quantised."
            )


def _pieces(model: Any, name: str, tensor: Tensor, held: Mapping[str, Held]) -> tuple[Held, ...]:
    """The tensors that one was made of under other names; none if that is not known."""
    found = [held.get(each) for each in names_in_file(model, name, tensor)]
    return tuple(each for each in found if each) if all(found) else ()


def names_in_file(model: Any, name: str, tensor: Tensor) -> list[str]:
    """Under which names transformers writes a tensor, packed experts one by one; in their order."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return list(revert_weight_conversion(model, {name: tensor.detach().to("meta")}))
    except (KeyError, ValueError, RuntimeError):  # it is written together with others only
        return [name]


def _differs(held: Held, main: torch.dtype, computed: torch.dtype) -> bool:
    return held.dtype is not None and (held.dtype != main or _rounds(held.dtype, computed))


def remember_own_types(model: Any) -> None:
    """Let the tensors of a model in memory keep their types, where they differ from most."""
    for name, tensor in _tensors(model):
        if tensor.is_floating_point() and tensor.dtype != model.dtype:
            setattr(tensor, MARK, Held(Path(), name, tensor.dtype, tensor.shape))


def _rounds(stored: torch.dtype, computed: torch.dtype) -> bool:
    """Whether a type lacks digits of another."""
    return torch.promote_types(stored, computed) != computed


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _unprefixed(name: str) -> str:
    """A name from its layer's number on: what is before it differs between classes."""
    return re.sub(r"^.*?(?=\b\d+\.)", "", name, count=1)


def stored_type(tensor: Tensor, main: torch.dtype) -> torch.dtype:
    """The type that a tensor's file has; main, if that has pieces of several."""
    held: Held | tuple[Held, ...] | None = getattr(tensor, MARK, None)
    kinds = {each.dtype for each in (held if isinstance(held, tuple) else (held,)) if each}
    found = kinds.pop() if len(kinds) == 1 else None
    return found or main


def in_pieces(model: Any, state: Mapping[str, Tensor], main: torch.dtype) -> dict[str, Held]:
    """What must be copied from the base's files, by its name in those that transformers writes.

    Experts that are packed in memory lie in a file one by one, each in its own type; and a tensor
    that is written under another name may be turned over on the way.

    Args:
        model: about to be saved.
        state: its tensors, which remember their files.
        main: the type that most of its weights are stored in.
    """
    found: dict[str, Held] = {}
    for name, tensor in state.items():
        held = getattr(tensor, MARK, None)
        if isinstance(held, tuple) and not _is_exact(tensor, held, main):
            names = names_in_file(model, name, tensor)
            found.update(zip(names, held, strict=True) if len(names) == len(held) else ())
    return found


def _is_exact(tensor: Tensor, pieces: Sequence[Held], main: torch.dtype) -> bool:
    """Whether the numbers in memory, in one type, are those of the file."""
    if tensor.is_meta:  # offloaded tensors are written in the model's main type
        return False
    kind = stored_type(tensor, main)
    return all(each.dtype == kind and not _rounds(kind, tensor.dtype) for each in pieces)


def copy_pieces(folder: Path, pieces: Mapping[str, Held]) -> None:
    """Put tensors of other files in the place of those that a saved model holds."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in weight_files(folder) if pieces else []:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        mine = tensors.keys() & pieces.keys()
        for name in mine:
            tensors[name] = _exact(pieces[name], tensors[name])
        if mine:
            save_file(tensors, path.with_suffix(".new"), metadata=about)
            path.with_suffix(".new").replace(path)


def _exact(held: Held, tensor: Tensor) -> Tensor:
    """What a file holds, if that has the shape of a tensor; else the tensor."""
    from safetensors import safe_open

    with safe_open(held.file, framework="pt") as file:
        exact: Tensor = file.get_tensor(held.name)
    return exact if exact.shape == tensor.shape else tensor


def like(marked: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that remembers what another does, whose values it has."""
    if hasattr(marked, MARK):
        setattr(tensor, MARK, getattr(marked, MARK))
    return tensor


@while_unchanged(most=64)
def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: ``dtype``, ``shape`` and ``data_offsets``.

    The file begins with the length of its header, which is JSON. Offsets are made to count from the
    beginning of the file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    for entry in entries.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return dict(entries)


def type_in_file(file: str, name: str, main: torch.dtype) -> torch.dtype:
    """The type of one tensor of a file."""
    return TYPES.get(header(Path(file)).get(name, {}).get("dtype", ""), main)


def as_stored(tensor: Tensor, main: torch.dtype) -> Tensor:
    """A tensor in the type that its file has, with all the digits that the file has.

    One in pieces (see `in_pieces`) is in the model's main type, whatever it was computed in.
    """
    held: Held | tuple[Held, ...] | None = getattr(tensor, MARK, None)
    if isinstance(held, tuple):
        return tensor.to(main)
    kind = stored_type(tensor, main)
    if held is not None and _rounds(kind, tensor.dtype):
        exact = _exact(held, tensor)
        if exact is not tensor:
            return exact.to(tensor.device)
    return tensor.to(kind)


def check_whole(name: str, model: Any, findings: Findings, held: Mapping[str, Held]) -> None:
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
        parts.append(f"{type(model).__name__} wants {_some(findings.missing)}, which no file has")
    if findings.unused:
        parts.append(f"the files hold {_some(findings.unused)}, which the class does not use")
    if findings.misshapen:
        tensor, there, wanted = findings.misshapen[0]
        more = len(findings.misshapen) - 1
        also = f" (and {more} more)" if more else ""
        parts.append(f"'{tensor}' is {_shape(there)} in the file, {_shape(wanted)} wanted{also}")
    raise ModelError(
        f"'{name}' is not whole: {'; '.join(parts)}. {_reason(model.config, findings, held)}"
    )


def _some(names: Sequence[str]) -> str:
    told = ", ".join(f"'{each}'" for each in names[:SHOWN])
    rest = len(names) - SHOWN
    return f"{len(names)} tensors ({told} and {rest} more)" if rest > 0 else told


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


HEADS = ("score.", "classifier.", "qa_outputs.", "v_head.", "reward_head.", "value_head.", "cls.")
"""Beginnings of names that other heads than a language model's have."""


def _reason(config: Any, findings: Findings, held: Mapping[str, Held]) -> str:
    """Why they differ, most likely, and what to do."""
    unused, missing = findings.unused, findings.missing
    if any("repair_before_" in each or "repair_after_" in each for each in unused):
        return (
            "The files hold the operators of a repaired checkpoint, but config.json no longer says "
            "so: it was edited. Get the folder again, or make it again."
        )
    if any(each.startswith(HEADS) for each in unused):
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
    if missing and not unused and all("expert" in each for each in missing):
        return "Experts were lost, perhaps in a merge or a conversion. Get the model again."
    depths = _depths(config, missing, unused)
    if depths is not None:
        return (
            f"config.json says {depths[0]} decoder layers, the files hold {depths[1]}: one of the "
            "two was edited. Make them agree, or get the model again."
        )
    if missing and not unused and all("head" in each or "embed_out" in each for each in missing):
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


def _told_class(config: Any) -> str:
    return ", ".join(getattr(config, "architectures", None) or ["no class"])


def _common_prefix(findings: Findings) -> str | None:
    """What a wrapper put before every name: without it, the names are those that are missing."""
    missing, unused = set(findings.missing), findings.unused
    if not unused:
        return None
    parts = unused[0].split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        plain = [each.removeprefix(prefix) for each in unused if each.startswith(prefix)]
        found = sum(each in missing or f"model.{each}" in missing for each in plain)
        if found > len(unused) // 2:
            return prefix
    return None


def _depths(config: Any, missing: Sequence[str], unused: Sequence[str]) -> tuple[int, int] | None:
    """Decoder layers in the config and in the files, if whole layers are all that differs."""
    count = getattr(config, "num_hidden_layers", None)
    numbers = [_layer_of(each) for each in (*missing, *unused)]
    if not isinstance(count, int) or None in numbers or bool(missing) == bool(unused):
        return None
    whole = {each for each in numbers if each is not None}
    there = max(whole) + 1 if unused else min(whole)
    ends = min(whole) == count if unused else max(whole) == count - 1 and there > 0
    return (count, there) if ends else None


def _layer_of(name: str) -> int | None:
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return None if match is None else int(match[1])
