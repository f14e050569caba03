"""Several processes, on one machine or many, that share one run.

Each takes its share of the windows; what they keep is sums, merged in one all-reduce a pass over
the text; then all hold the same, and the first one writes. The processes are torch.distributed's,
started by ``accelerate launch`` or ``torchrun`` and joined through accelerate. In a single process
everything here does nothing.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ghostlayers.errors import DistributedError, GhostlayersError, first_line
from ghostlayers.runtime import launchers
from ghostlayers.spans import small_number

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the slowest other one. One that dies is noticed at once where its
connection breaks; a machine that vanishes, after this."""

TIMEOUT_VARIABLE = "GHOSTLAYERS_TIMEOUT"
"""Environment variable that overrides it, in seconds."""


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process decides, writes and speaks."""
        return self.rank == 0

    def takes(self, index: int) -> bool:
        """Whether a piece of work of this number is this process's."""
        return index % self.size == self.rank


def world() -> World:
    """The processes of this run."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def shards() -> int:
    """Among how many processes a model that is trained is divided (FSDP2); 1: each holds all."""
    return world().size if launchers.asks_for_shards() else 1


def processes_here() -> int:
    """Processes of this run on this machine."""
    return max(1, _environment_number("LOCAL_WORLD_SIZE")) if world().size > 1 else 1


def launched() -> bool:
    """Whether a launcher has started several processes.

    Raises:
        DistributedError: it did not say how many.
    """
    several = _environment_number("WORLD_SIZE") > 1
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        if several:
            _environment_number(name)
    return several


def _environment_number(name: str) -> int:
    """A number that a launcher tells."""
    text = os.environ.get(name, "1")
    number = small_number(text)
    if number is None:
        raise DistributedError(
            f"the environment variable {name} must be a whole number, as launchers set it, got "
            f"'{text[:60]}'; unset it, or start with accelerate launch or torchrun."
        )
    return number


def join() -> World:
    """Join the other processes, where a launcher has started some.

    Raises:
        DistributedError: they cannot be reached.
    """
    if not launched() or world().size > 1:
        return world()
    from accelerate import PartialState

    os.environ[launchers.FSDP_LOADS_ONCE] = "false"  # every process reads what it needs
    cpu = not torch.accelerator.is_available()
    with _explained("join", INTERFACE):
        PartialState(cpu=cpu, timeout=_timeout())
    return world()


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise DistributedError(
            f"{TIMEOUT_VARIABLE} must be a number of seconds above 0 and below 1e9, got '{text}'."
        )
    return timedelta(seconds=seconds)


def leave() -> None:
    """Part from the other processes, if there are any."""
    if world().size > 1:
        dist.destroy_process_group()


INTERFACE = (
    " On several machines, GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) names the network interface "
    "that joins them."
)


@contextmanager
def _explained(doing: str, advice: str = "") -> Iterator[None]:
    """Say what a broken connection means."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise _lost(doing, error, advice) from error


def _lost(doing: str, error: BaseException, advice: str = "") -> DistributedError:
    here = world()
    return DistributedError(
        f"process {here.rank} of {here.size} on {socket.gethostname()} could not {doing} the "
        f"others: one of them stopped, or cannot be reached ({first_line(error)[:200]}). "
        "Nothing was written; start them all again with the same command to go on from what "
        f"was kept.{advice}"
    )


SAYS_LOST = ("gloo", "nccl", "connection", "process group")
"""Words of errors by which torch tells that another process is gone."""


@contextmanager
def computing_together() -> Iterator[None]:
    """Say what a connection means that breaks while torch exchanges weights and gradients.

    Raises:
        DistributedError: one of the others stopped, or cannot be reached.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        said = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(word in said for word in SAYS_LOST):
            raise
        raise _lost("compute with", error) from error


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place.

    Half-precision tensors hold rows of which every process has filled its own and left the others
    zero, so their sum is exact in any type; it is made in float32, which every backend adds.
    """
    if world().size == 1:
        return
    with _explained("add up with"):
        for tensor in tensors:
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            moved = (tensor.float() if half else tensor.contiguous()).to(_reachable(tensor.device))
            dist.all_reduce(moved)
            tensor.copy_(moved)


def _reachable(device: torch.device) -> torch.device:
    """Where the processes can add a tensor up: NCCL knows no processor."""
    accelerator = torch.accelerator.current_accelerator()
    alone = dist.get_backend() not in ("gloo", "mpi") and accelerator is not None
    return accelerator if alone and accelerator is not None else device


def from_first(value: T) -> T:
    """The first process's value, everywhere."""
    if world().size == 1:
        return value
    held = [value]
    with _explained("hear from"):
        dist.broadcast_object_list(held, src=0)
    return held[0]


def everyones(value: T) -> list[T]:
    """What each process holds, by its number."""
    if world().size == 1:
        return [value]
    held = [value] * world().size
    with _explained("hear from"):
        dist.all_gather_object(held, value)
    return held


def by_first(work: Callable[[], T]) -> T:
    """Have the first process do something; all get what it returns, or the error it raises."""
    if world().size == 1:
        return work()
    done: T | GhostlayersError | None = None
    if world().leads:
        try:
            done = work()
        except GhostlayersError as error:
            done = error
    done = from_first(done)
    if isinstance(done, GhostlayersError):
        raise done
    return done  # type: ignore[return-value]


def all_hold(flag: bool) -> bool:
    """Whether something is true in every process."""
    if world().size == 1:
        return flag
    missing = torch.tensor(float(not flag))
    add_up([missing])
    return not float(missing)


def check_same(what: str, value: object) -> None:
    """Stop where the processes do not hold the same value.

    Raises:
        DistributedError: they do not; the message shows this process's and the first one's.
    """
    if world().size == 1:
        return
    first = from_first(value)
    differs = torch.tensor(float(first != value))
    add_up([differs])
    if float(differs):
        raise DistributedError(
            f"{int(differs)} of {world().size} processes hold another {what} than the first: "
            f"{first!r} there, {value!r} here. Expected the same model, text and options in every "
            "process; start them all with the same command, and give each machine the same files."
        )


def wait() -> None:
    """Wait for all processes."""
    if world().size > 1:
        with _explained("wait for"):
            dist.barrier()
