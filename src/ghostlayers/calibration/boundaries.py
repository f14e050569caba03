"""The stream of some tokens at every boundary, in memory or in a file.

[boundaries, tokens, hidden] of a large model is gigabytes. In memory it is one tensor; in a file it
is written and read a stretch at a time, so that no more than a stretch is ever resident.
"""

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostlayers.runtime.parallel import add_up, world

ADDED_AT_ONCE = 1 << 26
"""Bytes of a file that processes add up at a time."""


def _open(path: Path | None) -> Any:
    if path is None:
        return tempfile.TemporaryFile(prefix="ghostlayers-")
    path.touch()
    return path.open("r+b")


class BoundaryStore:
    """Rows of the residual stream at every boundary; zero where nothing was written.

    Args:
        shape: boundaries, tokens, channels.
        dtype: of the stream.
        device: where rows are given out, and kept if in memory.
        on_processor: keep them in the processor's memory.
        on_disk: keep them in a file, which has no name and goes when the store does.
        path: keep them in a file of this name, which stays; what it holds already is kept.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        on_processor: bool = False,
        on_disk: bool = False,
        path: Path | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self._file: Any = None
        self._sums: BoundaryStore | None = None
        self._tensor: Tensor | None = None
        self.path = path
        if on_disk or path is not None:
            self._file = _open(path)
            weakref.finalize(self, self._file.close)
            os.truncate(self._file.fileno(), shape[0] * shape[1] * self._row_bytes)
        else:
            place = torch.device("cpu") if on_processor else self.device
            self._tensor = torch.zeros(*shape, dtype=dtype, device=place)

    @property
    def _row_bytes(self) -> int:
        return self.shape[2] * self.dtype.itemsize

    def write(self, boundary: int, start: int, rows: Tensor) -> None:
        """Put rows [tokens, hidden] at a boundary, from a token on."""
        if self._tensor is not None:
            self._tensor[boundary, start : start + len(rows)] = rows
            return
        data = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
        _write_all(self._file.fileno(), memoryview(data.tobytes()), self._place(boundary, start))

    def read(self, boundary: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) at a boundary."""
        if self._tensor is not None:
            return self._tensor[boundary, start:stop].to(self.device)
        size = (stop - start) * self._row_bytes
        data = _read_all(self._file.fileno(), size, self._place(boundary, start))
        rows = torch.frombuffer(data, dtype=torch.uint8).view(self.dtype)
        return rows.view(stop - start, self.shape[2]).to(self.device)

    def __getitem__(self, boundary: int) -> Tensor:
        """All rows at a boundary."""
        return self.read(boundary, 0, self.shape[1])

    def stretch(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) at every boundary, [boundaries, tokens, hidden]."""
        if self._tensor is not None:
            return self._tensor[:, start:stop].to(self.device)
        return torch.stack([self.read(b, start, stop) for b in range(self.shape[0])])

    def add_up(self) -> None:
        """Replace the rows in the file by their sums over all processes, as tensors are.

        Where the file has a name the sums get one of their own, and this process's rows stay: see
        `take_sums`.
        """
        if world().size == 1 or self._file is None:
            return
        sums = BoundaryStore(
            self.shape, self.dtype, self.device, on_disk=True, path=self._path_of_sums
        )
        step = max(1, ADDED_AT_ONCE // self._row_bytes)
        for boundary in range(self.shape[0]):
            for start in range(0, self.shape[1], step):
                rows = self.read(boundary, start, min(start + step, self.shape[1]))
                add_up([rows])
                sums.write(boundary, start, rows)
        self._sums, self._file = sums, sums._file  # which is closed when the former goes

    def take_sums(self) -> None:
        """Read what `add_up` made in another run."""
        if world().size > 1 and self._path_of_sums is not None:
            self._file = _open(self._path_of_sums)
            weakref.finalize(self, self._file.close)

    @property
    def _path_of_sums(self) -> Path | None:
        return None if self.path is None else self.path.with_suffix(f".all{self.path.suffix}")

    def flush(self) -> None:
        """Have the file hold all that was written, whatever happens next."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Zero everywhere."""
        if self._tensor is not None:
            self._tensor.zero_()
        else:
            os.truncate(self._file.fileno(), 0)
            os.truncate(self._file.fileno(), self.shape[0] * self.shape[1] * self._row_bytes)

    @property
    def tensor(self) -> Tensor | None:
        """All of it, if it is in memory."""
        return self._tensor

    def _place(self, boundary: int, token: int) -> int:
        return (boundary * self.shape[1] + token) * self._row_bytes


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):  # one call writes two gigabytes at most
        done += os.pwrite(descriptor, data[done:], place + done)


def _read_all(descriptor: int, size: int, place: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = os.preadv(descriptor, [view[done:]], place + done)
        if not count:
            raise OSError("a temporary file of the residual stream is shorter than it was made")
        done += count
    return data
