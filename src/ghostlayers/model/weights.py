"""Types of weights: every tensor remembers the type that its file has.

That need not be the type it is computed in: a new checkpoint holds it as the old one did.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghostlayers.errors import ModelError
from ghostlayers.model.tensor_files import TYPES, Held, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARK = "ghostlayers_stored"
"""The attribute under which a tensor remembers what its file holds."""


def remember_types(model: "PreTrainedModel", held: Mapping[str, Held], main: torch.dtype) -> None:
    """Let tensors remember their files: those of another type than most, and rounded ones.

    Raises:
        ModelError: a file holds packed numbers or integers where the model has plain ones.
    """
    ends = Counter(map(unprefixed, held))
    by_end = {end: entry for n, entry in held.items() if ends[end := unprefixed(n)] == 1}
    for name, tensor in _tensors(model):
        entry = held.get(name) or by_end.get(unprefixed(name))
        pieces = (entry,) if entry else _pieces(model, name, tensor, held)
        if tensor.is_floating_point():
            _check_plain(pieces)
        if any(_differs(piece, main, tensor.dtype) for piece in pieces):
            setattr(tensor, MARK, entry or pieces)


def _check_plain(pieces: Iterable[Held]) -> None:
    for piece in pieces:
        if piece.dtype is None:
            raise ModelError(
                f"'{piece.file}' holds '{piece.name}' in {piece.written}, but config.json names no "
                f"quantisation: expected one of {', '.join(TYPES)}. Numbers in any other type "
                "mean nothing without their scales. Get the model again, or start from the one "
                "that was quantised."
            )


def _pieces(
    model: "PreTrainedModel", name: str, tensor: Tensor, held: Mapping[str, Held]
) -> tuple[Held, ...]:
    """The tensors that one was made of under other names; none if that is not known."""
    pieces = [held.get(part) for part in names_in_file(model, name, tensor)]
    return tuple(piece for piece in pieces if piece) if all(pieces) else ()


def names_in_file(model: "PreTrainedModel", name: str, tensor: Tensor) -> list[str]:
    """Under which names transformers writes a tensor, packed experts one by one; in their order."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return list(revert_weight_conversion(model, {name: tensor.detach().to("meta")}))
    except (KeyError, ValueError, RuntimeError):  # it is written together with others only
        return [name]


def _differs(held: Held, main: torch.dtype, computed: torch.dtype) -> bool:
    return held.dtype is not None and (held.dtype != main or _rounds(held.dtype, computed))


def remember_own_types(model: "PreTrainedModel") -> None:
    """Let the tensors of a model in memory keep their types, where they differ from most."""
    for name, tensor in _tensors(model):
        if tensor.is_floating_point() and tensor.dtype != model.dtype:
            mark_type(tensor, name, tensor.dtype)


def mark_type(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    """Let a tensor be stored in a type, whatever it is computed in; it holds all its digits."""
    setattr(tensor, MARK, Held(Path(), name, dtype, tensor.shape))


def _rounds(stored: torch.dtype, computed: torch.dtype) -> bool:
    """Whether a type lacks digits of another."""
    return torch.promote_types(stored, computed) != computed


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def unprefixed(name: str) -> str:
    """A name from its layer's number on: what is before it differs between classes."""
    return re.sub(r"^.*?(?=\b\d+\.)", "", name, count=1)


def stored_type(tensor: Tensor, main: torch.dtype) -> torch.dtype:
    """The type that a tensor's file has; main, if that has pieces of several."""
    held: Held | tuple[Held, ...] | None = getattr(tensor, MARK, None)
    kinds = {entry.dtype for entry in (held if isinstance(held, tuple) else (held,)) if entry}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind or main


def in_pieces(
    model: "PreTrainedModel", state: Mapping[str, Tensor], main: torch.dtype
) -> dict[str, Held]:
    """What must be copied from the base's files, by its name in those that transformers writes.

    Experts that are packed in memory lie in a file one by one, each in its own type; and a tensor
    that is written under another name may be turned over on the way.

    Args:
        model: about to be saved.
        state: its tensors, which remember their files.
        main: the type that most of its weights are stored in.
    """
    stored: dict[str, Held] = {}
    for name, tensor in state.items():
        held = getattr(tensor, MARK, None)
        if isinstance(held, tuple) and not _is_exact(tensor, held, main):
            names = names_in_file(model, name, tensor)
            stored.update(zip(names, held, strict=True) if len(names) == len(held) else ())
    return stored


def _is_exact(tensor: Tensor, pieces: Sequence[Held], main: torch.dtype) -> bool:
    """Whether the numbers in memory, in one type, are those of the file."""
    if tensor.is_meta:  # offloaded tensors are written in the model's main type
        return False
    kind = stored_type(tensor, main)
    return all(piece.dtype == kind and not _rounds(kind, tensor.dtype) for piece in pieces)


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
