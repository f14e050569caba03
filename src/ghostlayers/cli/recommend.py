"""`ghostlayers recommend`."""

from pathlib import Path
from typing import Annotated

from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.compare import command_line
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.compare import Comparison
from ghostlayers.compare.store import check_place
from ghostlayers.plan.units import Plan
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.recommending import Recommendation, Wish
from ghostlayers.recommending import recommend as run_recommendation
from ghostlayers.report.recommended import recommended_grid
from ghostlayers.runtime.scratch import Scratch

ASKED = (
    "less output overwrite data text_column separator sampling windows fit_windows "
    "held_out_windows race_windows sequence_length bos seed eval_data eval_separators max_windows "
    "continuations speed"
)
"""Fields of the wish, the comparison and its recipe, as help shows them."""


@command
def recommend(
    model: o.Model,
    wish: Annotated[Wish, Fields(ASKED, make=Wish.of, of=(Comparison, Recipe))],
    output: o.Out,
    options: Annotated[
        RunOptions, Fields("dtype device batch_size plan revision trust_remote_code")
    ],
    overwrite: o.Overwrite = False,
    plan: o.PlanOnly = False,
    revision: o.Revision = None,
) -> None:
    """The best cut for every engine at 10, 20 and 30 % fewer layers, and the command that makes it.

    A page, results.json and the tables of the comparison behind it lie in the output.
    """

    def show_plan(expected: Plan) -> bool:
        screen.show_plan(expected)
        return not plan

    check_place(output)
    screen.step(f"Loading {model} ...")
    with Scratch("plan") as elsewhere:
        recommendation = run_recommendation(
            model,
            wish,
            out=Path(elsewhere) / "plan" if plan else output,  # a plan leaves what is there alone
            options=options,
            revision=revision,
            overwrite=overwrite,
            command=command_line(),
            say=lambda line: screen.say(screen.dim(line)),
            show_plan=show_plan,
        )
    if recommendation is not None:
        show(recommendation)


def show(recommendation: Recommendation) -> None:
    """The table, and a command for each of its rows."""
    loss = recommendation.dense.loss_nats
    title = "What to take" if loss is None else f"What to take (the dense model's loss: {loss:.3f})"
    screen.table(*recommended_grid(recommendation.results), title)
    screen.say(
        screen.dim(
            "above dense, KL: nats a token, mean of all texts; loops: continuations that end in a "
            "repetition; weights, cache, prefill (time to read a prompt): shares of the dense "
            "model's."
        )
    )
    for row in recommendation.rows:
        screen.say(screen.bold(f"{row.less} for {row.engine}"))
        screen.say(row.command or f"cannot be made: {row.problem}")
    for path in recommendation.written:
        screen.say(f"Written: {path}")
