"""`ghostlayers write-data`."""

from pathlib import Path
from typing import Annotated

from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.recipe import RunOptions
from ghostlayers.recipe.writing import WritingRecipe
from ghostlayers.runtime.settings import WHAT
from ghostlayers.writing import writing
from ghostlayers.writing.composing import Written, faults_in_words

ASKED = (
    "prompts prefixes rows prefix_tokens new_tokens temperature greedy overwrite text_column "
    "separator bos seed engine"
)
"""Fields of the recipe, as help shows them."""


@command
def write_data(
    model: o.Model,
    output: Annotated[
        Path, o.option("--output", "-o", text="The .jsonl file to make.", panel=WHAT)
    ],
    recipe: Annotated[WritingRecipe, Fields(ASKED)],
    options: Annotated[RunOptions, Fields(f"{o.RUN} restart revision trust_remote_code")],
    overwrite: o.OverwriteFile = False,
    restart: o.Restart = False,
    revision: o.Revision = None,
) -> None:
    """Write training text with the dense model itself: its own answers, or continuations."""
    if writing.draft_for(output).is_file() and not restart:
        screen.step(f"Going on with what an interrupted run wrote for {output} ...")
    screen.step(f"Loading {model} ...")
    done = writing.write_data(
        model,
        output,
        recipe,
        options=options,
        revision=revision,
        overwrite=overwrite,
        restart=restart,
    )
    _show(done, output)


def _show(done: Written, path: Path) -> None:
    """How many rows are whose, and why others are not the model's."""
    sources = done.sources
    screen.say(
        f"Wrote {len(done.rows):,} rows to {path}: {sources['dense']:,} by the dense model, "
        f"{sources['reference']:,} with the reference answer, {sources['dropped']:,} dropped. "
        f"Not kept of what the model wrote: {faults_in_words(done.faults)}."
    )
