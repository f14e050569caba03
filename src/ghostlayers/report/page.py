"""A comparison as one page that needs nothing else: no network and no second file."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ghostlayers.errors import counted
from ghostlayers.report.accuracies import (
    DIFFERENCES,
    WITHIN_ERROR,
    Grid,
    accuracy_grid,
    difference_rows,
    title_of,
)
from ghostlayers.report.diagnostics import diagnose
from ghostlayers.report.drawing import PALETTE, STYLE
from ghostlayers.report.figures import (
    Overview,
    answer_panels,
    curve_views,
    make_overview,
    trade_panels,
)
from ghostlayers.report.glossary import explain, explain_repair
from ghostlayers.report.page_table import Line, Table, plain
from ghostlayers.report.recommended import recommended_grid
from ghostlayers.report.results import Results, Skipped
from ghostlayers.report.rows import MeasuredModel
from ghostlayers.report.summary import (
    Entry,
    asked,
    at_cut,
    best_overall,
    cuts_of,
    layer_counts,
    lowest,
    mean,
    mean_accuracy,
    one_layer_less,
    repairs_of,
    selections,
)
from ghostlayers.report.tables import (
    ABOVE,
    OF_GHOST,
    by_layers,
    cut_title,
    method_grid,
    repair_grid,
)
from ghostlayers.report.types_chart import types_content
from ghostlayers.report.words import NOTHING, decimal, percent, whole, winners
from ghostlayers.report.writing import writing_content
from ghostlayers.runtime.shown import clean

Content = Mapping[str, Any]
"""What the template shows of a section; it holds the sentences around it."""


def render_page(results: Results) -> str:
    """The page as HTML.

    Args:
        results: what `compare` measured. A section without data is left out, and named at the end.
    """
    import matplotlib as mpl

    overview = make_overview(results)
    # Methods by their own choices differ in more than their repair, which the figures would hide.
    wanted = OF_METHODS if results.presets else set(SECTIONS) - {"methods"}
    # What is recommended was chosen on other text, so it is the answer where it stands.
    wanted = wanted - ({"answer"} if results.recommended else {"recommended"})
    with mpl.rc_context(STYLE):
        made = {
            anchor: make(overview) for anchor, (_, make) in SECTIONS.items() if anchor in wanted
        }
    environment = Environment(
        loader=PackageLoader("ghostlayers", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    missing = [SECTIONS[anchor][0] for anchor, content in made.items() if not content]
    diagnostics = made.get("diagnostics")
    if diagnostics:
        missing += [part.title for part in diagnostics["parts"] if not part.panels]
    page = environment.get_template("page.html.j2").render(
        title=f"{results.model.name}: layers removed, "
        f"{'methods' if results.presets else 'repairs'} compared",
        subtitle=_subtitle(results),
        palette=PALETTE,
        results=results,
        contents={anchor: content for anchor, content in made.items() if content},
        titles={anchor: title for anchor, (title, _) in SECTIONS.items()},
        missing=missing,
    )
    return clean(page)


def _subtitle(results: Results) -> str:
    model = results.model
    facts = [
        ("{} decoder layers", model.num_layers),
        ("hidden size {}", model.hidden_size),
        ("{:,.1f} M parameters", model.num_parameters and model.num_parameters / 1e6),
        ("licence {}", model.licence),
        ("Ghostlayers {}", results.ghostlayers),
        ("{}", results.created),
    ]
    shown = "each method by its own choices" if results.presets else "one protocol for all"
    return " · ".join([*(text.format(value) for text, value in facts if value), shown])


def _table(
    grid: Grid, entries: Sequence[Entry], caption: str, kind: Callable[[Entry], str]
) -> Table:
    head, rows = grid
    worst = max((entry.excess or 0.0 for entry in entries), default=0.0)
    lines = [
        Line(texts, kind(entry), max(entry.excess or 0.0, 0.0) / worst if worst > 0 else None)
        for texts, entry in zip(rows, entries, strict=True)
    ]
    mark = head.index(OF_GHOST) if OF_GHOST in head else None
    return Table(head, lines, caption, head.index(ABOVE), mark)


def _methods(overview: Overview) -> Content:
    presets = overview.results.presets
    tables = [
        _table(
            method_grid(rows, (), presets), rows, f"{counted(layers, 'layer')} removed",
            lambda entry: "ghost" if entry.key.select == "ghosted" else "",
        )
        for layers, rows in by_layers(overview.entries)
    ]  # fmt: skip
    return {"tables": tables}


def _recommended(overview: Overview) -> Content:
    results = overview.results
    commands = [(f"{row.less}, {row.engine}", row.command or row.problem or "")
                for row in results.recommended]  # fmt: skip
    return {"table": plain(*recommended_grid(results)), "commands": commands}


def _answer(overview: Overview) -> Content | None:
    counts = layer_counts(asked(overview.entries))
    best = [entry for n in counts if (entry := lowest(overview.entries, n)) is not None]
    if not best:
        return None
    rows = []
    for entry in best:
        stock = lowest(overview.entries, entry.key.layers, stock_only=True)
        other = lowest(overview.entries, entry.key.layers, savable=False)
        rows.append(_answer_row(entry, "lowest loss"))
        if stock is not None and stock.key != entry.key:
            rows.append(_answer_row(stock, "lowest loss in a stock checkpoint"))
        if other is not None and other.key != entry.key:
            rows.append(_answer_row(other, "lower, but no checkpoint can hold it yet"))
    head = (
        *("removed", "repair", ABOVE, OF_GHOST, "of no repair's", "mean loss", "selection"),
        "which",
    )
    return {
        "sentence": winners(best),
        "dense": overview.dense and overview.dense.loss,
        "table": plain(head, rows),
        "panels": answer_panels(overview),
    }


def _answer_row(entry: Entry, which: str) -> tuple[str, ...]:
    shares = (decimal(entry.excess), percent(entry.of_ghost), percent(entry.of_none))
    key = entry.key
    return str(key.layers), key.repair, *shares, decimal(entry.loss), key.select, which


def _quality(overview: Overview) -> Content | None:
    views = curve_views(overview)
    legend = [_legend_row(overview, repair) for repair in repairs_of(overview.entries)]
    return {"views": views, "legend": legend} if views else None


def _legend_row(overview: Overview, repair: str) -> Content:
    tags = {
        "lowest loss on average": best_overall(overview.entries),
        "lowest in a stock checkpoint": best_overall(overview.entries, stock_only=True),
    }
    mine = [entry for entry in overview.entries if entry.key.repair == repair]
    return {
        "name": repair,
        "style": overview.style(repair),
        "text": explain_repair(repair),
        "tags": [tag for tag, winner in tags.items() if winner == repair],
        "share": percent(mean(entry.of_ghost for entry in mine)),
    }


def _trade(overview: Overview) -> Content:
    return {
        "panels": trade_panels(overview),
        "tables": [_yardstick(overview, cut) for cut in cuts_of(overview.entries)],
    }


def _yardstick(overview: Overview, cut: tuple[int, str]) -> Table:
    """The repairs of a cut, and Ghost with one layer less removed, which they have to beat."""
    entries = at_cut(overview.entries, cut)
    title = cut_title(cut, entries)
    rival = one_layer_less(overview.entries, entries[0])
    rows = [*entries, *([rival] if rival else [])]

    def kind(entry: Entry) -> str:
        if entry is rival:
            return "rival"
        better = entry.of_ghost is not None and entry.of_ghost < 0.995
        return "ghost" if entry.key.repair == "ghost" else "better" if better else ""

    table = _table(repair_grid(rows, ()), rows, title, kind)
    if rival:
        line = table.rows[-1]
        name = f"ghost with {rival.key.layers} removed"
        table = replace(
            table, rows=[*table.rows[:-1], replace(line, texts=[name, *line.texts[1:]])]
        )
    return table


def _types(overview: Overview) -> Content | None:
    content = types_content(overview.results)
    if content is not None:
        content["table"] = plain(content["head"], content["rows"], "GGUF files")
    return content


def _tasks(overview: Overview) -> Content | None:
    results = overview.results
    if not results.tasks:
        return None
    head, body = accuracy_grid(results)
    rows = [Line(row, "strong") for row in body]
    differences = [
        Line(row, "unsure" if row[-1] == WITHIN_ERROR else "") for row in difference_rows(results)
    ]
    documents = {
        row.task + ("" if row.version is None else f" (version {row.version})"): row.num_documents
        for row in results.tasks
    }
    return {
        "accuracy": Table(head, rows, "Accuracy, % ± standard error", mark=len(head) - 1),
        "differences": Table(DIFFERENCES, differences, "Paired differences"),
        "documents": ", ".join(f"{name}: {n:,}" for name, n in documents.items() if n is not None),
    }


def _continuations(overview: Overview) -> Content | None:
    models = [row for row in overview.results.models if row.continuation]
    dense = [row for row in models if row.key.is_dense]
    places = list(overview.styles)

    def prominence(row: MeasuredModel) -> tuple[bool, int]:
        return overview.style(row.repair).index is None, places.index(row.repair)

    groups = {}
    for cut in cuts_of(overview.entries):
        mine = [row for row in models if row.key.cut == cut]
        if mine:
            shown = [*dense, *sorted(mine, key=prominence)]
            groups[f"{cut[0]} removed by {cut[1]}"] = [
                (row.repair, row.continuation, overview.style(row.repair).colour) for row in shown
            ]
    return {"groups": groups} if groups else None


def _diagnostics(overview: Overview) -> Content | None:
    parts, published = diagnose(overview), _published(overview)
    empty = not published and not any(part.panels for part in parts)
    return None if empty else {"parts": parts, "published": published}


def _published(overview: Overview) -> Table | None:
    accuracy = mean_accuracy(overview.results)
    entries = {entry.key: entry for entry in overview.entries}
    rows = [
        (
            row.source,
            title_of(row.key),
            row.metric,
            decimal(row.value, 2),
            decimal(_our_value(row.metric, entries.get(row.key), accuracy.get(row.key)), 2),
        )
        for row in overview.results.published
    ]
    head = ("source", "model", "metric", "published", "ours")
    return plain(head, rows, "Published figures") if rows else None


def _our_value(metric: str, entry: Entry | None, accuracy: float | None) -> float | None:
    if metric.startswith("acc"):
        return None if accuracy is None else 100 * accuracy
    if entry is None or entry.loss is None:
        return None
    if metric.startswith("ppl"):
        return mean(math.exp(min(loss, 700.0)) for loss in entry.losses.values())
    return entry.loss if metric.startswith("loss") else None


def _protocol(overview: Overview) -> Content:
    results = overview.results
    texts = [
        (
            text.name,
            whole(text.num_windows),
            whole(text.available_windows),
            whole(text.sequence_length),
            _yes(text.bos),
            whole(text.calibration_overlap),
        )
        for text in results.corpora
    ]
    head = ("text", "windows", "of", "tokens a window", "BOS", "windows also used to calibrate")
    skipped = [(_skipped(row), row.reason) for row in results.skipped]
    tables = [
        plain(head, texts, "Texts"),
        *([plain(("model", "reason"), skipped, "Skipped")] if skipped else []),
    ]
    recipes = results.presets or {"Recipe": results.recipe}
    facts = {**recipes, "Machine": results.machine.to_dict()}
    return {
        "tables": tables,
        "facts": {name: _listed(rows) for name, rows in facts.items() if rows},
    }


def _yes(value: bool | str | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value or NOTHING


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None)


def _skipped(row: Skipped) -> str:
    """A repair that the model has no place for is skipped on every cut: its row names none."""
    if row.layers is None:
        return f"{row.repair}, every cut"
    return f"{row.repair} · {row.select}, {row.layers} removed"


def _glossary(overview: Overview) -> Content:
    return {"words": explain(repairs_of(overview.entries), selections(overview.entries))}


SECTIONS: dict[str, tuple[str, Callable[[Overview], Content | None]]] = {
    "recommended": ("What to take", _recommended),
    "methods": ("Methods side by side", _methods),
    "answer": ("The answer", _answer),
    "quality": ("Quality against layers removed", _quality),
    "trade": ("Size and speed against quality", _trade),
    "types": ("Cut or quantise", _types),
    "tasks": ("Tasks", _tasks),
    "continuations": ("The same prompt, continued", _continuations),
    "writing": ("What they write", writing_content),
    "diagnostics": ("Diagnostics", _diagnostics),
    "protocol": ("How it was measured", _protocol),
    "glossary": ("Glossary", _glossary),
}
"""In the order of the page; the template shows each by its name."""

OF_METHODS = {"methods", "types", "continuations", "writing", "tasks", "protocol"}
"""What is shown where each method made its own choices."""
