"""`ghostlayers compare` on the screen."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from ghostlayers.cli import options as o
from ghostlayers.cli import screen
from ghostlayers.cli.shell import command
from ghostlayers.compare import Comparison
from ghostlayers.compare import compare as run_comparison
from ghostlayers.compare.files import write_report
from ghostlayers.errors import RecipeError
from ghostlayers.plan.units import Plan
from ghostlayers.recipe import RunOptions
from ghostlayers.report.accuracies import mean_rows
from ghostlayers.report.summary import Entry, at_cut, cuts_of, layer_counts, loss_order, summarise
from ghostlayers.runtime.documents import brief, read_yaml, strict
from ghostlayers.runtime.scratch import Scratch

PUBLISHED_METRICS = ("acc", "ppl", "loss")
"""What a paper's figure may be, as the page compares it with ours."""

_WHAT = "What to compare"
_TEXT = "Evaluation"

Layers = Annotated[
    str,
    o._option("--layers", "-n", text="How many decoder layers to remove: 3,5,7.", panel=_WHAT),
]
Presets = Annotated[
    str | None,
    o._option(
        "--presets",
        metavar="NAMES",
        text="Instead of selections and repairs: published methods, comma-separated, or 'all', "
        "each by its own choices ('ghostlayers methods'). Options given here win over every "
        "method's.",
        panel=_WHAT,
    ),
]
Select = Annotated[
    str | None,
    o._option(
        "--select",
        metavar="NAMES",
        text="Selections, comma-separated; ':iterative' behind a name chooses one layer at a time, "
        "'every' takes each contiguous span. \\[default: streamline,recoverable]",
        panel=_WHAT,
    ),
]
Repairs = Annotated[
    str | None,
    o._option(
        "--repair",
        metavar="NAMES",
        text="Repairs, comma-separated, arguments behind colons: ghost,joint:x+z,piecewise:8; "
        "'all' for every one that the model has what it needs for. "
        "\\[default: none,linearpatch-diag,replaceme,refit:3,ghost]",
        panel=_WHAT,
    ),
]
EvalData = Annotated[
    str | None,
    o._option(
        "--eval-data",
        text="Corpora, comma-separated: c4, wikitext2 (from the hub), or files.",
        panel=_TEXT,
    ),
]
EvalSeparator = Annotated[
    list[str] | None,
    o._option(
        "--eval-separator",
        text="Joins the documents of each; once for all corpora, or once for each in order. "
        "\\[default: a blank line]",
        panel=_TEXT,
    ),
]
MaxWindows = Annotated[
    int | None,
    o._option(
        "--max-windows",
        min=1,
        text="Evaluate the first so many windows of each corpus. \\[default: all]",
        panel=_TEXT,
    ),
]
TaskRepair = Annotated[
    str | None,
    o._option(
        "--task-repair",
        metavar="NAMES",
        text="Repairs whose models answer the tasks, comma-separated. \\[default: all]",
        panel="Tasks",
    ),
]
Prompt = Annotated[
    str | None,
    o._option("--prompt", text="Continued by every model; '' for none.", panel=_TEXT),
]
EvalLength = Annotated[
    int | None,
    o._option(
        "--eval-length",
        min=2,
        text="Tokens of an evaluation window. \\[default: --sequence-length, or 2048]",
        panel=_TEXT,
    ),
]
Speed = Annotated[
    bool,
    o._option(
        "--speed/--no-speed", text="Measure the time to read a prompt. \\[default: on]", panel=_TEXT
    ),
]
Published = Annotated[
    Path | None,
    o._option(
        "--published",
        text="A YAML list of a paper's cells, set beside ours on the page.",
        panel=_TEXT,
    ),
]
Yardstick = Annotated[
    bool,
    o._option(
        "--yardstick/--no-yardstick",
        text="Also measure Ghost with one layer less removed. \\[default: on]",
        panel=_WHAT,
    ),
]


@command
def compare(
    model: o.Model,
    layers: Layers,
    output: o.Out,
    select: Select = None,
    repair: Repairs = None,
    preset: o.PresetOption = None,
    presets: Presets = None,
    yardstick: Yardstick = True,
    overwrite: o.Overwrite = False,
    data: o.Data = None,
    text_column: o.TextColumn = None,
    separator: o.Separator = None,
    sampling: o.SamplingOption = None,
    windows: o.WindowsOption = None,
    fit_windows: o.FitWindows = None,
    search_windows: o.SearchWindows = None,
    held_out_windows: o.HeldOutWindows = None,
    race_windows: o.RaceWindows = None,
    sequence_length: o.SequenceLength = None,
    bos: o.Bos = None,
    seed: o.Seed = None,
    eval_data: EvalData = None,
    eval_separator: EvalSeparator = None,
    eval_length: EvalLength = None,
    max_windows: MaxWindows = None,
    tasks: o.Tasks = None,
    tasks_path: o.TasksPath = None,
    trust_tasks: o.TrustTasks = False,
    limit: o.Limit = None,
    task_repair: TaskRepair = None,
    prompt: Prompt = None,
    speed: Speed = True,
    published: Published = None,
    cosine_axis: o.CosineAxisOption = None,
    keep_layers: o.KeepLayers = None,
    inputs: o.InputsOption = None,
    token_weight: o.TokenWeightOption = None,
    ridge: o.Ridge = None,
    absolute_ridge: o.AbsoluteRidge = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    batch_size: o.BatchSize = 0,
    plan: o.PlanOnly = False,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    debug: o.Debug = False,
) -> None:
    """Every selection and every repair of a model side by side: tables and a page to look at."""
    del debug
    asked = {
        "preset": preset,
        "layers": o.numbers_in(layers, "--layers", "3,5,7"),
        "presets": o.names_in(presets, "--presets") or None,
        "select": o.names_in(select, "--select") or None,
        "repair": o.names_in(repair, "--repair") or None,
        "eval_length": eval_length,
        "yardstick": yardstick,
        "eval_data": o.corpora_in(eval_data or None, "--eval-data"),
        "speed": speed,
        "separator": None if separator is None else o.unescape(separator),
        "eval_separators": [o.unescape(each) for each in eval_separator or ["\n\n"]],
        "data": data,
        "text_column": text_column,
        "sampling": sampling,
        "windows": windows,
        "fit_windows": fit_windows,
        "search_windows": search_windows,
        "held_out_windows": held_out_windows,
        "race_windows": race_windows,
        "sequence_length": sequence_length,
        "bos": bos,
        "seed": seed,
        "max_windows": max_windows,
        "prompt": prompt,
        "tasks": o.names_in(tasks or None, "--tasks"),
        "tasks_path": None if tasks_path is None else str(tasks_path),
        "limit": limit,
        "task_repair": o.names_in(task_repair or None, "--task-repair"),
        "cosine_axis": cosine_axis,
        "keep_layers": keep_layers,
        "inputs": inputs,
        "token_weight": token_weight,
        "ridge": ridge,
        "absolute_ridge": absolute_ridge,
    }
    request = Comparison.from_dict({k: v for k, v in asked.items() if v is not None})
    without = [n for n in request.presets if request.preset_recipe(n, 1).data is None]
    if request.calibration.data is None and (without or not request.presets):
        raise RecipeError("no calibration text: give --data a file of yours, or a corpus name.")
    cells = None if published is None else read_published(published)

    def show_plan(found: Plan) -> bool:
        screen.show_plan(found)
        return not plan

    screen.step(f"Loading {model} ...")
    with Scratch("plan") as elsewhere:
        results = run_comparison(
            model,
            request,
            Path(elsewhere) / "plan" if plan else output,  # a plan leaves what is there alone
            options=RunOptions(dtype, device, batch_size, trust_remote_code),
            revision=revision,
            overwrite=overwrite,
            progress=screen.Bars(),
            say=lambda line: screen.say(screen.dim(line)),
            show_text=screen.show_text,
            show_plan=show_plan,
            command=command_line(),
            trust_tasks=trust_tasks,
        )
    if not results:
        return
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
        isinstance(each, dict) and keys <= set(each) for each in cells
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
    entries = summarise(results)
    dense = next((each.loss for each in entries if each.key.is_dense), None)
    if results.get("presets"):
        show_methods(entries, dense)
        return
    columns = ("repair", "loss", "x Ghost", "KL", "added", "prefill", "saved as")
    for layers, select in sorted(cuts_of(entries)):
        found = at_cut(entries, (layers, select))
        title = f"{layers} layers by {select}: {found[0].removed} (dense {_figure(dense)})"
        screen.table(columns, [_row(each) for each in found], title)
    if entries:
        screen.say(
            screen.dim(
                "loss: nats a token, mean of all texts; x Ghost: excess over dense as a share of "
                "Ghost's on the same cut; KL: divergence from dense."
            )
        )
    show_accuracies(results)
    show_correlations(results)


def show_methods(entries: Sequence[Entry], dense: float | None) -> None:
    """One table a number of layers, a row a method, best first."""
    columns = ("method", "removed", "loss", "above dense", "KL", "prefill", "saved as")
    for layers in layer_counts(entries):
        found = sorted((e for e in entries if e.key.layers == layers), key=loss_order)
        rows = [[e.key.select, e.removed, _figure(e.loss), _figure(e.excess),
                 *_row(e)[3:4], *_row(e)[5:]] for e in found]  # fmt: skip
        screen.table(columns, rows, f"{layers} layers removed (dense {_figure(dense)})")
    screen.say(
        screen.dim(
            "Each method by its own choices of layers, repair and calibration text; loss: nats a "
            "token, mean of all texts."
        )
    )


def show_accuracies(results: Mapping[str, Any]) -> None:
    """What each model answered, and whether a repair differs from Ghost beyond chance."""
    tasks = list(dict.fromkeys(str(row["task"]) for row in results.get("tasks") or []))
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
        entry.key.repair + (" (worse than none)" if model["worse_than_none"] else ""),
        _figure(entry.loss),
        _figure(entry.of_ghost, 2),
        _figure(entry.kl),
        f"{model['added_parameters'] / 1e6:.2f} M",
        "" if model["prefill_ms"] is None else f"{model['prefill_ms']:.0f} ms",
        model["checkpoint"],
    ]


def _figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show_correlations(results: Mapping[str, Any]) -> None:
    """How well scores ranked the spans, where every span was measured."""
    rows = [
        [
            f"{each['layers']} layers, {each['repair']}",
            each["score"],
            f"{each['spearman']:.2f}",
            str(each["spans"]),
        ]
        for each in results.get("correlations", [])
    ]
    if rows:
        screen.table(("spans ranked by loss", "score", "Spearman", "spans"), rows)
