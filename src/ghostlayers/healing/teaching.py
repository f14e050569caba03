"""Lessons of a run, in order: computed as they are needed, and kept where they come again.

A text that is shorter than the run is gone through again, and what the dense model says of a window
does not change. So it is written to disk the first time, where there is room; and of an offloaded
model, whose layers are slow to bring in, the lessons of many steps are computed in one sweep.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostlayers.calibration.boundaries import BoundaryStore
from ghostlayers.healing.engine import Engine, Lesson
from ghostlayers.runtime.machine import room_for_streams
from ghostlayers.runtime.parallel import all_hold, shards


class Teaching:
    """Lessons by the number of their window in the order of training.

    Args:
        engine: computes them.
        input_ids: every window, in the order of training, [windows, sequence].
        firsts: for every window the number of the first one that equals it.
        positions: that are learnt from, of each, [windows, positions].
        own: numbers of this process's windows, in order.
        done: so many of them were learnt from before, in a run that goes on.
        most: bytes that kept lessons may take on disk; half of what is free if not given.
        path: keep them in a file of this name, which stays.
        weights: of the positions, [windows, positions]; None where all are one.
    """

    def __init__(
        self,
        engine: Engine,
        input_ids: Int[Tensor, "windows sequence"],
        firsts: Sequence[int],
        positions: Int[Tensor, "windows positions"],
        own: Sequence[int],
        done: int = 0,
        *,
        most: int | None = None,
        path: Path | None = None,
        weights: Float[Tensor, "windows positions"] | None = None,
    ) -> None:
        self.engine, self.input_ids, self.positions = engine, input_ids, positions
        self.weights = weights
        self._firsts = firsts
        self._own, self._at = own, {number: place for place, number in enumerate(own)}
        self._written = {self._firsts[number] for number in own[:done]}
        self._chunk: tuple[list[int], Lesson] | None = None
        self.stores = self._make_stores(most, path)

    def _make_stores(self, most: int | None, path: Path | None) -> list[BoundaryStore]:
        """Files for streams and guides, if any window comes again and there is room."""
        distinct = len(set(self._firsts))
        if distinct == len(self._firsts):
            return []
        length, hidden = self.input_ids.shape[1], self.engine.dense.hidden_size
        rows = [length] if self._keeps_streams else []
        if self.engine.guided:
            rows.append(length if self.engine.head is None else self.positions.shape[1])
        dtype, device = self.engine.dense.dtype, self.engine.dense.device
        room = room_for_streams(on_disk=True)
        fits = distinct * sum(rows) * hidden * dtype.itemsize <= min(room, most or room)
        if not _in_all(fits):
            return []
        self._place = {first: n for n, first in enumerate(dict.fromkeys(self._firsts))}
        names = [None if path is None else path.with_suffix(f".{n}{path.suffix}") for n in (0, 1)]
        return [
            BoundaryStore((1, distinct * count, hidden), dtype, device, on_disk=True, path=name)
            for count, name in zip(rows, names, strict=False)
        ]

    @property
    def _keeps_streams(self) -> bool:
        """Whether layers lie before the stream that lessons begin with."""
        return self.engine.trained.start > 0

    def lesson(self, numbers: Sequence[int]) -> Lesson:
        """The lesson of this process's windows of a step; what came before is read again."""
        lesson = self._lesson(numbers)
        return lesson if self.weights is None else replace(lesson, weights=self.weights[numbers])

    def total(self, numbers: Sequence[int]) -> float:
        """The weight of all positions of some windows, whichever process has them."""
        if self.weights is None:
            return len(numbers) * self.positions.shape[1]
        return float(self.weights[list(numbers)].sum())

    def _lesson(self, numbers: Sequence[int]) -> Lesson:
        if self.stores and _in_all(all(self._firsts[n] in self._written for n in numbers)):
            return self._read(numbers)
        if self._chunk is None or not set(numbers) <= set(self._chunk[0]):
            ahead = self._ahead(numbers)
            self._chunk = ahead, self._teach(ahead)
        rows = torch.tensor([self._chunk[0].index(n) for n in numbers])
        whole = self._chunk[1]
        guide = None if whole.guide is None else whole.guide[rows]
        lesson = Lesson(whole.input_ids[rows], whole.positions[rows], whole.stream[rows], guide)
        self._write(numbers, lesson)
        return lesson

    def _ahead(self, numbers: Sequence[int]) -> list[int]:
        """The windows that are taught together: of an offloaded model, as many as there is room."""
        dense, length = self.engine.dense, self.input_ids.shape[1]
        first, count = self._at[numbers[0]], len(numbers)
        if dense.residency.offloaded:
            left = len(self._own) - first
            count = max(count, dense.windows_at_once(left, length, copies=4))
        return list(self._own[first : first + count])

    def _teach(self, numbers: Sequence[int]) -> Lesson:
        return self.engine.teach(self.input_ids[numbers], self.positions[numbers])

    def _write(self, numbers: Sequence[int], lesson: Lesson) -> None:
        self._written.update(self._firsts[number] for number in numbers)
        streams = [lesson.stream] if self._keeps_streams else []
        for store, rows in zip(self.stores, [*streams, lesson.guide], strict=False):
            assert rows is not None
            for row, number in enumerate(numbers):
                store.write(0, self._place[self._firsts[number]] * rows.shape[1], rows[row])

    def _read(self, numbers: Sequence[int]) -> Lesson:
        rows = []
        for store in self.stores:
            count = store.shape[1] // len(self._place)
            places = [self._place[self._firsts[number]] * count for number in numbers]
            rows.append(torch.stack([store.read(0, at, at + count) for at in places]))
        guide = rows.pop() if self.engine.guided else None
        ids = self.input_ids[numbers]
        stream = rows[0] if rows else self.engine.dense.begin(ids)[1]
        return Lesson(ids, self.positions[numbers], stream, guide)


def _in_all(flag: bool) -> bool:
    """Whether it is so, in every process where these run a sharded dense model together."""
    return flag if shards() == 1 else all_hold(flag)
