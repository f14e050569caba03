"""The commands by name. Each is imported when it is called, so that help and version are quick."""

import atexit
import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ghostlayers.cli.narrow import Readable
from ghostlayers.runtime.interrupts import leave_with
from ghostlayers.runtime.launchers import is_first
from ghostlayers.runtime.quiet import quiet_imports

WHAT = "Remove decoder layers from a language model, and repair every cut in closed form."

COMMANDS = {
    "prune": "Remove layers, repair every gap, write a checkpoint, and prove that it reloads.",
    "heal": "Train a cut model for minutes, against the dense one, and prove that it reloads.",
    "merge": "Merge two healed checkpoints of one cut into one, and prove that it reloads.",
    "write-data": "Write training text with the dense model itself: its own answers, or "
    "continuations.",
    "materialize": "Write the whole checkpoint that an adapter describes, and prove that it "
    "reloads.",
    "export": "Write a checkpoint as a GGUF file, or one of each type, and prove what they hold.",
    "push": "Share a checkpoint or an adapter on the Hugging Face Hub, with its model card.",
    "eval": "Perplexity of any causal language model, and its divergence from a dense one.",
    "score": "Score every layer, and every span of N layers: cosine, residual, loss after repair.",
    "inspect": "What was removed, kept and repaired in a checkpoint, and on what evidence.",
    "demo": "The whole pipeline on a real language model (SmolLM2-135M), in about two minutes.",
    "methods": "The published methods, each as its authors and their code run it, repairs, "
    "selections.",
    "compare": "Every selection and every repair of a model side by side: tables and a page to "
    "look at.",
    "recommend": "The best cut for every engine at 10, 20 and 30 % fewer layers, and the command "
    "that makes it.",
    "bench": "Latency, throughput and memory of a model beside the dense one and the bare cut.",
    "run": "Run a command whose options stand in a YAML file.",
}
"""What each does: the first paragraph of its own help."""

PLACES = {
    "eval": ("evaluate", "evaluate"),
    "inspect": ("inspection", "inspect_checkpoint"),
    "write-data": ("write_data", "write_data"),
}
"""Module and function of a command, where these are not called as it is."""


PROVING = {"prune", "heal", "merge", "materialize"}
"""Commands that load what they wrote in a fresh process, which begins to import when they do."""

WITHOUT_PROOF = {"--help", "--plan", "adapter"}
"""Arguments with which they do not."""


NO_ROOM = (
    "Error: out of memory before anything was opened. Free some, or raise the limit that this "
    "process runs under (ulimit -v)."
)


def command_named(name: str) -> Callable[..., None]:
    """The function that carries out a command."""
    # With it other libraries fetch compiled code from the hub as they are imported, unasked.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    module, function = PLACES.get(name, (name, name))
    with quiet_imports():
        return getattr(import_module(f"{__package__}.{module}"), function)  # type: ignore[no-any-return]


def _proves(args: Sequence[str]) -> bool:
    """Whether a command will load a folder that it made in a fresh process."""
    outputs = {after for before, after in pairwise(args) if before in {"-o", "--output"}}
    one_file = any(output.endswith(".gguf") for output in outputs)
    return not one_file and not {*args} & WITHOUT_PROOF


@functools.cache
def _settle() -> None:
    """Look for no garbage among all that was imported, be it at the end: that takes a second."""
    gc.freeze()
    atexit.register(gc.freeze)


class Later(TyperCommand):
    """A command that is imported once its arguments are to be read."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """The context of the command itself."""
        completes = bool(extra.get("resilient_parsing"))  # for a shell, which runs nothing
        if self.name in PROVING and _proves(args) and is_first() and not completes:
            from ghostlayers.checkpoint import readiness

            with contextlib.suppress(OSError):  # told where the command needs that disk itself
                readiness.be_ready()
        try:
            itself = self._itself()
        except (MemoryError, SystemError, ImportError) as error:
            if isinstance(error, ImportError) and "map segment" not in str(error):
                raise
            typer.echo(NO_ROOM, err=True)  # the screen itself may be what could not be imported
            leave_with(1)  # half-imported libraries would fail again as they end
        return itself.make_context(info_name, args, *more, **extra)

    def _itself(self) -> Any:
        one = typer.Typer(rich_markup_mode="rich", add_completion=False)
        one.command(self.name, cls=Readable)(command_named(str(self.name)))
        _settle()
        from ghostlayers.cli.screen import show_progress

        show_progress()
        return get_command(one)


class Commands(TyperGroup):
    """All of them, in the order of `COMMANDS`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: Later(name, help=what) for name, what in COMMANDS.items()}


app = typer.Typer(
    name="ghostlayers",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=WHAT,
)


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        from importlib.metadata import version as installed

        typer.echo(f"ghostlayers {installed('ghostlayers')}")
        raise typer.Exit


@app.callback(help=WHAT)
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Read the options of no command."""
    del show_version
