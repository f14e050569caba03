"""What every command does around its work: signals, errors, locks, other libraries' chatter."""

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import typer

from ghostlayers.checkpoint import readiness
from ghostlayers.cli import screen
from ghostlayers.cli.claims import claimed
from ghostlayers.cli.failures import explain
from ghostlayers.cli.parameters import Parameters
from ghostlayers.errors import DistributedError, RecipeError
from ghostlayers.runtime import parallel
from ghostlayers.runtime.allocator import keep_freed_memory
from ghostlayers.runtime.documents import to_json
from ghostlayers.runtime.files import at_home, write_whole
from ghostlayers.runtime.interrupts import SAID, STATUS, raised
from ghostlayers.runtime.quiet import TALKATIVE
from ghostlayers.runtime.scratch import clear_scratch, tidied

KEEPING = {
    "prune": "",
    "compare": "",
    "recommend": "",
    "run": "",
    "write_data": "",
    "heal": ", or with --keep to write the best state that is kept",
}
"""Commands that keep what an interrupted run has done, and what else can be made of that."""

Command = Callable[..., None]


def command(function: Command) -> Command:
    """Make a command of a function, whose parameters `Parameters` reads.

    Our errors become one message and an exit code; other libraries' chatter is silenced.
    """
    return _command(function, shared=False)


def shared_command(function: Command) -> Command:
    """A `command` that several processes can carry out together."""
    return _command(function, shared=True)


def simple_command(function: Command) -> Command:
    """A `command` that opens no model, and has no ``--debug``."""
    return _command(function, shared=False, debug=False)


def _command(function: Command, *, shared: bool, debug: bool = True) -> Command:
    parameters = Parameters(function, debug=debug)

    @functools.wraps(function)
    def shell(**given: Any) -> None:
        name = function.__name__
        with raised() as interrupts:
            done = False
            try:
                _prepare()
                _know_home(given)
                with (
                    readiness.dismissed(),
                    _processes(shared, name),
                    claimed(name, given),
                    tidied(),
                ):
                    function(**parameters.arguments(given))
                    done = True
            except (typer.Exit, typer.Abort):
                raise
            except BaseException as error:
                if done and interrupts.received:  # too late: all is there
                    return
                # A library may have made something else of an interruption.
                cause = KeyboardInterrupt() if interrupts.received else error
                if given.get("debug") and isinstance(cause, Exception):
                    raise
                raise typer.Exit(_explain(cause, name, parameters.signature.parameters)) from error

    shell.__signature__ = parameters.signature  # type: ignore[attr-defined]
    shell.__annotations__ = {n: p.annotation for n, p in parameters.signature.parameters.items()}
    return shell


def _prepare() -> None:
    """Make this process fit for a command, whatever an earlier one left."""
    _check_interpreter()
    clear_scratch()
    quieten()
    _take_any_text()
    keep_freed_memory()


def _take_any_text() -> None:
    """Write names in any script, escaped where the terminal's encoding has not got it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _know_home(arguments: dict[str, Any]) -> None:
    """Read ``~`` in paths where no shell did: behind an equals sign, and in recipes."""
    arguments |= {k: at_home(path) for k, path in arguments.items() if isinstance(path, Path)}


def _explain(error: BaseException, name: str, options: Collection[str]) -> int:
    """Say why a command ended; the exit status."""
    if isinstance(error, KeyboardInterrupt):
        advice = f" Repeat the command to go on{KEEPING[name]}." if name in KEEPING else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            screen.fail(f"{SAID}{advice}")
        return STATUS
    if not isinstance(error, Exception):
        raise error
    message, status = explain(error, options)
    screen.fail(message)
    _drop_what_has_no_room()
    return status


def _drop_what_has_no_room() -> None:
    """Where the output's place is full, let Python end with the command's status, not its own."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # an output that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _processes(shared: bool, name: str) -> Iterator[None]:
    """Join the processes that a launcher started, and let only the first one speak.

    Raises:
        DistributedError: the others cannot be reached, or the command is for one process.
    """
    joined = shared and parallel.world().size > 1  # a recipe's command, in `run`
    if joined or not parallel.launched():
        yield
        return
    if not shared:
        raise DistributedError(
            f"`ghostlayers {name}` runs in one process, but a launcher has started several; start "
            "it without one. Those that share their work: prune, heal, score, eval."
        )
    screen.speak_for(parallel.join())
    try:
        yield
    finally:
        parallel.leave()


def _check_interpreter() -> None:
    """Refuse to run without docstrings, which transformers reads while it opens models."""
    if sys.flags.optimize > 1:
        raise RecipeError(
            "Python runs without docstrings (-OO, or PYTHONOPTIMIZE=2), which transformers needs; "
            "unset it."
        )


def quieten() -> None:
    """Keep loading bars and advice of the libraries below off the screen."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it is imported where it is needed
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # tells that weights are elsewhere
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Unset, it warns of every child; its threads want address space that a limit may not leave.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file whole or not at all, in the first process."""
    if parallel.world().leads:
        write_whole(path, to_json(content))
