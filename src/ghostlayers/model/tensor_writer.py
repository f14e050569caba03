"""Writing a safetensors file a tensor at a time, also out of the bytes of other files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghostlayers.model.tensor_files import TYPES, header

CHUNK = 2**24
"""Bytes that are copied at a time."""

ROOM_FOR_AN_ENTRY = 200
"""Bytes that a header has for a tensor's type, shape and place, beside its name."""

NAMES = {kind: name for name, kind in TYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A tensor to be written.

    Attributes:
        name: under which name.
        written: what a file calls its type: ``BF16``, ``I32``, ...
        shape: as readers will see it.
        chunks: its bytes, in order.
    """

    name: str
    written: str
    shape: Sequence[int]
    chunks: Iterable[Any]


def piece_of(name: str, tensor: torch.Tensor) -> Piece:
    """A tensor in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return Piece(name, NAMES[tensor.dtype], tuple(tensor.shape), (flat.numpy().data,))


def piece_in(file: Path, old: str, name: str) -> Piece:
    """A tensor of another file under a new name, byte for byte."""
    entry = header(file)[old]
    return Piece(name, entry["dtype"], entry["shape"], _bytes_of(file, *entry["data_offsets"]))


def _bytes_of(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as source:
        source.seek(begin)
        for at in range(begin, end, CHUNK):
            yield source.read(min(CHUNK, end - at))


def write_pieces(path: Path, names: Iterable[str], pieces: Iterable[Piece]) -> None:
    """Write tensors as they come; no more than one of them is in memory.

    Readers want every tensor to begin at a multiple of its numbers' size, and nothing between two
    tensors: wide types have to come first (see `tensor_files.width`).

    Args:
        path: the file to make.
        names: all that will come, in any order.
        pieces: the tensors, those of wide numbers first.
    """
    room = -(-sum(len(json.dumps(name)) + ROOM_FOR_AN_ENTRY for name in (*names, "")) // 8) * 8
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with path.open("wb") as file:
        file.seek(8 + room)
        begin = 0
        for piece in pieces:
            end = begin + sum(file.write(chunk) for chunk in piece.chunks)
            place = [begin, end]
            entries[piece.name] = {
                "dtype": piece.written,
                "shape": list(piece.shape),
                "data_offsets": place,
            }
            begin = end
        file.seek(0)
        # A header may end in blanks; it is known only when all tensors are.
        file.write(room.to_bytes(8, "little") + json.dumps(entries).encode().ljust(room))
