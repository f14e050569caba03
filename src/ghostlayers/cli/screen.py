"""What appears on the screen: tables, notes and progress bars, all through rich.

Text is text: nothing in it is markup, and what steers a terminal is taken out of it in one place,
`plain`. What is to look otherwise goes through `bold`, `dim` and `good`.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ghostlayers.evaluation import EvaluationResult
from ghostlayers.model import quantized
from ghostlayers.model.dense import BaseModel, DenseModel
from ghostlayers.plan.units import Plan
from ghostlayers.presets import find_preset
from ghostlayers.recipe import CHOOSING, Recipe
from ghostlayers.recipe.decision import Decision
from ghostlayers.repairs import RepairMethod
from ghostlayers.runtime.files import shown_name
from ghostlayers.runtime.parallel import World
from ghostlayers.runtime.progress import Advance, show_by
from ghostlayers.runtime.progress import Progress as Shown
from ghostlayers.runtime.shown import one_line, unbroken
from ghostlayers.statistics.losses import DRAFTED, LossSums, tokens_a_verification
from ghostlayers.surgery.features import basis_note

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


_place = World()

Part = str | Text
"""A piece of a line: plain text, or one that `bold`, `dim` or `good` made."""


def plain(*parts: Part, style: str = "") -> Text:
    """Pieces of text as they may be printed: without control characters, and nothing as markup.

    Each is on one line: a name may hold line breaks, and what a caller wants below is another line.
    """
    return Text.assemble(
        *(Text(unbroken(p)) if isinstance(p, str) else p for p in parts), style=style
    )


def bold(text: object) -> Text:
    """What matters in a line."""
    return plain(str(text), style="bold")


def dim(text: object) -> Text:
    """A remark."""
    return plain(str(text), style="dim")


def good(text: object) -> Text:
    """The best number of a column."""
    return plain(str(text), style="bold green")


def show_text(preview: str) -> None:
    """How the calibration text begins: on one line, and nothing in it is taken as a command."""
    say(dim(f"Calibration text: {one_line(preview)}"))


def show_basis(model: DenseModel, method: RepairMethod) -> None:
    """Whether a Hadamard basis is not the authors' own."""
    note = basis_note(model, method)
    if note is not None:
        say(note)


def show_preset(recipe: Recipe, dtype: Any) -> None:
    """Every choice that a preset makes, those that were made otherwise marked."""
    if recipe.preset is None:
        return
    preset = find_preset(recipe.preset)
    say(bold(preset.title), f", arXiv:{preset.paper}; code: {preset.code}")
    chosen = {**preset.choices, "dtype": preset.dtype}
    if recipe.remove is not None:
        chosen = {key: value for key, value in chosen.items() if key not in CHOOSING}
    computed = str(dtype).removeprefix("torch.")
    now = {**recipe.to_dict(), "dtype": "auto" if preset.dtype == "auto" else computed}
    say("  ", ", ".join(choice(name, value, now[name]) for name, value in chosen.items()))
    for difference in preset.differs:
        say("  ", dim(f"not as there: {difference}"))


def choice(name: str, preset: Any, now: Any) -> str:
    """A choice of a preset, and what it should have been."""
    return f"{name} {now!r}" + ("" if now == preset else f" (not {preset!r})")


def speak_for(place: World) -> None:
    """Of several processes, only the first shows what is done; the others only why they stop."""
    global _place
    _place = place
    out.quiet = err.quiet = not place.leads


class Bars:
    """One progress bar a stage on the error stream; silent when that is not a terminal."""

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Advance]:
        """Show a bar for one stage."""
        if total == 0 or err.quiet or not sys.stderr.isatty():
            yield _ignore
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as bars:
            task = bars.add_task(unbroken(description), total=total)
            yield lambda units=1: bars.advance(task, units)


def _ignore(units: int = 1) -> None:
    del units


def show_progress(by: Shown | None = None) -> None:
    """Draw a bar for every stage of what runs from now on, as the commands do.

    Args:
        by: anything with a method ``stage(description, total)`` that gives a context manager, whose
            value is called with the number of units done; instead of bars in the terminal.
    """
    show_by(by or Bars())


def say(*parts: Part) -> None:
    """A line of ordinary output."""
    out.print(plain(*parts), soft_wrap=True)


def step(text: str) -> None:
    """What is being done now; not part of the result, so it goes to the error stream."""
    if sys.stderr.isatty():
        err.print(dim(text))


def warn(text: str) -> None:
    """Something that the user should know before trusting the result."""
    err.print(plain(Text("Warning: ", style="bold yellow"), text))


def fail(text: str) -> None:
    """Why nothing was made."""
    err.quiet = False
    of = "" if _place.size == 1 else f" in process {_place.rank} of {_place.size}"
    err.print(plain(Text(f"Error{of}: ", style="bold red"), text), soft_wrap=True)


WIDEST = 1000
"""Characters of a table that is not shown on a terminal."""


def table(columns: Sequence[str], rows: Sequence[Sequence[Part]], title: str | None = None) -> None:
    """A table: the first column left, the others right."""
    heading = None if title is None else plain(title, style="bold")
    grid = Table(title=heading, title_justify="left", title_style="bold")
    longest = max((len(word) for word in columns[0].split()), default=1)
    grid.add_column(plain(columns[0]), overflow="fold", min_width=longest)
    for column in columns[1:]:
        # Numbers are never squeezed; a long name in the first column folds instead.
        grid.add_column(plain(column), justify="right", no_wrap=True, min_width=len(column))
    for row in rows:
        grid.add_row(*map(plain, row))
    # A file or a pipe has no edge that a wide table would be cut at.
    width = out.width
    if not out.is_terminal:
        whole = Measurement.get(out, out.options.update(width=WIDEST), grid).maximum
        out.width = max(width, whole)
    out.print(grid)
    out.width = width


def show_plan(plan: Plan) -> None:
    """What a run will take, and how many layers a budget asks for."""
    if plan.budget is not None:
        show_foreseen(plan.budget)
    rows = [
        _plan_cells(line.name, line.seconds, line.flops, line.memory, line.disk)
        for line in plan.lines
    ]
    total = _plan_cells("in all", plan.seconds, plan.flops, plan.memory, plan.disk)
    table(("what this run will take here", "time", "TFLOP", "memory", "disk"), [*rows, total])
    if plan.memory > plan.available:
        most = f"{plan.available / 2**30:.2f} GiB"
        warn(f"that is more memory than there is for it ({most}), so it may not fit.")
    passed = time.time() - _began
    say(f"Beside the {duration(passed)} that starting, opening the model and this look at it took.")


def show_foreseen(decision: Decision) -> None:
    """How a budget comes to a number of layers, before they are chosen."""
    first, *others = decision.says
    say(bold(decision.asked), ": ", first)
    for other in others:
        say(dim(other))


def show_decision(decision: Decision) -> None:
    """How a budget came to the layers that were chosen, and whether quantising does better."""
    say(bold(decision.asked), ": ", decision.says[0])
    if decision.counted == "loss":
        for sentence in decision.says[1:]:
            say(dim(sentence))
    if decision.quantising is not None and decision.alternative is not None:
        say(decision.quantising)
        say(f"  {decision.alternative['command']}")


_began = psutil.Process().create_time()


def begin_anew() -> None:
    """One more command starts in the same process."""
    global _began
    _began = time.time()


def _plan_cells(name: str, seconds: float, flops: float, memory: int, disk: int) -> list[str]:
    written = f"{disk / 1e9:.2f} GB" if disk else ""
    return [name, duration(seconds), f"{flops / 1e12:,.2f}", f"{memory / 2**30:.2f} GiB", written]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two or three digits."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def show_evaluation(results: Sequence[EvaluationResult]) -> None:
    """Perplexity by corpus, with the protocol that it was measured under."""
    compared = any(result.dense is not None for result in results)
    columns = ["corpus", "tokens", "loss", "perplexity"]
    columns += ["KL to dense", "agreement"] if compared else []
    rows = []
    for result in results:
        row = [
            shown_name(result.corpus),
            f"{result.sums.num_tokens:,}",
            f"{result.sums.loss_nats:.4f}",
            f"{result.perplexity:.2f}",
        ]
        if result.dense is None:
            rows.append(row)
            continue
        rows.append([*row, f"{result.sums.kl_nats:.4f}", f"{result.sums.agreement:.1%}"])
        dense = [f"{result.dense.loss_nats:.4f}", f"{result.dense.perplexity:.2f}"]
        rows.append(["  the dense model", "", *dense, "", ""])
    table(columns, rows)
    for result in results:
        say(dim(f"{result.corpus}: {protocol(result)}"))
        if result.dense is not None:
            say(dim(f"{result.corpus}: {as_draft(result.sums)}"))
        if result.calibration_overlap:
            warn(
                f"{result.calibration_overlap} documents of {result.corpus} also served as "
                "calibration of this model: its loss there flatters it."
            )


def protocol(result: EvaluationResult) -> str:
    """How a perplexity was measured, in one line."""
    which = f"the first {result.num_windows}"
    if result.complete:
        every = result.num_windows == result.available_windows
        which = f"{'all' if every else which} of {result.available_windows}"
    seen = {None: "", 0: "; no document served as calibration"}.get(result.calibration_overlap, "")
    return (
        f"{which} windows of {result.sequence_length} tokens, not overlapping, "
        f"{'BOS before each' if result.bos else 'no BOS'}{seen}"
    )


def as_draft(sums: LossSums) -> str:
    """What a divergence means for speculative decoding, in one line."""
    tokens = tokens_a_verification(sums.acceptance)
    return (
        f"total variation {sums.total_variation:.3f}; as a draft of the dense model "
        f"{sums.acceptance:.1%} of the tokens are kept, {tokens:.2f} a verification of {DRAFTED}"
    )


def show_expanded(base: BaseModel, *, stays: bool = False) -> None:
    """That weights are quantised, and what is computed with."""
    if base.quantized:
        say(f"Its weights were {quantized.expanded(base.quantized)}")
    if base.file is not None:
        say(
            f"Its weights are those of {base.file.name}, de-quantised; every loss below is of them."
            + ("" if stays else " A folder will hold them in 16 bits; -o FILE.gguf as they are.")
        )


def perplexity(loss_nats: float) -> float:
    """The exponential of a loss, capped where it would overflow."""
    return math.exp(min(loss_nats, 700.0))


def prose(rows: Sequence[Sequence[str]]) -> None:
    """Labelled paragraphs side by side with their labels."""
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(plain, row))
    out.print(grid)


def loss_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of losses, as cells."""
    return [
        f"{row['loss_nats']:.3f}",
        f"{row['perplexity']:.2f}",
        f"{row['kl_nats']:.3f}",
        f"{row['greedy_agreement']:.1%}",
    ]
