"""What appears on the screen: tables, notes and progress bars, all through rich.

Text is text: nothing in it is markup, and what steers a terminal is taken out of it in one place,
`plain`. What is to look otherwise goes through `bold`, `dim` and `good`.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
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

from ghostlayers.checkpoint.hub import Upload
from ghostlayers.checkpoint.proof import Verification, mode_of
from ghostlayers.checkpoint.record import evidence_row
from ghostlayers.errors import GhostlayersError
from ghostlayers.evaluation import EvaluationResult
from ghostlayers.model import quantized
from ghostlayers.model.dense import BaseModel, DenseModel
from ghostlayers.plan.units import Plan
from ghostlayers.presets import find_preset
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import CHOOSING, Recipe
from ghostlayers.repairs import find_method
from ghostlayers.runtime.files import shown_name
from ghostlayers.runtime.parallel import World
from ghostlayers.runtime.progress import Advance
from ghostlayers.runtime.shown import clean, one_line
from ghostlayers.selection import ScoreTable, SpanScore
from ghostlayers.selection.births import GROWTH, MASSIVE
from ghostlayers.selection.choices import shortlist
from ghostlayers.spans import Span, format_layers
from ghostlayers.surgery.features import basis_note

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


_place = World()

Part = str | Text
"""A piece of a line: plain text, or one that `bold`, `dim` or `good` made."""


def plain(*parts: Part, style: str = "") -> Text:
    """Pieces of text as they may be printed: without control characters, and nothing as markup."""
    return Text.assemble(*(Text(clean(p)) if isinstance(p, str) else p for p in parts), style=style)


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


def show_basis(model: DenseModel, repair: str) -> None:
    """Whether a Hadamard basis is not the authors' own."""
    note = basis_note(model, find_method(repair))
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
    say("  ", ", ".join(_choice(name, each, now[name]) for name, each in chosen.items()))
    for each in preset.differs:
        say("  ", dim(f"not as there: {each}"))


def _choice(name: str, preset: Any, now: Any) -> str:
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
            task = bars.add_task(clean(description), total=total)
            yield lambda units=1: bars.advance(task, units)


def _ignore(units: int = 1) -> None:
    del units


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


def table(columns: Sequence[str], rows: Sequence[Sequence[Part]], title: str | None = None) -> None:
    """A table: the first column left, the others right."""
    heading = None if title is None else plain(title, style="bold")
    grid = Table(title=heading, title_justify="left", title_style="bold")
    grid.add_column(plain(columns[0]), overflow="fold")
    for column in columns[1:]:
        # Numbers are never squeezed; a long name in the first column folds instead.
        grid.add_column(plain(column), justify="right", no_wrap=True, min_width=len(column))
    for row in rows:
        grid.add_row(*map(plain, row))
    out.print(grid)


def show_plan(plan: Plan) -> None:
    """What a run will take, a stage a line."""
    rows = [
        _plan_cells(each.name, each.seconds, each.flops, each.memory, each.disk)
        for each in plan.stages
    ]
    total = _plan_cells("in all", plan.seconds, plan.flops, plan.memory, plan.disk)
    table(("what this run will take here", "time", "TFLOP", "memory", "disk"), [*rows, total])
    passed = time.time() - _began
    say(f"Beside the {duration(passed)} that starting, opening the model and this look at it took.")


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


def show_cut(pruned: PrunedModel) -> None:
    """The removed and the kept layers, and what to beware of."""
    say(
        "Removed: layers ",
        bold(format_layers(pruned.removed)),
        f" ({len(pruned.removed)} of {pruned.num_layers}; counted from 0, ends included)",
    )
    say("Kept:    layers ", bold(format_layers(pruned.kept)))
    for span in pruned.births:
        warn_birth(span)


def warn_birth(span: Span) -> None:
    """A massive activation is born inside a removed span."""
    warn(
        f"a massive activation is born inside the removed layers {format_layers(span.layers)}: "
        f"some tokens grow to more than {MASSIVE:g} times the median norm there, which a linear "
        "repair imitates badly. Try another span (ghostlayers score shows them all)."
    )


def show_evidence(pruned: PrunedModel) -> None:
    """Losses of the dense, the cut and the repaired model on held-out calibration windows."""
    if not pruned.evidence:
        return
    rows = []
    for name, sums in pruned.evidence.items():
        row = evidence_row(name, sums)
        label = f"{name} ({pruned.recipe.repair})" if name == "repaired" else name
        rows.append([label, *_loss_cells(row)])
    text = pruned.record["evidence_text"]
    table(
        ("", "loss", "perplexity", "KL to dense", "agreement"),
        rows,
        f"On {text['windows']} held-out windows of {text['sequence_length']} tokens of "
        f"{shown_name(str(text['corpus']))} ({text['bos']})",
    )
    repaired, cut = pruned.evidence.get("repaired"), pruned.evidence["cut"]
    if repaired is not None and repaired.loss_nats >= cut.loss_nats:
        tokens = max((each.num_tokens for each in pruned.repairs.values()), default=0)
        warn(
            f"the repair makes this cut worse than no repair at all on held-out text "
            f"({repaired.loss_nats:.3f} against {cut.loss_nats:.3f} nats). It was fitted on "
            f"{tokens:,} tokens: give it more (--fit-windows){_damped(pruned.recipe.repair)}, or "
            "remove other layers."
        )


def _damped(repair: str) -> str:
    """Advice to let held-out tokens choose the damping of a repair that can."""
    try:
        find_method(f"{repair}:ridge=auto")
    except GhostlayersError:
        return ""
    return f", let held-out tokens choose its damping (--repair {repair}:ridge=auto)"


def _loss_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['loss_nats']:.3f}",
        f"{row['perplexity']:.2f}",
        f"{row['kl_nats']:.3f}",
        f"{row['greedy_agreement']:.1%}",
    ]


def show_candidates(scores: ScoreTable) -> None:
    """The shortlist of spans whose loss was measured."""
    listed = set(shortlist(scores))
    show_spans([each for each in scores.spans if each.span in listed], scores, "Shortlist")
    show_score_notes()


def show_spans(spans: Sequence[SpanScore], scores: ScoreTable, title: str) -> None:
    """Scores of spans, the best of each column in bold."""
    best = {
        "cosine": max(each.cosine for each in spans),
        "angular": min(each.angular for each in spans),
        "residual": min((each.residual for each in spans if each.residual is not None), default=0),
        "loss": min((each.loss for each in spans if each.loss is not None), default=0),
    }
    rows: list[list[Part]] = []
    for each in spans:
        loss: Part = "" if each.loss is None else _mark(each.loss, best["loss"], 3)
        if each.loss_tokens < scores.num_loss_tokens and each.loss is not None:
            loss = plain("~", loss)
        residual = "" if each.residual is None else _mark(each.residual, best["residual"], 4)
        rows.append(
            [
                format_layers(each.span.layers),
                _mark(each.cosine, best["cosine"], 4),
                _mark(each.angular, best["angular"], 4),
                residual,
                loss,
                "yes" if each.birth else "",
            ]
        )
    apart = scores.scattered
    if apart is not None and scores.spans and len(spans) > 1:
        rows.append([format_layers(apart.layers), "", "", "", f"{apart.loss:.3f}", ""])
    if scores.dense_loss is not None:
        title += f" (dense loss {scores.dense_loss:.3f} nats on the same windows)"
    columns = ("layers", "cosine", "angular", "residual", "repaired loss", "massive birth")
    table(columns, rows, title)


def show_steps(scores: ScoreTable) -> None:
    """The layers in the order in which a search removed them."""
    rows = [
        [str(number), str(step.layer), "" if step.loss is None else f"{step.loss:.3f}"]
        for number, step in enumerate(scores.steps, start=1)
    ]
    table(("step", "layer removed", "loss after it"), rows, "Layers in the order of their removal")


def _mark(value: float, best: float, digits: int) -> Part:
    text = f"{value:.{digits}f}"
    return good(text) if value == best else text


def show_block_influence(scores: ScoreTable) -> None:
    """Block Influence of every layer, lowest first in bold."""
    lowest = min(scores.block_influence)
    rows = [
        [str(layer), _mark(value, lowest, 4), f"{median:.1f}", f"{largest:.1f}"]
        for layer, (value, median, largest) in enumerate(
            zip(
                scores.block_influence,
                scores.norms.median()[1:],
                scores.norms.largest()[1:],
                strict=True,
            )
        )
    ]
    table(("layer", "Block Influence", "median norm after", "largest norm after"), rows)


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


SCORE_NOTES = (
    "cosine: mean over tokens, before against after the span; high is similar.\n"
    "angular: angle over pi, at the last token of each window only; low is similar.\n"
    "residual: what a linear map across the span leaves of each token, on held-out tokens; low is "
    "replaceable.\n"
    "repaired loss: nats a token after a quick repair (from a sample of tokens; Ghost's where the "
    "one asked for reads more than the stream), on held-out windows, for the best spans by either; "
    "~ on fewer tokens, given up because others lose clearly less.\n"
    f"massive birth: a token's norm rises above {MASSIVE:g} times the median norm inside the span, "
    f"by a factor of {GROWTH:g} or more relative to it."
)


def show_score_notes() -> None:
    """What the columns of `show_spans` mean."""
    say(dim(SCORE_NOTES))


def show_adapter(pruned: PrunedModel, out_folder: Path, verification: Verification) -> None:
    """Where the adapter lies, how large it is, and what to do next."""
    size = sum(path.stat().st_size for path in out_folder.iterdir()) / 1e6
    place = str(out_folder)
    say("Saved: ", bold(place), f", {size:.1f} MB; the model made of it again has logits")
    say(f"{_equality(verification)}.\n\nNext:")
    say(f'  ghostlayers.from_adapter("{place}")   # needs {pruned.dense.base.name}')
    say(f"  ghostlayers materialize {place} -o {place}-whole")


def show_upload(upload: Upload) -> None:
    """What was sent to the hub, or would be."""
    width = max(map(len, upload.files))
    for name, size in upload.files.items():
        say(f"  {name.ljust(width)}  {size / 1e6:10,.2f} MB")
    if upload.left:
        say(f"Not part of the model, and not sent: {', '.join(upload.left)}")
    total = sum(upload.files.values()) / 1e6
    if upload.url is None:
        say(f"{total:,.2f} MB would go to {upload.repo}; nothing was sent. Its card:")
        say(upload.card)
        return
    say(f"{total:,.2f} MB sent: {upload.url}")


def show_exported(file: Path) -> None:
    """Where the GGUF file lies, and how to use it."""
    size = file.stat().st_size / 1e6
    say("Saved: ", bold(file), f", {size:,.0f} MB, every tensor read again and equal.")
    small = file.with_name(f"{file.stem}-q4_k_m.gguf")
    say(f'\nNext:\n  llama-cli -m {file} -p "..."')
    say(f"  llama-quantize {file} {small} Q4_K_M")


def show_materialized(out_folder: Path, verification: Verification) -> None:
    """Where the checkpoint lies, and how it was proved."""
    proof = f", reloaded in a fresh process, logits {_equality(verification)}."
    say("Saved: ", bold(out_folder), proof)


def _equality(verification: Verification) -> str:
    if verification.identical:
        return "equal bit for bit"
    return f"equal to {verification.largest_difference:.1e}"


ENGINES = {
    "stock": "A stock checkpoint: whatever runs the base model runs it (transformers, vLLM, "
    "llama.cpp, ...), with no flag.",
    "custom": "A custom checkpoint: transformers and vLLM run it, with trust_remote_code or with "
    "ghostlayers installed (in transformers, imported). For llama.cpp and others choose --repair "
    "refit:3:ridge=auto.",
}
"""Who loads a checkpoint of either kind."""


def show_pruned(pruned: PrunedModel) -> None:
    """How the layers were chosen, which they are, and what the cut and its repair cost."""
    table = pruned.table
    if table is not None and table.dense_loss is not None:
        show_candidates(table)
    if table is not None and table.steps:
        show_steps(table)
    show_cut(pruned)
    show_evidence(pruned)


def show_saved(pruned: PrunedModel, out_folder: Path, verification: Verification) -> None:
    """Where the checkpoint lies, how it was proved, and what to do next."""
    show_materialized(out_folder, verification)
    stock = mode_of(pruned.model) == "stock"
    trust = "" if stock else ", trust_remote_code=True"
    say(ENGINES["stock" if stock else "custom"])
    say("\nNext:")
    opens = pruned.record.get("loads_with", "AutoModelForCausalLM")
    say(f'  {opens}.from_pretrained("{out_folder}"{trust})')
    base = pruned.dense.base.name
    say(f"  ghostlayers eval {out_folder} --against {base} --data wikitext2")
    say(f"  ghostlayers inspect {out_folder}")


def show_expanded(base: BaseModel) -> None:
    """That weights were quantised, and no longer are."""
    if base.quantized:
        say(f"Its weights were {quantized.expanded(base.quantized)}")


def show_record(record: Mapping[str, Any]) -> None:
    """A checkpoint's record."""
    base, cut, recipe = record["base_model"], record["cut"], record["recipe"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    say(
        "Base model: ", bold(base["name"]), f"{revision}, licence {base['licence'] or 'not stated'}"
    )
    say("Removed: layers ", bold(format_layers(cut["removed"])))
    say("Kept:    layers ", bold(format_layers(cut["kept"])))
    chosen = "named by the user" if recipe["remove"] else f"chosen by {recipe['select']}"
    chosen += ", one at a time" if recipe.get("iterative") else ""
    say(f"Layers {chosen}; checkpoint mode: {record['mode']}")
    rows = [
        [
            f"[{fit['span'][0]}, {fit['span'][1]})",
            fit["method"],
            f"{fit['num_tokens']:,}",
            "" if fit["relative_residual"] is None else f"{fit['relative_residual']:.3f}",
            "" if fit["condition_number"] is None else f"{fit['condition_number']:.1e}",
        ]
        for fit in record["repairs"]
    ]
    table(("gap", "repair", "fit tokens", "relative residual", "condition number"), rows)
    if record["evidence"]:
        evidence = [[row["model"], *_loss_cells(row)] for row in record["evidence"]]
        columns = ("", "loss", "perplexity", "KL to dense", "agreement")
        table(columns, evidence, "On held-out calibration windows")
    text = record["calibration"]
    say(
        f"Calibrated on {text['fit_windows']} of {text['windows']} windows of "
        f"{text['sequence_length']} tokens ({text['bos']}) of {text['corpus']}, "
        f"{len(text['documents'])} documents"
    )
    made_with = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    say(f"Made on {record['created']} with {made_with}")


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
