"""`ghostlayers compare` on the screen."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.parameters import Fields
from ghostlayers.cli.shell import command
from ghostlayers.cli.writing_screen import show_written
from ghostlayers.compare import Comparison
from ghostlayers.compare import compare as run_comparison
from ghostlayers.compare.files import write_report
from ghostlayers.compare.store import check_place
from ghostlayers.errors import RecipeError, counted
from ghostlayers.plan.units import Plan
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.report.accuracies import mean_rows
from ghostlayers.report.results import Results, read_results
from ghostlayers.report.summary import (
    Entry,
    asked,
    at_cut,
    cuts_of,
    layer_counts,
    loss_order,
    summarise,
)
from ghostlayers.report.types_table import file_grid, files_of, says
from ghostlayers.runtime.documents import brief, read_yaml, strict
from ghostlayers.runtime.scratch import Scratch

PUBLISHED_METRICS = ("acc", "ppl", "loss")
"""What a paper's figure may be, as the page compares it with ours."""

FILE_COLUMNS = ("type", "MB", "loss", "above F16", "KL", "read", "written", "memory")
"""Of a table of files on the screen, where `file_grid` has a column for the model, too."""

ASKED = (
    "layers output select repair preset presets yardstick overwrite data text_column separator "
    "sampling windows fit_windows search_windows held_out_windows race_windows sequence_length bos "
    "seed eval_data eval_separators eval_length max_windows tasks tasks_path trust_tasks limit "
    "task_repair prompt continuations speed types engine heal heal_repair published "
    "cosine_axis keep_layers inputs "
    "token_weight ridge absolute_ridge"
)
"""Fields of the request and of the recipe that all models share, as help shows them."""


def request_from(**given: Any) -> Comparison:
    """A request from the options that were given.

    Raises:
        RecipeError: no calibration text is named.
    """
    request = Comparison.from_dict(given)
    without = [n for n in request.presets if request.preset_recipe(n, 1).data is None]
    if request.calibration.data is None and (without or not request.presets):
        raise RecipeError("no calibration text: give --data a file of yours, or a corpus name.")
    return request


@command
def compare(
    model: o.Model,
    request: Annotated[Comparison, Fields(ASKED, make=request_from, of=(Recipe,))],
    output: o.Out,
    options: Annotated[
        RunOptions, Fields("dtype device batch_size plan revision trust_remote_code")
    ],
    overwrite: o.Overwrite = False,
    published: Annotated[
        Path | None,
        o.option(
            "--published",
            text="A YAML list of a paper's cells, set beside ours on the page.",
            panel="Evaluation",
        ),
    ] = None,
    plan: o.PlanOnly = False,
    revision: o.Revision = None,
) -> None:
    """Every selection and every repair of a model side by side: tables and a page to look at."""
    cells = None if published is None else read_published(published)
    check_place(output)

    def show_plan(expected: Plan) -> bool:
        screen.show_plan(expected)
        return not plan

    screen.step(f"Loading {model} ...")
    with Scratch("plan") as elsewhere:
        results = run_comparison(
            model,
            request,
            Path(elsewhere) / "plan" if plan else output,  # a plan leaves what is there alone
            options=options,
            revision=revision,
            overwrite=overwrite,
            say=lambda line: screen.say(screen.dim(line)),
            show_plan=show_plan,
        )
    if not results:
        return
    results["command"] = command_line()
    if cells is not None:
        results["published"] = cells
    written = write_report(results, output)
    show(results)
    for path in written:
        screen.say(f"Written: {path}")


def read_published(path: Path) -> list[dict[str, Any]]:
    """A paper's cells: each with source, layers, select, repair, metric and value.

    Raises:
        RecipeError: the file cannot be read or holds something else.
    """
    cells = read_yaml(path, RecipeError)
    keys = {"source", "layers", "select", "repair", "metric", "value"}
    if not isinstance(cells, list) or not all(
        isinstance(cell, dict) and keys <= set(cell) for cell in cells
    ):
        raise RecipeError(f"'{path}' must be a list of cells, each with {', '.join(sorted(keys))}.")
    for index, cell in enumerate(cells, start=1):
        _check_published(cell, f"'{path}', cell {index}")
    return cells


def _check_published(cell: Mapping[str, Any], where: str) -> None:
    text = dict.fromkeys(("source", "select", "repair", "metric"), ((str,), "text"))
    numbers = {"layers": ((int,), "a whole number"), "value": ((int, float), "a number")}
    for name, (kind, wanted) in {**text, **numbers}.items():
        value = cell[name]
        if isinstance(value, bool) or not isinstance(value, kind) or strict(value) is None:
            raise RecipeError(f"{where}: '{name}' must be {wanted}, got {brief(value)}.")
    if not cell["metric"].startswith(PUBLISHED_METRICS):
        raise RecipeError(
            f"{where}: 'metric' must begin with one of {', '.join(PUBLISHED_METRICS)}, got "
            f"{brief(cell['metric'])}."
        )


def command_line() -> str:
    """The command as typed, without folders of this machine."""
    words = ["ghostlayers", *sys.argv[1:]]
    return shlex.join(
        ",".join(Path(part).name if "/" in part else part for part in word.split(","))
        for word in words
    )


def show(results: Mapping[str, Any]) -> None:
    """One table a number of layers and selection, best first."""
    measured = read_results(results)
    entries = summarise(measured)
    dense = next((entry.loss for entry in entries if entry.key.is_dense), None)
    if measured.presets:
        show_methods(entries, dense)
        show_types(measured)
        show_written(measured, entries)
        return
    columns = ("repair", "loss", "x Ghost", "KL", "added", "prefill", "saved as")
    wanted = layer_counts(asked(entries))
    for layers, select in sorted(cuts_of(entries)):
        models = at_cut(entries, (layers, select))
        title = (
            f"{counted(layers, 'layer')} by {select}: {models[0].removed} (dense {_figure(dense)})"
        )
        if layers not in wanted:
            title += "; not asked for: Ghost with one layer less removed, what that layer is worth"
        screen.table(columns, [_row(entry) for entry in models], title)
    if entries:
        screen.say(
            screen.dim(
                "loss: nats a token, mean of all texts; x Ghost: excess over dense as a share of "
                "Ghost's on the same cut; KL: divergence from dense."
            )
        )
    show_types(measured)
    show_written(measured, entries)
    show_accuracies(measured)
    show_correlations(measured)


def show_methods(entries: Sequence[Entry], dense: float | None) -> None:
    """One table a number of layers, a row a method, best first."""
    columns = ("method", "removed", "loss", "above dense", "KL", "prefill", "saved as")
    for layers in layer_counts(entries):
        ranked = sorted((entry for entry in entries if entry.key.layers == layers), key=loss_order)
        rows = [
            [
                *(entry.key.select, entry.removed, _figure(entry.loss), _figure(entry.excess)),
                *(_row(entry)[3], *_row(entry)[5:]),
            ]
            for entry in ranked
        ]
        screen.table(columns, rows, f"{counted(layers, 'layer')} removed (dense {_figure(dense)})")
    screen.say(
        screen.dim(
            "Each method by its own choices of layers, repair and calibration text; loss: nats a "
            "token, mean of all texts."
        )
    )


def show_types(results: "Results") -> None:
    """Models as GGUF files, and what they say of cutting and quantising."""
    for model in dict.fromkeys(row[0] for row in file_grid(results)[1]):
        rows = [row[1:] for row in file_grid(results)[1] if row[0] == model]
        screen.table(FILE_COLUMNS, rows, f"{model}, as GGUF files in llama.cpp")
    if results.files:
        screen.say(screen.dim("read, written: tokens a second; memory at a context, MB."))
        screen.say(says(files_of(results)))


def show_accuracies(results: "Results") -> None:
    """What each model answered, and whether a repair differs from Ghost beyond chance."""
    tasks = list(dict.fromkeys(row.task for row in results.tasks))
    if not tasks:
        return
    rows = [[title, *figures] for title, *figures in mean_rows(results)]
    columns = ("model", "accuracy", "minus Ghost's", "95% interval", "verdict")
    screen.table(columns, rows, f"Mean of {', '.join(tasks)}" if len(tasks) > 1 else tasks[0])
    screen.say(
        screen.dim(
            "accuracy: length-normalised where the task has it; minus Ghost's: points on the same "
            "documents, paired bootstrap. Each task: results.md, tasks.csv."
        )
    )


def _row(entry: Entry) -> list[str]:
    model = entry.model
    return [
        entry.key.repair + (" (worse than none)" if model.worse_than_none else ""),
        _figure(entry.loss),
        _figure(entry.of_ghost, 2),
        _figure(entry.kl),
        f"{(model.added_parameters or 0) / 1e6:.2f} M",
        "" if model.prefill_ms is None else f"{model.prefill_ms:.0f} ms",
        model.checkpoint or "",
    ]


def _figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show_correlations(results: "Results") -> None:
    """How well scores ranked the spans, where every span was measured."""
    rows = [
        [
            f"{counted(row.layers, 'layer')}, {row.repair}",
            row.score,
            _figure(row.spearman, 2),
            str(row.spans),
        ]
        for row in results.correlations
    ]
    if rows:
        screen.table(("spans ranked by loss", "score", "Spearman", "spans"), rows)
