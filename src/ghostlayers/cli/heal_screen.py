"""How training went, on the screen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghostlayers.checkpoint.proof import Verification, mode_of
from ghostlayers.cli.saved_screen import ENGINES, show_materialized
from ghostlayers.cli.screen import duration, loss_cells, say, table, warn
from ghostlayers.healed import HealedModel
from ghostlayers.runtime.files import shown_name

COLUMNS = ("", "loss", "perplexity", "KL to dense", "agreement")


def show_healed(healed: HealedModel) -> None:
    """What was trained, and losses before, on the way and after."""
    show_healing(healed.record["healing"])
    outcome = healed.outcome
    if not outcome.text.other:
        warn(
            "the held-out windows are of the training text; what was gained elsewhere is not "
            "known. Name another text with --held-out."
        )
    repeats = max(outcome.text.repeats)
    if repeats > 4:
        warn(f"the training text was gone through {repeats:.1f} times; more text would be better.")


def show_healing(row: Mapping[str, Any]) -> None:
    """A record's entry of a training."""
    text = row["held_out"]
    corpora = ", ".join(
        f"{shown_name(each['corpus'])} ({each['share']:.0%})" for each in row["corpora"]
    )
    say(
        f"Trained {' + '.join(row['trained'])} ({row['num_trained']:,} numbers) on "
        f"{row['tokens']:,} tokens of {corpora}, {row['steps']:,} steps, in "
        f"{duration(row['seconds'])}."
    )
    rows = [[each["model"], *loss_cells(each)] for each in row["evidence"]]
    table(COLUMNS, rows, f"On {text['windows']} held-out windows of {shown_name(text['corpus'])}")
    dense, before, healed = (each["loss_nats"] for each in row["evidence"])
    if before > dense:
        say(f"Left of what was lost: {(healed - dense) / (before - dense):.0%}.")
    if row["best_step"] < row["steps"]:
        say(f"The best state was that behind step {row['best_step']:,}.")


def show_saved(
    healed: HealedModel, out_folder: Path, verification: Verification, save: str
) -> None:
    """Where the result lies, how it was proved, and what to do next."""
    show_materialized(out_folder, verification)
    base = healed.cut.dense.base.name
    if save == "adapter":
        say("\nNext:")
        say(f'  ghostlayers.from_adapter("{out_folder}")   # needs {base}')
        return
    stock = mode_of(healed.model) == "stock"
    say(ENGINES["stock" if stock else "custom"])
    say("\nNext:")
    say(f"  ghostlayers eval {out_folder} --against {base} --data wikitext2")
    say(f"  ghostlayers inspect {out_folder}")
