"""What a long run keeps, so that the same command goes on where it was killed.

A run is a sequence of passes over text, each of which makes sums (`passes.Runner`). Which passes
there are depends on nothing but the request and the sums before, so a pass is known by its key and
by how many of that key came before. While one is under way its sums are written every half minute,
whole or not at all, with the windows that are in them; run again, the same request finds them,
passes over what is done, and ends with the same bits: sums continue in the same order, and whatever
was not kept is computed again.

The files are safetensors. The request they belong to lies beside them, and another one is refused.
"""

import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghostlayers.errors import (
    DistributedError,
    GhostlayersError,
    OutputError,
    ResumeError,
    VerificationError,
    shortened,
)
from ghostlayers.runtime import drafts
from ghostlayers.runtime.documents import check, read_json, strict, to_json
from ghostlayers.runtime.files import whole_file, write_whole
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.parallel import all_hold, by_first, everyones, from_first, wait, world
from ghostlayers.runtime.places import check_apart
from ghostlayers.spans import small_number

T = TypeVar("T")

SECONDS_BETWEEN = 30.0
"""How much work a killed run loses at most, and how often it writes."""

SHARE_OF_WRITING = 0.05
"""Of the time, that writing may take: a training run's state is gigabytes."""

REQUEST = "request.json"

KEPT = ("*-of-process-*-*.safetensors", "*-of-process-*-*.rows", "written.jsonl", "*.draft")
"""What a run keeps beside its request; drafts are of older versions."""


class Flushable(Protocol):
    """A file."""

    def flush(self) -> None:
        """Have it hold all that was written."""


@dataclass
class Journal:
    """The kept passes of one run.

    Attributes:
        folder: where they lie.
        seconds_between: at least so much work lies between two writes.
        request: digest of what the sums depend on.
        resumed: windows that did not have to be visited again.
    """

    folder: Path
    seconds_between: float = SECONDS_BETWEEN
    request: str = ""
    resumed: int = 0
    _opened: Counter[str] = field(default_factory=Counter)

    def next_pass(self, key: str, *, in_step: bool = False) -> "KeptPass":
        """The record of the pass of that key that begins now; see `KeptPass` for ``in_step``."""
        self._opened[key] += 1
        return KeptPass(self, self._path(key, self._opened[key]), key, in_step=in_step)

    def file_for(self, key: str) -> Path:
        """A file for what the next pass of that key keeps beside its sums."""
        return self._path(key, self._opened[key] + 1).with_suffix(".rows")

    def _path(self, key: str, number: int) -> Path:
        here = world()
        what = re.sub(r"\W+", "-", key).lower()[:60]
        name = f"{what}-{number}-of-process-{here.rank}-{here.size}"
        return self.folder / f"{name}.safetensors"


@dataclass
class KeptPass:
    """The sums of one pass, as far as they are kept.

    There are two files: the sums over this process's share so far, and those over all processes
    once the pass has ended. A process that has the second may meet one that was killed before it
    had; then both go on from the first.

    Of a pass in step all processes keep the same number of steps: they write together, each beside
    what it kept before, which goes once all have written.

    Attributes:
        journal: whose pass it is.
        share: the file of this process's sums.
        key: of the pass; it must be the same when the run goes on.
        windows_at_once: in a group, as the pass began; 0 if nothing is kept.
        done: windows, counted from the first, that are in the sums or another process's.
        merged: the sums are those of all processes.
        in_step: its processes go on together from one number of steps.
    """

    journal: Journal
    share: Path
    key: str
    windows_at_once: int = 0
    done: int = 0
    merged: bool = False
    in_step: bool = field(default=False, kw_only=True)
    _began: float = field(default_factory=time.monotonic)
    _written: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    @property
    def whole(self) -> Path:
        """The file of the sums over all processes."""
        return self.share.with_suffix(f".all{self.share.suffix}")

    @property
    def next(self) -> Path:
        """The file of what is written while other processes have not yet written as much."""
        return self.share.with_suffix(f".next{self.share.suffix}")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the sums with what was kept, if anything was.

        Raises:
            ResumeError: the file is of another pass, or damaged.
        """
        path = self._same_in_all() if self.in_step else self._merged_or_own()
        if path is None or not path.is_file():
            return
        stored, notes = self._read(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if notes.get("request") != self.journal.request:
            raise self._refuse(path, "was written by a run of another request beside this one")
        if notes.get("key") != self.key or shapes != {
            name: tuple(tensor.shape) for name, tensor in stored.items()
        }:
            raise self._refuse(path, "is of another stage")
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
        self.windows_at_once = self._number(path, notes, "windows_at_once")
        self.done = self._number(path, notes, "done")
        self.journal.resumed += self.done

    def _merged_or_own(self) -> Path:
        self.merged = all_hold(self.whole.is_file())
        return self.whole if self.merged else self.share

    def _same_in_all(self) -> Path | None:
        """This process's file of the most steps that every process has kept; None without any."""
        files = [path for path in (self.share, self.next, self.whole) if path.is_file()]
        notes = {path: self._read(path, tensors=False)[1] for path in files}
        mine = {self._number(path, notes[path], "done"): path for path in files}
        common = set.intersection(*everyones(set(mine)))
        return mine[max(common)] if common else None

    def _read(
        self, path: Path, *, tensors: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a file, where they are wanted, and what it notes beside them."""
        try:
            with safe_open(path, framework="pt") as file:
                wanted = file.keys() if tensors else ()
                return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._refuse(path, f"cannot be read ({error})") from error

    def _number(self, path: Path, notes: Mapping[str, str], name: str) -> int:
        number = small_number(notes.get(name, ""))
        if number is None:
            raise self._refuse(path, "does not say how far it is")
        return number

    def begin(self, windows_at_once: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on with groups of so many windows; what was kept of other groups is forgotten."""
        if self.done and self.windows_at_once != windows_at_once:
            self.done, self.merged = 0, False
            for tensor in tensors.values():
                tensor.zero_()
        self.windows_at_once = windows_at_once

    @staticmethod
    def _refuse(path: Path, what: str) -> ResumeError:
        return ResumeError(f"'{path}' {what}; delete '{path.parent}' to begin anew.")

    def note(
        self, done: int, tensors: Mapping[str, Tensor], files: Sequence[Flushable] = ()
    ) -> None:
        """Count windows as done, and write the sums where enough work has gone into them.

        Files that hold more of them are written to the disk first.
        """
        self.done = done
        # What takes long to write is written more seldom: a twentieth of the time at most.
        pause = self.journal.seconds_between and max(
            self.journal.seconds_between, self._took / SHARE_OF_WRITING
        )
        if self._agreed(time.monotonic() - self._written >= pause):
            for file in files:
                file.flush()
            self._write_share(tensors)

    def _agreed(self, due: bool) -> bool:
        """Whether to write now; in step the first process says so for all."""
        return from_first(due) if self.in_step else due

    def _write_share(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.in_step or world().size == 1:
            self._write(self.share, tensors)
            return
        self._write(self.next, tensors)
        wait()  # from here on every process has as much, under one name or the other
        self.next.replace(self.share)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the sums now, whatever went into them."""
        self._write(self.share, tensors)

    def end(
        self, done: int, tensors: Mapping[str, Tensor], files: Sequence[Flushable] = ()
    ) -> None:
        """All is done, in every process: write the sums, unless they are made again at once."""
        self.done, self.merged = done, True
        for file in files:
            file.flush()
        due = self._agreed(time.monotonic() - self._began >= self.journal.seconds_between / 10)
        if due and self.in_step:
            self._write_share(tensors)
        elif due:
            self._write(self.whole, tensors)
            self.share.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        notes = {
            "key": self.key,
            "request": self.journal.request,
            "windows_at_once": str(self.windows_at_once),
            "done": str(self.done),
        }
        content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        began = time.monotonic()
        try:
            with whole_file(path) as draft:
                save_file(content, draft, metadata=notes)
        except SafetensorError as error:
            raise OutputError(f"cannot keep the run's state in '{path}': {error}.") from error
        self._written = time.monotonic()
        self._took = self._written - began


def folder_for(out: Path) -> Path:
    """Where a run that is to write ``out`` keeps its state."""
    return out.absolute().parent / f".{out.name}.ghostlayers-run"


@contextlib.contextmanager
def keeping(
    folder: Path, request: Mapping[str, Any], *, seconds_between: float | None = None
) -> Iterator[Journal]:
    """Keep passes in a folder for as long as the context lasts; delete them if it ends well.

    They are of no use either once the request is refused: a repetition would be refused again.

    Args:
        folder: see `folder_for`.
        request: all that the sums depend on, as plain values.
        seconds_between: see `Journal`; None for `SECONDS_BETWEEN`.

    Raises:
        ResumeError: the folder holds the passes of another request.
        OutputError: it cannot be written.
    """
    wanted = strict(json.loads(json.dumps(request, default=str)))
    pause = SECONDS_BETWEEN if seconds_between is None else seconds_between
    asked = digest(json.dumps(wanted, sort_keys=True))
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(_alone_in(folder)))
        _open(folder, wanted)
        try:
            yield Journal(folder, pause, asked)
        except GhostlayersError as error:
            if is_final(error):
                finish(folder)
            raise
        finally:
            if not any(folder.glob("*.safetensors")):  # nothing worth keeping
                finish(folder)


def is_final(error: GhostlayersError) -> bool:
    """Whether the same request would end like that again, whatever is done about the machine."""
    return not isinstance(error, (OutputError, ResumeError, DistributedError, VerificationError))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Be the only run that keeps its state in a folder, without what killed ones left half-done.

    Raises:
        OutputError: another run is there, or it cannot be written.
    """
    with holding(folder):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"'{folder}' is no folder, so no state can be kept there; remove it.")
        drafts.clear(folder)
        yield


def write_once(
    write: Callable[[], T], out: str | Path, inputs: Sequence[Any], kept_in: Path | None
) -> T:
    """Write a result in the first process; then what its run has kept is of no more use.

    Args:
        write: what writes it.
        out: where.
        inputs: what was read, none of which the output may be.
        kept_in: the folder of what the run kept.

    Raises:
        OutputError: the output is an input, or cannot be written.
    """
    check_apart({"input": list(inputs)}, {"output": Path(out)})
    result = by_first(write)
    if kept_in is not None:
        finish(kept_in)
    return result


def finish(folder: Path) -> None:
    """Delete what a run kept, as its result is written, and nothing else that lies there."""
    if folder.is_symlink() or not folder.is_dir():
        return
    ours = [path for pattern in KEPT for path in folder.glob(pattern)]
    # The request goes last: what is there without one is nobody's.
    for path in (*ours, folder / REQUEST):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _open(folder: Path, wanted: dict[str, Any]) -> None:
    path = folder / REQUEST
    # A run that was killed before it kept any sums left only its request: nothing to mix.
    if not path.is_file() or not any(folder.glob("*.safetensors")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write '{folder}': {error.strerror}.") from error
        write_whole(path, to_json(wanted))
        return
    written = check(read_json(path, ResumeError), dict[str, Any], f"'{path}'", ResumeError)
    differing = sorted(key for key in {*written, *wanted} if written.get(key) != wanted.get(key))
    if differing:
        shown = "; ".join(
            f"{key}: {_brief(written.get(key))} then, {_brief(wanted.get(key))} now"
            for key in differing[:4]
        )
        raise ResumeError(
            f"'{folder}' holds what an interrupted run of another request kept ({shown}). Repeat "
            "that request to go on with it, delete the folder to discard it, or choose another "
            "output."
        )


def _brief(value: Any) -> str:
    return shortened(json.dumps(value), 40)


def digest(*parts: bytes | str) -> str:
    """SHA-256 of several parts, as hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big"))
        total.update(data)
    return total.hexdigest()
