"""The stream of some tokens at every boundary, in memory or in a file.

[boundaries, tokens, hidden] of a large model is gigabytes. In memory it is one tensor; in a file it
is written and read a stretch at a time, so that no more than a stretch is ever resident.
"""

import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BoundaryStore:
    """Rows of the residual stream at every boundary; zero where nothing was written.

    Args:
        shape: boundaries, tokens, channels.
        dtype: of the stream.
        device: where rows are given out, and kept if in memory.
        on_disk: keep them in a file, which has no name and goes when the store does.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        on_disk: bool = False,
    ) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self._file: Any = None
        self._tensor: Tensor | None = None
        if on_disk:
            self._file = tempfile.TemporaryFile(prefix="ghostlayers-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            os.truncate(self._file.fileno(), shape[0] * shape[1] * self._row_bytes)
        else:
            self._tensor = torch.zeros(*shape, dtype=dtype, device=device)

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
            return self._tensor[boundary, start:stop]
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
            return self._tensor[:, start:stop]
        return torch.stack([self.read(b, start, stop) for b in range(self.shape[0])])

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
        found = os.preadv(descriptor, [view[done:]], place + done)
        if not found:
            raise OSError("a temporary file of the residual stream is shorter than it was made")
        done += found
    return data
