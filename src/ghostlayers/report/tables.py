"""A comparison as Markdown and as comma-separated values."""

import csv
import io
import math
from collections.abc import Sequence

from ghostlayers.report.accuracies import DIFFERENCES, accuracy_grid, difference_rows
from ghostlayers.report.summary import (
    Entry,
    Results,
    at_cut,
    corpus_names,
    cuts_of,
    key_of,
    layer_counts,
    loss_order,
    number,
    summarise,
)
from ghostlayers.report.words import NOTHING, decimal, percent, whole
from ghostlayers.runtime.shown import markdown, one_line

MODEL_COLUMNS = (
    "num_parameters",
    "added_parameters",
    "prefill_ms",
    "prefill_spread_ms",
    "prefill_tokens",
    "kv_bytes_per_token",
    "checkpoint",
    "fit_seconds",
    "worse_than_none",
)
CELL_COLUMNS = (
    "layers",
    "select",
    "repair",
    "removed",
    "corpus",
    "num_tokens",
    "loss_nats",
    "perplexity",
    "kl_nats",
    "greedy_agreement",
)


def to_markdown(results: Results) -> str:
    """One table a number of layers and selection, lowest loss first."""
    entries = summarise(results)
    names = corpus_names(results)
    dense = [each for each in entries if each.key.is_dense]
    if results.get("presets"):
        return _methods(results, entries, names)
    blocks = [f"# {markdown(results['model']['name'])}: repairs compared", _NOTE]
    for layers, select in cuts_of(entries):
        rows = at_cut(entries, (layers, select))
        removed = ", ".join(dict.fromkeys(each.removed for each in rows if each.removed))
        title = f"## {layers} layers removed by {markdown(select)}"
        blocks.append(title + (f": {markdown(removed)}" if removed else ""))
        blocks.append(_table([*dense, *rows], names))
    blocks += _tasks(results)
    return "\n\n".join(blocks) + "\n"


def _methods(results: Results, entries: Sequence[Entry], names: Sequence[str]) -> str:
    """One table a number of layers, a row a method by its own choices."""
    note = "Each method by its own choices of layers, repair and text. Loss and KL in nats a token."
    blocks = [f"# {markdown(results['model']['name'])}: methods compared", note]
    head = ["method", "removed", "repair", *map(markdown, names), "mean", "above dense", "KL"]
    dense = [each for each in entries if each.key.is_dense]
    for layers in layer_counts(entries):
        found = sorted((e for e in entries if e.key.layers == layers), key=loss_order)
        rows = [head, ["---", "---", "---", *["---:"] * (len(head) - 3)]]
        rows += [
            [
                markdown(each.key.select or "dense"),
                markdown(each.removed),
                markdown(each.key.repair),
                *(decimal(each.losses.get(name)) for name in names),
                *(decimal(value) for value in (each.loss, each.excess, each.kl)),
            ]
            for each in [*dense, *found]
        ]
        blocks += [f"## {layers} layers removed", _piped(rows)]
    return "\n\n".join([*blocks, *_tasks(results)]) + "\n"


_NOTE = (
    "Loss and KL in nats a token. *Of Ghost's* is the loss above the dense model's as a share of "
    "Ghost's on the same cut; below 100% is better than Ghost."
)


def _tasks(results: Results) -> list[str]:
    """What was answered, and what separates two models; nothing where no tasks were."""
    grid = accuracy_grid(results)
    if grid is None:
        return []
    differences = difference_rows(results)
    return [
        "## Tasks",
        "Accuracy in per cent with its standard error: length-normalised, then plain.",
        _grid(*grid),
        *(["Paired differences:", _grid(DIFFERENCES, differences)] if differences else []),
    ]


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return _piped([[*map(markdown, line)] for line in (head, ruler, *rows)])


def _piped(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _table(entries: Sequence[Entry], names: Sequence[str]) -> str:
    head = [
        "repair",
        *(markdown(name) for name in names),
        "mean",
        "of Ghost's",
        "KL",
        "same next token",
        "added parameters",
        "prefill ms",
        "checkpoint",
    ]
    rows = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    rows += [_row(each, names) for each in entries]
    return _piped(rows)


def _row(entry: Entry, names: Sequence[str]) -> list[str]:
    return [
        markdown(entry.key.repair),
        *(decimal(entry.losses.get(name)) for name in names),
        decimal(entry.loss),
        percent(entry.of_ghost),
        decimal(entry.kl),
        percent(entry.agreement, 1),
        whole(entry.number("added_parameters")),
        decimal(entry.number("prefill_ms"), 1),
        markdown(entry.model.get("checkpoint") or NOTHING),
    ]


def to_csv(results: Results) -> str:
    """One row a model and text, with the model's size, speed and checkpoint beside it."""
    models = {key_of(row): row for row in results.get("models", [])}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CELL_COLUMNS, *MODEL_COLUMNS])
    for cell in results["cells"]:
        loss = number(cell.get("loss_nats"))
        row = {**cell, "perplexity": None if loss is None else math.exp(min(loss, 700.0))}
        model = models.get(key_of(cell), {})
        writer.writerow(
            [
                *(_plain(row.get(name)) for name in CELL_COLUMNS),
                *(_plain(model.get(name)) for name in MODEL_COLUMNS),
            ]
        )
    return stream.getvalue()


TASK_COLUMNS = (
    *("layers", "select", "repair", "task", "version", "num_documents"),
    *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"),
)


def tasks_to_csv(results: Results) -> str | None:
    """One row a model and task; None where no tasks were answered."""
    rows = results.get("tasks") or []
    if not rows:
        return None
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(TASK_COLUMNS)
    writer.writerows([_plain(row.get(name)) for name in TASK_COLUMNS] for row in rows)
    return stream.getvalue()


def _plain(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    line = one_line(value)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
