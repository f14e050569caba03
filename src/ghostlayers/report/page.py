"""A comparison as one page that needs nothing else: no network, no script, no second file."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ghostlayers.report.accuracies import (
    DIFFERENCES,
    WITHIN_ERROR,
    accuracy_grid,
    difference_rows,
    title_of,
)
from ghostlayers.report.charts import Style, swatch
from ghostlayers.report.figures import (
    SHARES,
    SPAN_SCORES,
    Panel,
    Scene,
    View,
    answer_panels,
    boundary_panels,
    curve_views,
    make_scene,
    norm_panel,
    recover_panels,
    selection_styles,
    similarity_panel,
    spectrum_panels,
    trade_panels,
)
from ghostlayers.report.glossary import (
    WORDS,
    explain_repair,
    explain_selection,
)
from ghostlayers.report.summary import (
    Entry,
    Results,
    asked,
    at_cut,
    best_overall,
    cuts_of,
    drawn_operators,
    key_of,
    layer_counts,
    loss_order,
    lowest,
    mean,
    mean_accuracy,
    number,
    one_layer_less,
    repairs_of,
    selections,
)
from ghostlayers.report.words import NOTHING, decimal, percent, whole
from ghostlayers.runtime.shown import clean


@dataclass(frozen=True)
class Cell:
    """A cell of a table; ``bar`` draws its share of the row behind the number."""

    text: str
    kind: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: the names of the columns, and rows whose first cell names the row.

    ``words`` are the columns of text, which stand at the left.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Content:
    """What a section shows, in this order; whatever is empty is left out."""

    lines: Sequence[str] = ()
    prompt: str | None = None
    views: Sequence[View] = ()
    legend: Sequence[Mapping[str, Any]] = ()
    legend_note: str = ""
    swatches: Sequence[tuple[str, Sequence[tuple[Markup, str]]]] = ()
    panels: Sequence[Panel] = ()
    panel_note: str = ""
    tables: Sequence[Table] = ()
    folded: bool = False
    groups: Sequence[Mapping[str, Any]] = ()
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""
    glossary: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()


@dataclass(frozen=True)
class Section:
    """A section that has something to show."""

    anchor: str
    title: str
    content: Content


def render_page(results: Results) -> str:
    """The page as HTML.

    Args:
        results: what `compare` measured. Only ``model``, ``recipe``, ``corpora`` and ``cells``
            must be there; a section without data is left out, and named at the end.
    """
    scene = make_scene(results)
    # Methods by their own choices differ in more than their repair, which the figures would hide.
    own = bool(results.get("presets"))
    sections = [s for s in SECTIONS if (s[0] in OF_METHODS if own else s[0] != "methods")]
    what = "methods" if own else "repairs"
    drawn = [(anchor, title, make(scene)) for anchor, title, make in sections]
    environment = Environment(
        loader=PackageLoader("ghostlayers", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=f"{results['model']['name']}: layers removed, {what} compared",
        subtitle=_subtitle(results),
        sections=[Section(anchor, title, made) for anchor, title, made in drawn if made],
        absent=[title for _, title, made in drawn if not made],
    )
    return clean(page)


def _subtitle(results: Results) -> str:
    model = results["model"]
    facts = [
        ("{} decoder layers", model.get("num_layers")),
        ("hidden size {}", model.get("hidden_size")),
        ("{} parameters", _millions(number(model.get("num_parameters")))),
        ("licence {}", model.get("licence")),
        ("Ghostlayers {}", results.get("ghostlayers")),
        ("{}", results.get("created")),
    ]
    shown = "each method by its own choices" if results.get("presets") else "one protocol for all"
    return " · ".join([*(text.format(value) for text, value in facts if value), shown])


def _methods(scene: Scene) -> Content | None:
    presets: Mapping[str, Any] = scene.results.get("presets") or {}
    if not presets:
        return None
    tables = [_methods_table(scene, count, presets) for count in layer_counts(scene.entries)]
    return Content(
        lines=[
            "Every method chose its layers, fitted its repair and drew its text as its authors and "
            "their code do, but for what was set for all; each choice stands below. So a row "
            "differs from another in more than its repair. All were computed in "
            f"{(scene.results.get('machine') or {}).get('dtype', 'one type')}.",
        ],
        tables=tables,
    )


def _methods_table(scene: Scene, layers: int, presets: Mapping[str, Any]) -> Table:
    found = [each for each in scene.entries if each.key.layers == layers]
    worst = max((each.excess or 0.0 for each in found), default=0.0)
    rows = []
    for entry in sorted(found, key=loss_order):
        recipe = presets[entry.key.select]
        excess = max(entry.excess or 0.0, 0.0)
        text = f"{recipe['data']}, {recipe['windows']} x {recipe['sequence_length']}"
        rows.append(
            (
                Cell(entry.key.select, "ghost" if entry.key.select == "ghosted" else ""),
                Cell(entry.removed),
                Cell(entry.key.repair),
                Cell(f"{text}, {recipe['sampling']}"),
                Cell(decimal(entry.loss)),
                Cell(decimal(entry.excess), "", excess / worst if worst else None),
                Cell(decimal(entry.kl)),
                Cell(str(entry.model.get("checkpoint") or NOTHING)),
            )
        )
    head = ("method", "removed", "repair", "calibration", "mean loss", "above dense", "KL", "saved")
    return Table(head, tuple(rows), f"{layers} layers removed", frozenset({0, 1, 2, 3, 7}))


def _millions(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e6:,.1f} M"


def _answer(scene: Scene) -> Content | None:
    counts = layer_counts(asked(scene.entries))
    best = [entry for n in counts if (entry := lowest(scene.entries, n)) is not None]
    if not best:
        return None
    rows = []
    for entry in best:
        rows.append(_answer_row(entry, "lowest loss"))
        stock = lowest(scene.entries, entry.key.layers, stock_only=True)
        if stock is not None and stock.key != entry.key:
            rows.append(_answer_row(stock, "lowest loss in a stock checkpoint"))
        other = lowest(scene.entries, entry.key.layers, savable=False)
        if other is not None and other.key != entry.key:
            rows.append(_answer_row(other, "lower, but no checkpoint can hold it yet"))
    head = (
        "removed",
        "repair",
        "above dense",
        "of Ghost's",
        "of no repair's",
        "mean loss",
        "selection",
        "which",
    )
    dense = scene.dense
    lines = [_sentence(best)]
    if dense is not None and dense.loss is not None:
        lines.append(f"The dense model's mean loss is {dense.loss:.3f} nats a token.")
    lines.append(
        "Each winner was picked on the texts it is reported on, so it flatters itself a little."
    )
    return Content(
        lines=lines,
        tables=[Table(head, tuple(rows), words=frozenset({1, 6, 7}))],
        panels=answer_panels(scene),
        panel_note="Loss above the dense model's, in nats a token, of the repairs drawn in "
        "colour on the best cut; in brackets as a share of Ghost's.",
    )


def _answer_row(entry: Entry, which: str) -> tuple[Cell, ...]:
    key = entry.key
    shares = [decimal(entry.excess), percent(entry.of_ghost), percent(entry.of_none)]
    texts = [str(key.layers), key.repair, *shares, decimal(entry.loss), key.select, which]
    return tuple(Cell(text) for text in texts)


def _sentence(best: Sequence[Entry]) -> str:
    """The winners in words; one that wins everywhere is named once."""
    names = {each.key.repair for each in best}
    if len(names) > 1 or len(best) == 1:
        return " ".join(_winner(each) for each in best)
    text = f"{best[0].key.repair} loses least, with {_and(str(e.key.layers) for e in best)} removed"
    for name, shares in (("Ghost", [e.of_ghost for e in best]), ("no", [e.of_none for e in best])):
        if all(share is not None for share in shares):
            owner = "Ghost's" if name == "Ghost" else "the unrepaired cut's"
            text += ": " if name == "Ghost" else ", and "
            text += f"{_and(percent(share) for share in shares)} of {owner} excess loss"
    return text + "."


def _winner(entry: Entry) -> str:
    key = entry.key
    shares = [
        f"{percent(share)} of the excess loss of {name}"
        for share, name in ((entry.of_ghost, "Ghost"), (entry.of_none, "no repair"))
        if share is not None
    ]
    leaves = f" leaves {' and '.join(shares)}" if shares else " loses least"
    return f"With {key.layers} removed, {key.repair} on the cut by {key.select}{leaves}."


def _and(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _quality(scene: Scene) -> Content | None:
    views = curve_views(scene)
    if not views:
        return None
    return Content(
        views=views,
        legend=[_legend_row(scene, repair) for repair in repairs_of(scene.entries)],
        legend_note="Grey lines are the repairs without a colour; point at a line to read its "
        "name, or at a name to find its line (press it to keep it).",
    )


def _legend_row(scene: Scene, repair: str) -> dict[str, Any]:
    mine = [each for each in scene.entries if each.key.repair == repair]
    style = scene.style(repair)
    tags = []
    if repair == best_overall(scene.entries):
        tags.append("lowest loss on average")
    if repair == best_overall(scene.entries, stock_only=True):
        tags.append("lowest in a stock checkpoint")
    return {
        "name": repair,
        "swatch": swatch(style),
        "number": style.number,
        "text": explain_repair(repair),
        "tags": tags,
        "share": percent(mean(each.of_ghost for each in mine)),
    }


def _trade(scene: Scene) -> Content | None:
    tables = [_yardstick(scene, cut) for cut in cuts_of(scene.entries)]
    return Content(
        panels=trade_panels(scene),
        tables=tables,
        folded=True,
        panel_note="The stepped line joins the models that no other beats in both directions. "
        "Colours and marks are those of the legend above.",
    )


def _yardstick(scene: Scene, cut: tuple[int, str]) -> Table:
    entries = at_cut(scene.entries, cut)
    worst = max((each.excess or 0.0 for each in entries), default=0.0)
    rows = [_yardstick_row(each, worst) for each in entries]
    rival = one_layer_less(scene.entries, entries[0])
    if rival is not None:
        rows.append(
            (
                Cell(f"ghost with {rival.key.layers} removed", "rival"),
                *_yardstick_row(rival, worst)[1:3],
                Cell(NOTHING),
                *_yardstick_row(rival, worst)[4:],
            )
        )
    head = (
        "repair",
        "mean loss",
        "above dense",
        "of Ghost's",
        "KL",
        "added parameters",
        "prefill ms",
        "KV bytes a token",
        "checkpoint",
    )
    layers, select = cut
    removed = next((each.removed for each in entries if each.removed), "")
    caption = f"{layers} removed by {select}" + (f": layers {removed}" if removed else "")
    return Table(head, tuple(rows), caption, frozenset({0, 8}))


def _yardstick_row(entry: Entry, worst: float) -> tuple[Cell, ...]:
    excess = max(entry.excess or 0.0, 0.0)
    name = entry.key.repair
    if entry.model.get("worse_than_none"):
        name += " (worse than no repair)"
    return (
        Cell(name, "ghost" if entry.key.repair == "ghost" else ""),
        Cell(decimal(entry.loss)),
        Cell(decimal(entry.excess), "", excess / worst if worst else None),
        Cell(percent(entry.of_ghost), _better(entry.of_ghost)),
        Cell(decimal(entry.kl)),
        Cell(whole(entry.number("added_parameters"))),
        Cell(_spread(entry)),
        Cell(whole(entry.number("kv_bytes_per_token"))),
        Cell(str(entry.model.get("checkpoint") or NOTHING)),
    )


def _better(share: float | None) -> str:
    return "good" if share is not None and share < 0.995 else ""


def _spread(entry: Entry) -> str:
    time, spread = entry.number("prefill_ms"), entry.number("prefill_spread_ms")
    return decimal(time, 1) + ("" if time is None or spread is None else f" ± {spread:.1f}")


def _spans(scene: Scene) -> Content | None:
    similarity = similarity_panel(scene)
    recover = recover_panels(scene)
    if similarity is None and not recover:
        return None
    panels = [similarity] if similarity else []
    marks = [(swatch(style), name) for name, style in selection_styles(scene).items()]
    lines = [(swatch(Style(index)), name) for index, name in enumerate(SPAN_SCORES)]
    return Content(
        panels=[*panels, *recover],
        swatches=[
            *([("Marks on the map", marks)] if similarity else []),
            *([("Lines", lines)] if recover else []),
        ],
        panel_note="Left of a cut's mark is the boundary it starts at, below it the one it "
        "stops at; marks nest where selections agree. Vertical lines name the selection that "
        "starts there.",
    )


def _norms(scene: Scene) -> Content | None:
    panel = norm_panel(scene)
    names = ("median token", "largest token")
    lines = [(swatch(Style(index)), name) for index, name in enumerate(names)]
    return None if panel is None else Content(panels=[panel], swatches=[("Lines", lines)])


def _spectra(scene: Scene) -> Content | None:
    panels = spectrum_panels(scene)
    if not panels:
        return None
    cuts = dict.fromkeys(
        (row["select"], row["layers"], tuple(row["span"]))
        for row in drawn_operators(scene.results, scene.entries)
    )
    keys = []
    for select in dict.fromkeys(key[0] for key in cuts):
        mine = [key for key in cuts if key[0] == select]
        names = [f"{layers} removed: [{span[0]}, {span[1]})" for _, layers, span in mine]
        keys.append((select, [(swatch(Style(i)), name) for i, name in enumerate(names)]))
    marks = [(swatch(Style(index)), name) for index, (_, name) in enumerate(SHARES)]
    return Content(
        panels=panels,
        swatches=[*keys, ("Shares", marks)],
        panel_note="M is what Ghost adds to the identity. A symmetric operator, such as "
        "LinearPatch's, can never reach the antisymmetric part; the paper reports 46.9% on "
        "Llama-3.1-8B.",
    )


def _boundaries(scene: Scene) -> Content | None:
    panels = boundary_panels(scene)
    note = (
        "Squared distance between the repaired and the dense stream, relative to the dense "
        "stream, at every boundary behind the cut. Colours are those of the legend above."
    )
    return Content(panels=panels, panel_note=note) if panels else None


def _continuations(scene: Scene) -> Content | None:
    models = [row for row in scene.results.get("models", []) if row.get("continuation")]
    if not models:
        return None
    order = {repair: place for place, repair in enumerate(scene.styles)}
    dense = [row for row in models if key_of(row).is_dense]
    groups = []
    for cut in cuts_of(scene.entries):
        mine = [row for row in models if key_of(row).cut == cut]
        mine.sort(key=lambda row: _prominence(scene, order, str(row["repair"])))
        if mine:
            rows = [_spoken(scene, row) for row in [*dense, *mine]]
            groups.append({"title": f"{cut[0]} removed by {cut[1]}", "rows": rows})
    return Content(prompt=str(scene.results.get("prompt", "")), groups=groups) if groups else None


def _prominence(scene: Scene, order: Mapping[str, int], repair: str) -> tuple[bool, int]:
    return scene.style(repair).index is None, order.get(repair, 0)


def _spoken(scene: Scene, row: Mapping[str, Any]) -> dict[str, Any]:
    repair = str(row["repair"])
    return {"name": repair, "text": str(row["continuation"]), "class": scene.style(repair).classes}


def _tasks(scene: Scene) -> Content | None:
    grid = accuracy_grid(scene.results)
    if grid is None:
        return None
    body = tuple((*map(Cell, row[:-1]), Cell(row[-1], "strong")) for row in grid[1])
    tables = [Table(grid[0], body, "Accuracy, % ± standard error")]
    differences = difference_rows(scene.results)
    if differences:
        rows = tuple(
            tuple(Cell(text, "unsure" if row[-1] == WITHIN_ERROR else "") for text in row)
            for row in differences
        )
        tables.append(Table(DIFFERENCES, rows, "Paired differences", frozenset({0, 1, 2, 6})))
    return Content(
        lines=[
            "Each cell: length-normalised accuracy, then plain accuracy where both exist; the mean "
            "is of the first. A difference whose 95% interval holds zero is within error."
        ],
        tables=tables,
        facts=[("Documents", _documents(scene.results["tasks"]))],
    )


def _documents(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = {
        f"{row['task']}"
        + (f" (version {row['version']})" if row.get("version") is not None else ""): row.get(
            "num_documents"
        )
        for row in rows
    }
    return ", ".join(f"{name}: {size:,}" for name, size in sizes.items() if size is not None)


def _skipped(row: Mapping[str, Any]) -> str:
    """A repair that the model has no place for is skipped on every cut: its row names none."""
    return title_of(key_of(row)) if "layers" in row else f"{row['repair']}, every cut"


def _published(scene: Scene) -> Content | None:
    rows = scene.results.get("published") or []
    if not rows:
        return None
    accuracy = mean_accuracy(scene.results)
    found = {each.key: each for each in scene.entries}
    body = []
    for row in rows:
        key = key_of(row)
        ours = _our_value(str(row["metric"]), found.get(key), accuracy.get(key))
        values = [decimal(number(row.get("value")), 2), decimal(ours, 2)]
        texts = [str(row["source"]), title_of(key), str(row["metric"]), *values]
        body.append(tuple(Cell(text) for text in texts))
    head = ("source", "model", "metric", "published", "ours")
    note = (
        "Published figures are comparable only where model, texts, windows and tasks are the same; "
        "read them as a check of the order of magnitude."
    )
    return Content(lines=[note], tables=[Table(head, tuple(body), words=frozenset({0, 1, 2}))])


def _our_value(metric: str, entry: Entry | None, accuracy: float | None) -> float | None:
    if metric.startswith("acc"):
        return None if accuracy is None else 100 * accuracy
    if entry is None or entry.loss is None:
        return None
    if metric.startswith("ppl"):
        return mean(math.exp(min(loss, 700.0)) for loss in entry.losses.values())
    return entry.loss if metric.startswith("loss") else None


def _protocol(scene: Scene) -> Content | None:
    results = scene.results
    corpora = [
        tuple(
            Cell(text)
            for text in (
                str(corpus["name"]),
                whole(number(corpus.get("num_windows"))),
                whole(number(corpus.get("available_windows"))),
                whole(number(corpus.get("sequence_length"))),
                _yes(corpus.get("bos")),
                whole(number(corpus.get("calibration_overlap"))),
            )
        )
        for corpus in results["corpora"]
    ]
    head = ("text", "windows", "of", "tokens a window", "BOS", "windows also used to calibrate")
    tables = [Table(head, tuple(corpora), "Texts")]
    skipped = [
        (Cell(_skipped(row)), Cell(str(row.get("reason", ""))))
        for row in results.get("skipped") or []
    ]
    if skipped:
        tables.append(Table(("model", "reason"), tuple(skipped), "Skipped", frozenset({0, 1})))
    return Content(
        lines=[
            "Loss is the mean negative log-likelihood of the next token, in nats; every model saw "
            "the same windows, and a mean is taken over the texts, each counting alike. Nothing "
            "was trained: every repair is fitted in closed form on calibration windows."
        ],
        tables=tables,
        facts=[
            *_facts("Recipe", {} if results.get("presets") else results["recipe"]),
            *[
                fact
                for name, recipe in (results.get("presets") or {}).items()
                for fact in _facts(name, recipe)
            ],
            *_facts("Machine", results.get("machine") or {}),
        ],
        command=str(results.get("command") or ""),
    )


def _yes(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOTHING if value is None else str(value)


def _facts(title: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    text = ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None)
    return [(title, text)] if text else []


def _glossary(scene: Scene) -> Content | None:
    repairs = [(name, text) for name in repairs_of(scene.entries) if (text := explain_repair(name))]
    chosen = [
        (name, text) for name in selections(scene.entries) if (text := explain_selection(name))
    ]
    return Content(
        glossary=[
            ("Repairs", [("dense", explain_repair("dense")), *repairs]),
            ("Selections", chosen),
            ("Words", list(WORDS.items())),
        ]
    )


SECTIONS: tuple[tuple[str, str, Callable[[Scene], Content | None]], ...] = (
    ("methods", "Methods side by side", _methods),
    ("answer", "The answer", _answer),
    ("quality", "Quality against layers removed", _quality),
    ("trade", "Size and speed against quality", _trade),
    ("spans", "Which spans can go", _spans),
    ("norms", "Token norms and massive activations", _norms),
    ("operators", "The operators", _spectra),
    ("boundaries", "Distance to the dense stream", _boundaries),
    ("continuations", "The same prompt, continued", _continuations),
    ("tasks", "Tasks", _tasks),
    ("published", "Published figures", _published),
    ("protocol", "How it was measured", _protocol),
    ("glossary", "Glossary", _glossary),
)

OF_METHODS = frozenset({"methods", "continuations", "tasks", "protocol"})
"""What is shown where each method made its own choices."""
