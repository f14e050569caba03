"""A comparison as grids of words, and from them Markdown and comma-separated values."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ghostlayers.errors import counted
from ghostlayers.report.accuracies import DIFFERENCES, Grid, accuracy_grid, difference_rows
from ghostlayers.report.recommended import recommended_grid
from ghostlayers.report.results import Results
from ghostlayers.report.rows import Accuracy, MeasuredModel, TextLoss
from ghostlayers.report.summary import (
    Entry,
    asked,
    at_cut,
    corpus_names,
    cuts_of,
    layer_counts,
    loss_order,
    summarise,
)
from ghostlayers.report.types_table import file_grid, files_of, says
from ghostlayers.report.words import NOTHING, decimal, percent, whole
from ghostlayers.report.writing import said_of_writing, writing_grid, written_cuts
from ghostlayers.runtime.shown import markdown, one_line
from ghostlayers.statistics.losses import tokens_a_verification

MODEL_COLUMNS = (
    *(
        "method",
        "num_parameters",
        "added_parameters",
        "prefill_ms",
        "prefill_spread_ms",
        "prefill_tokens",
    ),
    *("kv_bytes_per_token", "checkpoint", "fit_seconds", "worse_than_none"),
)
CELL_COLUMNS = (
    *("layers", "select", "repair", "removed", "corpus"),
    *("num_tokens", "loss_nats", "perplexity", "kl_nats", "greedy_agreement"),
    *("total_variation", "acceptance", "tokens_a_verification"),
)

ABOVE = "above dense"
OF_GHOST = "of Ghost's"
"""Columns that the page draws or colours."""


def repair_grid(entries: Iterable[Entry], names: Sequence[str]) -> Grid:
    """A row a repair of one cut; ``names`` are the texts."""
    head = (
        *("repair", *names, "mean loss", ABOVE, OF_GHOST, "KL", "same next token"),
        *("kept as a draft", "tokens a verification"),
        *("added parameters", "prefill ms", "KV bytes a token", "checkpoint"),
    )
    entries = list(entries)
    healed = any(entry.model.healing for entry in entries)
    rows = [_repair_row(entry, names) for entry in entries]
    if not healed:
        return head, rows
    return (*head, "trained"), [
        (*row, _healing(entry)) for row, entry in zip(rows, entries, strict=True)
    ]


def _healing(entry: Entry) -> str:
    """What training after the cut took."""
    healing = entry.model.healing
    if healing is None:
        return NOTHING
    return f"{' + '.join(healing.trained)}, {healing.tokens:,} tokens, {healing.seconds:,.0f} s"


def _repair_row(entry: Entry, names: Sequence[str]) -> tuple[str, ...]:
    model = entry.model
    spread = "" if model.prefill_spread_ms is None else f" ± {model.prefill_spread_ms:.1f}"
    return (
        entry.key.repair + (" (worse than no repair)" if model.worse_than_none else ""),
        *(decimal(entry.losses.get(name)) for name in names),
        decimal(entry.loss),
        decimal(entry.excess),
        percent(entry.of_ghost),
        decimal(entry.kl),
        percent(entry.agreement, 1),
        percent(entry.acceptance, 1),
        decimal(_tokens_a_verification(entry), 2),
        whole(model.added_parameters),
        NOTHING if model.prefill_ms is None else decimal(model.prefill_ms, 1) + spread,
        whole(model.kv_bytes_per_token),
        model.checkpoint or NOTHING,
    )


def _tokens_a_verification(entry: Entry) -> float | None:
    return None if entry.acceptance is None else tokens_a_verification(entry.acceptance)


def method_grid(
    entries: Iterable[Entry], names: Sequence[str], presets: Mapping[str, Mapping[str, Any]]
) -> Grid:
    """A row a method by its own choices; ``names`` are the texts."""
    head = (
        *("method", "removed", "repair", *names, "mean loss", ABOVE, "KL"),
        *("calibration", "checkpoint"),
    )
    return head, [_method_row(e, names, presets.get(e.key.select, {})) for e in entries]


def _method_row(entry: Entry, names: Sequence[str], recipe: Mapping[str, Any]) -> tuple[str, ...]:
    calibration = "{data}, {windows} x {sequence_length}, {sampling}"
    return (
        entry.key.select or "dense",
        entry.removed,
        entry.key.repair,
        *(decimal(entry.losses.get(name)) for name in names),
        *(decimal(value) for value in (entry.loss, entry.excess, entry.kl)),
        calibration.format(**recipe) if recipe else NOTHING,
        entry.model.checkpoint or NOTHING,
    )


def by_layers(entries: Sequence[Entry]) -> list[tuple[int, list[Entry]]]:
    """The models of each number of removed layers, lowest loss first."""
    return [
        (layers, sorted((e for e in entries if e.key.layers == layers), key=loss_order))
        for layers in layer_counts(entries)
    ]


def cut_title(cut: tuple[int, str], entries: Sequence[Entry]) -> str:
    """A cut in words: how many layers, chosen by what, and which."""
    removed = ", ".join(dict.fromkeys(entry.removed for entry in entries if entry.removed))
    return f"{counted(cut[0], 'layer')} removed by {cut[1]}" + (f": {removed}" if removed else "")


def to_markdown(results: Results) -> str:
    """One table a number of layers and selection, or method, lowest loss first."""
    entries, names = summarise(results), corpus_names(results)
    dense = [entry for entry in entries if entry.key.is_dense]
    what = "methods" if results.presets else "repairs"
    blocks = [f"# {markdown(results.model.name)}: {what} compared"]
    if results.presets:
        blocks.append(_OF_METHODS)
        for layers, rows in by_layers(entries):
            grid = method_grid([*dense, *rows], names, results.presets)
            blocks += [f"## {counted(layers, 'layer')} removed", _piped(*grid, words=3)]
    else:
        blocks += [*_recommended(results), _OF_REPAIRS]
        wanted = layer_counts(asked(entries))
        for cut in cuts_of(entries):
            rows = at_cut(entries, cut)
            blocks.append(f"## {markdown(cut_title(cut, rows))}")
            if cut[0] not in wanted:
                blocks.append(_YARDSTICK)
            blocks.append(_piped(*repair_grid([*dense, *rows], names)))
    more = (*_types(results), *_writing(results, entries), *_tasks(results))
    return "\n\n".join([*blocks, *more]) + "\n"


_OF_METHODS = (
    "Each method by its own choices of layers, repair and text. Loss and KL in nats a token."
)
_YARDSTICK = (
    "Not asked for: Ghost with one layer less removed, a yardstick for what a layer is worth."
)
_OF_REPAIRS = (
    "Loss and KL in nats a token. *Of Ghost's* is the loss above the dense model's as a share of "
    "Ghost's on the same cut; below 100% is better than Ghost."
)


def _recommended(results: Results) -> list[str]:
    """What to take, and the commands that make it; nothing where nothing was recommended."""
    if not results.recommended:
        return []
    commands = [
        f"{row.less} for {row.engine}:\n\n    {row.command or markdown(row.problem or '')}"
        for row in results.recommended
    ]
    return ["## What to take", _piped(*recommended_grid(results), words=3), *commands]


def _types(results: Results) -> list[str]:
    """GGUF files and what they say; nothing where none were measured."""
    if not results.files:
        return []
    table = _piped(*file_grid(results), words=2)
    return ["## Cut or quantise", *filter(None, [says(files_of(results))]), table]


def _writing(results: Results, entries: Sequence[Entry]) -> list[str]:
    """What models wrote, cut by cut; nothing where they did not."""
    if not results.writing:
        return []
    blocks = ["## What they write", said_of_writing(results)]
    for title, keys in written_cuts(results, entries):
        blocks += [f"### {markdown(title)}", _piped(*writing_grid(results, keys))]
    return blocks


def _tasks(results: Results) -> list[str]:
    """What was answered, and what separates two models; nothing where no tasks were."""
    if not results.tasks:
        return []
    differences = difference_rows(results)
    return [
        "## Tasks",
        "Accuracy in per cent with its standard error: length-normalised, then plain.",
        _piped(*accuracy_grid(results)),
        *(["Paired differences:", _piped(DIFFERENCES, differences)] if differences else []),
    ]


def _piped(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns are words, at the left."""
    ruler = [*["---"] * words, *["---:"] * (len(head) - words)]
    lines = [[*map(markdown, head)], ruler, *([*map(markdown, row)] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_csv(results: Results) -> str:
    """One row a model and text, with the model's size, speed and checkpoint beside it."""
    models = {row.key: row for row in results.models}
    rows = [
        [*_cell_values(cell), *_values(models.get(cell.key), MODEL_COLUMNS)]
        for cell in results.cells
    ]
    return _csv([*CELL_COLUMNS, *MODEL_COLUMNS], rows)


def _cell_values(cell: TextLoss) -> list[object]:
    loss = cell.loss_nats
    perplexity = None if loss is None else math.exp(min(loss, 700.0))
    return [perplexity if name == "perplexity" else _plain(getattr(cell, name))
            for name in CELL_COLUMNS]  # fmt: skip


TASK_COLUMNS = (
    *("layers", "select", "repair", "task", "version", "num_documents"),
    *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"),
)


def tasks_to_csv(results: Results) -> str | None:
    """One row a model and task; None where no tasks were answered."""
    rows = [_values(row, TASK_COLUMNS) for row in results.tasks]
    return _csv(TASK_COLUMNS, rows) if rows else None


def _values(row: MeasuredModel | Accuracy | None, names: Sequence[str]) -> list[object]:
    return [_plain(getattr(row, name, None)) for name in names]


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return stream.getvalue()


def _plain(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    line = one_line(value)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
