"""GGUF files as they lie on disk: one, or several that a model was split into."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from torch import Tensor

from ghostlayers.errors import ModelError
from ghostlayers.model.config_file import check_sizes
from ghostlayers.model.gguf_entries import check_header, check_turned
from ghostlayers.runtime.documents import brief
from ghostlayers.runtime.files import while_unchanged
from ghostlayers.runtime.places import PART, parts_beside
from ghostlayers.runtime.shown import one_line

SPLIT = "split."
"""Entries of a header that speak of such files."""

TOO_BAD = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, RecursionError
)  # fmt: skip
"""What the reader raises on a damaged file."""

NEEDED = {
    "token_embd": ("context_length",),
    "attn_q": ("attention.head_count",),
    "norm": ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
    "_exps": ("expert_used_count",),
}
"""Entries that llama.cpp asks for where there are such tensors; transformers makes them up."""

LONGEST_ARRAY = 2**23
"""Entries of an array in a header: several times as many as the largest vocabulary has merges."""


Value = tuple[Any, GGUFValueType, GGUFValueType | None]
"""A value of a header, its type, and the type of an array's entries."""


class BoundedReader(GGUFReader):
    """Reads no more than there is: the library takes what a header claims for granted.

    It goes through 2^60 entries of an array one by one, an object each, even behind the file's end.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(
                f"it ends at byte {len(self.data):,}, before all that its header names"
            )
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > min(LONGEST_ARRAY, len(self.data)):
                raise ValueError(f"its header names an array of {brief(length)} entries")
        return super()._get_field_parts(orig_offs, raw_type)


class GgufParts:
    """All files of a model, read as if they were one; it stands in for `gguf.GGUFReader`.

    Attributes:
        paths: the files, in their order.
        readers: one a file.
        fields: the header of the first one, which holds everything that is said of the model.
        tensors: those of all files.
    """

    def __init__(self, path: str | Path, mode: str = "r") -> None:
        self.paths = parts_of(Path(path))
        self.readers = [BoundedReader(part, mode) for part in self.paths]  # type: ignore[arg-type]
        self.fields = self.readers[0].fields
        self.endianess = self.readers[0].endianess
        self.alignment = self.readers[0].alignment
        self.tensors: list[ReaderTensor] = [
            tensor for reader in self.readers for tensor in reader.tensors
        ]

    def get_field(self, key: str) -> ReaderField | None:
        """An entry of the header; None where it is not there."""
        return self.fields.get(key)


def parts_of(path: Path) -> list[Path]:
    """The files of a model, of which any may be given.

    Raises:
        ModelError: some of them are missing.
    """
    parts = parts_beside(path)
    missing = [part.name for part in parts if not part.is_file()]
    if PART.fullmatch(path.name) and (missing or not parts):
        raise ModelError(
            f"'{path}' is one of {len(parts)} files of a model, but "
            f"{', '.join(missing[:5]) or 'none'} {'is' if len(missing) == 1 else 'are'} not beside "
            "it."
        )
    return parts


class GgufFile:
    """The header of a file, or of several: what it says of a model, and which tensors it has.

    Attributes:
        path: the file, or the first of several.
        parts: the files, read as one.
        architecture: llama.cpp's name of the family.
        tensors: by name; their numbers stay on disk.
        sizes: the number of numbers in every tensor.
        dtype: of the largest tensor; bfloat16 holds those of 4 to 8 bits well enough.

    Raises:
        ModelError: it is damaged, or its header speaks of another model.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.parts = GgufParts(path)
            self.path = self.parts.paths[0]
            self.architecture = str(self.text("general.architecture"))
            self.tensors = {tensor.name: tensor for tensor in self.parts.tensors}
            self.sizes = {name: int(one.n_elements) for name, one in self.tensors.items()}
            self._check(f"'{path}'")
        except TOO_BAD as bad:
            if isinstance(bad, ModelError):
                raise
            _damaged(f"'{path}'", one_line(str(bad)), bad)
        largest = max(self.parts.tensors, key=lambda tensor: int(tensor.n_elements))
        plain = {"F32": torch.float32, "F16": torch.float16}
        self.dtype = plain.get(largest.tensor_type.name, torch.bfloat16)

    def _check(self, where: str) -> None:
        """Refuse a header that speaks of another model than its tensors, before one is made."""
        self._check_parts(where)
        for path, reader in zip(self.parts.paths, self.parts.readers, strict=True):
            _check_layout(f"'{path}'", reader)
        check_header(where, self.parts.fields, self.architecture)
        check_turned(where, self.architecture, self.parts.tensors, self.entry)
        held = {name.split(".")[1] for name in self.sizes if name.startswith("blk.")}
        depth, width = self.entry("block_count"), self.entry("embedding_length")
        if not self.sizes or depth is None or width is None:
            raise ModelError(
                f"{where} cannot be read as a GGUF file of a language model: it names no "
                "block_count or embedding_length, or holds no tensors."
            )
        if held != {str(index) for index in range(min(int(depth), len(held) + 1))}:
            raise ModelError(
                f"{where} speaks of {brief(depth)} layers, but holds {len(held):,}: it is cut "
                "short, or its header was changed. Get it again."
            )
        for part, names in NEEDED.items():
            some = next((name for name in self.sizes if part in name), None)
            if some is not None and all(self.entry(name) is None for name in names):
                raise ModelError(
                    f"{where} holds '{some}', but its header does not name {' or '.join(names)}, "
                    "without which nobody knows what to compute with it. Get it again."
                )
        words = self.entry("vocab_size") or 1
        values = {"hidden_size": int(width), "vocab_size": int(words)}
        check_sizes(values, where, sum(self.sizes.values()))

    def _check_parts(self, where: str) -> None:
        """Refuse files of different models, and one of several under a name of its own."""
        for number, reader in enumerate(self.parts.readers):
            said = [_said(reader, SPLIT + key) for key in ("count", "no")]
            alone = len(self.parts.readers) == 1 and said[0] in (None, 0, 1)
            if not alone and said != [len(self.parts.readers), number]:
                raise ModelError(
                    f"{where} is one of {brief(said[0])} files of a model by its header, but "
                    f"{len(self.parts.readers)} by its name; give them the names that they had."
                )
        total = _said(self.parts.readers[0], SPLIT + "tensors.count")
        count = len(self.parts.tensors)
        if len(self.tensors) != count or total not in (None, 0, count):
            raise ModelError(
                f"{where} and the files beside it hold {count:,} tensors of "
                f"{len(self.tensors):,} names, but {brief(total)} are expected. Get them again."
            )

    def text(self, key: str) -> str | None:
        """An entry of the header as text; None where it is not there."""
        field = self.parts.get_field(key)
        return None if field is None else str(field.contents())

    def entry(self, key: str) -> Any:
        """What the header says of the model under a key; None where it says nothing."""
        return _said(self.parts, f"{self.architecture}.{key}")

    def vector(self, name: str) -> Tensor | None:
        """A tensor of float32 numbers; None where it is not there."""
        tensor = self.tensors.get(name)
        return None if tensor is None else torch.tensor(tensor.data).float()


def _check_layout(where: str, reader: GGUFReader) -> None:
    """Refuse tensors that do not lie one behind the other, as llama.cpp expects them.

    One of another type or size than it was written in has other bytes than its own behind it.
    """
    end = int(reader.data_offset)
    for tensor in reader.tensors:
        if int(tensor.data_offset) != end:
            raise ModelError(
                f"{where}: '{tensor.name}' begins at byte {int(tensor.data_offset):,}, but the "
                f"tensors before it end at {end:,}: types or sizes in its header were changed. "
                "Get it again."
            )
        end += -(-int(tensor.n_bytes) // reader.alignment) * int(reader.alignment)
    if len(reader.data) > end:
        raise ModelError(
            f"{where} holds {len(reader.data):,} bytes, but its header names {end:,}: it is not "
            "what was written. Get it again."
        )


def header_entries(reader: GGUFReader | GgufParts) -> Iterator[tuple[str, Value]]:
    """The entries of a header as a writer takes them, but for those that it makes by itself."""
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", SPLIT)) or key == gguf.Keys.General.ARCHITECTURE:
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        yield key, (field.contents(), field.types[0], inner)


@while_unchanged(most=2)
def open_gguf(path: Path) -> GgufFile:
    """A file's header: read once, because a large vocabulary takes seconds."""
    return GgufFile(path)


@contextlib.contextmanager
def for_transformers() -> Iterator[None]:
    """Let transformers' reader take several files as one, and share one table of tensor names.

    It asks `gguf` for a new table in every module of the model, and each holds the names of all
    layers: 77 of the 80 seconds that a file of 62 small layers took to read.
    """
    reader, make = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = GgufParts  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = functools.cache(make)
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]
        gguf.get_tensor_name_map = make


def _said(reader: GGUFReader | GgufParts, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _damaged(where: str, why: str, cause: Exception) -> NoReturn:
    raise ModelError(f"{where} cannot be read as a GGUF file: {why}.") from cause
