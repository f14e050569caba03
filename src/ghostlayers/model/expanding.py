"""A folder of packed weights as one of plain weights, written a tensor at a time.

Whatever opens, offloads and checks plain models then does the same with packed ones, and no more
than one weight is in memory meanwhile.
"""

import atexit
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ghostlayers.errors import ModelError
from ghostlayers.model.layouts import WEIGHT, HeldParts, Layout
from ghostlayers.model.quantized import ENTRY, layout_of
from ghostlayers.model.tensor_files import INDEX, ONE_FILE, Held, held_in, width
from ghostlayers.model.tensor_writer import NAMES, Piece, piece_in, piece_of, write_pieces
from ghostlayers.model.weights import unprefixed
from ghostlayers.runtime.scratch import Scratch

SMALL_FILES = ("*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""What a model's folder holds beside its weights."""


def packed_weights(held: Mapping[str, Held], layout: Layout) -> dict[str, dict[str, Held]]:
    """The parts of every packed weight that files hold, by the weight's name.

    Args:
        held: what the files hold.
        layout: of the packed ones.

    Raises:
        ModelError: a part is missing, or parts do not fit together.
    """
    weights = _by_weight(held, layout)
    packed = {name: parts for name, parts in weights.items() if layout.is_packed(parts)}
    for name, parts in packed.items():
        layout.check(name, parts)
    for name, parts in weights.items():
        own = parts.get("")
        if own is not None and name not in packed and name.endswith(WEIGHT) and own.dtype is None:
            raise ModelError(
                f"'{own.file}' holds '{name}' in {own.written}, which are packed numbers, but not "
                "the factors that belong to them. Get the model again."
            )
    return packed


def _by_weight(held: Mapping[str, Held], layout: Layout) -> dict[str, dict[str, Held]]:
    weights: dict[str, dict[str, Held]] = {}
    for name, part in held.items():
        weight, end = layout.part_of(name)
        weights.setdefault(weight, {})[end] = part
    return weights


def expand_for_good(
    place: Path, config: Mapping[str, Any], stored: torch.dtype, is_turned: Callable[[str], bool]
) -> Path:
    """A folder with the plain weights of a packed model, which lasts as long as the process.

    Arguments and errors as for `expand_into`.
    """
    scratch = Scratch("expand")
    try:
        expand_into(Path(scratch.name), place, config, stored, is_turned)
    except BaseException:
        scratch.cleanup()
        raise
    atexit.register(scratch.cleanup)  # models read from it until then
    return Path(scratch.name)


def expand_into(
    folder: Path,
    place: Path,
    config: Mapping[str, Any],
    stored: torch.dtype,
    is_turned: Callable[[str], bool],
) -> None:
    """Write a packed model's plain weights, and copy the other files of its folder.

    Args:
        folder: which is there and empty.
        place: the packed model's.
        config: its config.json.
        stored: the type of the plain weights.
        is_turned: whether a module keeps its weight of a name as [in, out].

    Raises:
        ModelError: see `packed_weights`; or there is no room.
    """
    layout, held = layout_of(config), held_in(place)
    packed = packed_weights(held, layout)
    plain = {
        name: parts[""]
        for name, parts in _by_weight(held, layout).items()
        if name not in packed and "" in parts
    }
    _check_room(folder, plain, packed, layout, stored)
    for pattern in SMALL_FILES:
        for path in place.glob(pattern):
            if path.is_file() and path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
    plainly = {name: value for name, value in config.items() if name != ENTRY}
    (folder / "config.json").write_text(json.dumps(plainly), encoding="utf-8")
    widths = {name: width(part.written) for name, part in plain.items()}
    widths |= dict.fromkeys(packed, stored.itemsize)
    order = sorted(widths, key=lambda name: (-widths[name], name))

    def pieces() -> Iterator[Piece]:
        for name in order:
            if name in plain:
                yield piece_in(plain[name].file, name, name)
            else:
                weight = layout.unpack(name, read(packed[name]))
                if layout.turned and is_turned(name):
                    weight = weight.T
                yield piece_of(name, weight.to(stored))

    write_pieces(folder / ONE_FILE, order, pieces())


def turned_in(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module of a model keeps its weight of a name as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    modules = model.named_modules()
    turned = {unprefixed(f"{name}.weight") for name, part in modules if isinstance(part, Conv1D)}
    return lambda name: unprefixed(name) in turned


def read(parts: HeldParts) -> dict[str, Tensor]:
    """The tensors of one weight."""
    tensors = {}
    for end, part in parts.items():
        with safe_open(part.file, framework="pt") as file:
            tensors[end] = file.get_tensor(part.name)
    return tensors


def _check_room(
    folder: Path,
    plain: Mapping[str, Held],
    packed: Mapping[str, HeldParts],
    layout: Layout,
    stored: torch.dtype,
) -> None:
    needed = sum(part.bytes for part in plain.values())
    for name, parts in packed.items():
        size = max(part.bytes for part in parts.values())
        needed += size * 8 // layout.bits(name, parts) * stored.itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"the model's packed weights take {needed / 1e6:,.0f} MB in {NAMES[stored]}, but "
            f"'{folder.parent}' has {free / 1e6:,.0f} MB free; free some space there, or set "
            "TMPDIR to a folder on another disk."
        )
