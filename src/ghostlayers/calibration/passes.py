"""Passes of a model over windows of text: declared as values, run here, priced by `plan`.

All that a pass keeps is tensors that grow by addition: sums over tokens, or rows that are filled
once and zero before. So the same few lines save them, restore them, and merge those of several
processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ghostlayers.calibration.boundaries import BoundaryStore
from ghostlayers.calibration.journal import Journal
from ghostlayers.model.dense import DenseModel
from ghostlayers.runtime import progress
from ghostlayers.runtime.parallel import add_up, from_first, world
from ghostlayers.text.tokens import Windows


class Sums(Protocol):
    """What a pass makes."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, not copies of them; the same names and shapes from the beginning."""


@runtime_checkable
class FiledSums(Sums, Protocol):
    """Sums some of which lie in files, because memory would not hold them."""

    def stores(self) -> list[BoundaryStore]:
        """Rows that are filled once and zero before."""


@dataclass(frozen=True)
class Pass:
    """A pass over windows, or a stage of work behind one, as it is known before it runs.

    It stands beside the code that runs it, which takes its name, its group of windows and its file
    in the journal from here; a plan adds up the same values.

    Attributes:
        key: what the journal knows it by, whatever the screen calls it.
        title: on the screen.
        windows: that are visited.
        layers: windows through one decoder layer, in all.
        heads: windows through the head, in all.
        products: multiply-adds of sums, in the type that they are summed in.
        solutions: multiply-adds of solving.
        copies: of the stream of a group of windows, that are held at a time.
        elsewhere: copies that are kept where the layers of an offloaded model are.
        held: bytes beside weights, workspace and the copies, at its peak.
        disk: bytes on disk, files for a while among them.
        brought: decoder layers of an offloaded model that are brought in; those that the windows
            ask for, if not given.
        fixed: seconds that none of these explain, such as starting a process.
    """

    key: str
    title: str
    windows: float = 0
    layers: float = 0.0
    heads: float = 0.0
    products: float = 0.0
    solutions: float = 0.0
    copies: int = 1
    elsewhere: int = 0
    held: int = 0
    disk: int = 0
    brought: float | None = None
    fixed: float = 0.0


@dataclass(frozen=True)
class Runner:
    """Runs a model over windows: says how far it is, keeps what is done, shares it out.

    Attributes:
        model: the dense model.
        batch_size: windows a layer computes at a time; 0 chooses.
        journal: keeps the sums of every pass, where a run is to survive.
        sweeps: what earlier passes over the same windows found, for those who ask again; None to
            ask anew.
    """

    model: DenseModel
    batch_size: int = 0
    journal: Journal | None = None
    sweeps: dict[Any, Any] | None = None

    def visit(self, declared: Pass, windows: Windows, sums: Sums) -> Iterator[tuple[int, Tensor]]:
        """Hand out groups of windows whose tokens the caller adds to the sums, till all are in.

        Of several processes each gets a share, and afterwards all hold the sums over all windows.
        What a killed run had kept is not handed out again. The caller takes every group: the sums
        are merged behind the last one.

        Args:
            declared: the pass.
            windows: the text.
            sums: what the caller adds to.

        Yields:
            (number of the first window, token ids [windows, sequence]).
        """
        here, record = world(), None
        if self.journal is not None:
            record = self.journal.next_pass(declared.key)
            record.restore(sums.tensors())
        size = from_first((record and record.windows_at_once) or self._at_once(declared, windows))
        if record is not None:
            record.begin(size, sums.tensors())
            _restore_files(sums, merged=record.merged, done=record.done)
        done, merged = (record.done, record.merged) if record else (0, False)
        with progress.stage(declared.title, len(windows)) as advance:
            for index, start in enumerate(range(0, len(windows), size)):
                ids = windows.input_ids[start : start + size]
                if start >= done and here.takes(index):
                    yield start, ids
                    if record is not None:
                        record.note(start + len(ids), sums.tensors(), _stores(sums))
                advance(len(ids))
        if merged:
            return
        _merge(sums)
        if record is not None:
            record.end(len(windows), sums.tensors(), _stores(sums))

    def _at_once(self, declared: Pass, windows: Windows) -> int:
        length, copies, elsewhere = windows.sequence_length, declared.copies, declared.elsewhere
        return self.model.windows_at_once(len(windows), length, self.batch_size, copies, elsewhere)

    def share(self, windows: Windows) -> Iterator[tuple[int, Tensor]]:
        """This process's groups of windows: (number of the first window, token ids)."""
        here = world()
        size = from_first(self._at_once(Pass("share", ""), windows))
        for index, start in enumerate(range(0, len(windows), size)):
            if here.takes(index):
                yield start, windows.input_ids[start : start + size]

    def whole(self, key: str, windows: int, sums: Sums, fill: Callable[[], None]) -> None:
        """A pass that is kept as a whole: ``fill`` adds this process's share, unless it is kept."""
        record = None if self.journal is None else self.journal.next_pass(key)
        if record is not None:
            record.restore(sums.tensors())
            if record.merged:
                return
            record.begin(0, sums.tensors())
        fill()
        _merge(sums)
        if record is not None:
            record.end(windows, sums.tensors())


def _stores(sums: Sums) -> list[BoundaryStore]:
    return sums.stores() if isinstance(sums, FiledSums) else []


def _restore_files(sums: Sums, *, merged: bool, done: int) -> None:
    for store in _stores(sums):
        if merged:
            store.take_sums()
        elif not done:
            store.clear()


def _merge(sums: Sums) -> None:
    add_up(sums.tensors().values())
    for store in _stores(sums):
        store.add_up()
