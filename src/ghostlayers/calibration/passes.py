"""One pass of a model over windows of text, whose result is sums.

All that a pass keeps is tensors that grow by addition: sums over tokens, or rows that are filled
once and zero before. So the same few lines save them, restore them, and merge those of several
processes.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

from ghostlayers.calibration import journal
from ghostlayers.calibration.boundaries import BoundaryStore
from ghostlayers.model.dense import DenseModel
from ghostlayers.runtime.parallel import add_up, from_first, world
from ghostlayers.runtime.progress import Progress, Silent
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


def _stores(sums: Sums) -> list[BoundaryStore]:
    return sums.stores() if isinstance(sums, FiledSums) else []


def visit(
    model: DenseModel,
    windows: Windows,
    sums: Sums,
    *,
    description: str,
    batch_size: int = 0,
    copies: int = 1,
    elsewhere: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Hand out groups of windows whose tokens the caller adds to the sums, until all are in them.

    Of several processes each gets a share, and afterwards all hold the sums over all windows. What
    a killed run had kept is not handed out again.

    Args:
        model: sets how many windows a group has.
        windows: the text.
        sums: what the caller adds to.
        description: of the stage.
        batch_size: windows at a time; 0 chooses.
        copies: how many streams of a group the caller holds at a time.
        elsewhere: how many it keeps where the layers of an offloaded model are.
        progress: told of every window.

    Yields:
        (number of the first window, token ids [windows, sequence]).
    """
    here, record = world(), journal.current()
    kept = None if record is None else record.next_pass(description)
    if kept is not None:
        kept.restore(sums.tensors())
    size = (kept and kept.windows_at_once) or model.windows_at_once(
        windows, batch_size, copies, elsewhere
    )
    size = from_first(size)
    if kept is not None:
        kept.begin(size, sums.tensors())
        for store in _stores(sums):
            if kept.merged:
                store.take_sums()
            elif not kept.done:
                store.clear()
    done, merged = (kept.done, kept.merged) if kept else (0, False)
    with (progress or Silent()).stage(description, len(windows)) as advance:
        for index, start in enumerate(range(0, len(windows), size)):
            ids = windows.input_ids[start : start + size]
            if start >= done and here.takes(index):
                yield start, ids
                if kept is not None:
                    kept.note(start + len(ids), sums.tensors(), _stores(sums))
            advance(len(ids))
    if not merged:
        add_up(sums.tensors().values())
        for store in _stores(sums):
            store.add_up()
        if kept is not None:
            kept.end(len(windows), sums.tensors(), _stores(sums))


def share(model: DenseModel, windows: Windows, batch_size: int = 0) -> Iterator[tuple[int, Tensor]]:
    """This process's groups of windows: (number of the first window, token ids)."""
    here = world()
    size = from_first(model.windows_at_once(windows, batch_size))
    for index, start in enumerate(range(0, len(windows), size)):
        if here.takes(index):
            yield start, windows.input_ids[start : start + size]


def whole(sums: Sums, fill: Callable[[], None], *, description: str, windows: int) -> None:
    """A pass that is kept as a whole: ``fill`` adds this process's share, unless all is kept."""
    record = journal.current()
    kept = None if record is None else record.next_pass(description)
    if kept is not None:
        kept.restore(sums.tensors())
        if kept.merged:
            return
        kept.begin(0, sums.tensors())
    fill()
    add_up(sums.tensors().values())
    if kept is not None:
        kept.end(windows, sums.tensors())
