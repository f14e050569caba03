"""What files of weights hold, by their headers alone."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghostlayers.errors import ModelError
from ghostlayers.modeling import some
from ghostlayers.runtime.files import while_unchanged

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of plain weights by their names in a safetensors header."""

_BITS = re.compile(r"[A-Z]+(\d+)")


def width(written: str) -> int:
    """Bytes of a number of a type, by its name in a safetensors header; at least one."""
    match = _BITS.match(written)
    return max(1, int(match[1]) // 8) if match else 1


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
        """That it takes."""
        return self.shape.numel() * width(self.written)


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
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"'{folder}' lacks {some(missing)}, which {INDEX} names. Get it again.")
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
        tensor = held.get(name)
        if tensor is not None and tensor.file.name != place:
            raise ModelError(
                f"'{folder}' is not whole: {INDEX} says that '{name}' lies in {place}, but "
                f"{tensor.file.name} holds it. Get the folder again."
            )
    return held


def held_tensors(files: Sequence[Path]) -> dict[str, Held]:
    """What safetensors files hold, by name, from their headers alone.

    Raises:
        ModelError: two of them hold a tensor of one name.
    """
    from safetensors import safe_open

    tensors: dict[str, Held] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in tensors:
                    raise ModelError(
                        f"'{path.parent}' holds '{name}' twice, in {tensors[name].file.name} and "
                        f"{path.name}, and which counts depends on the reader. Get it again."
                    )
                part = file.get_slice(name)
                kind = TYPES.get(part.get_dtype())
                shape = torch.Size(part.get_shape())
                tensors[name] = Held(path, name, kind, shape, part.get_dtype())
    return tensors


def main_type(held: Iterable[Held]) -> torch.dtype | None:
    """The type that most bytes of plain weights have; None where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in held:
        if tensor.dtype is not None:
            sizes[tensor.dtype] += tensor.bytes
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None


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
