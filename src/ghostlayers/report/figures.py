"""From a comparison's results to the pictures of its page."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from markupsafe import Markup

from ghostlayers.report.charts import (
    Axis,
    Band,
    Bar,
    Mark,
    Series,
    Style,
    bar_chart,
    dot_chart,
    heat_map,
    line_chart,
    scatter_chart,
)
from ghostlayers.report.summary import (
    Entry,
    Key,
    Results,
    asked,
    at_cut,
    birth_layers,
    corpus_names,
    cuts_of,
    drawn_operators,
    gaps_of,
    highlighted,
    key_of,
    layer_counts,
    lowest,
    mean_accuracy,
    number,
    pareto_front,
    repairs_of,
    score_tables,
    selections,
    summarise,
)
from ghostlayers.report.svg import Scale, fit_scale
from ghostlayers.spans import merge_layers

LOG_FROM = 12.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

PAPER_ANTISYMMETRIC = 0.469
"""Antisymmetric share of Ghost's operator on Llama-3.1-8B (arXiv:2605.15491)."""


@dataclass(frozen=True)
class Scene:
    """What every figure needs, computed once."""

    results: Results
    entries: tuple[Entry, ...]
    styles: Mapping[str, Style]

    def style(self, repair: str) -> Style:
        """How a repair is drawn."""
        return self.styles.get(repair, Style())

    @property
    def dense(self) -> Entry | None:
        """The original model."""
        return next((each for each in self.entries if each.key.is_dense), None)


@dataclass(frozen=True)
class Panel:
    """One picture with its heading."""

    title: str
    picture: Markup
    note: str = ""


@dataclass(frozen=True)
class View:
    """Pictures shown together, one of several to choose from."""

    name: str
    panels: tuple[Panel, ...]


def make_scene(results: Results) -> Scene:
    """Summaries, and a style for every repair: a colour for the highlighted ones."""
    entries = tuple(summarise(results))
    bright = highlighted(entries)
    styles = {
        repair: Style(bright.index(repair) if repair in bright else None, place)
        for place, repair in enumerate(repairs_of(entries))
    }
    return Scene(results, entries, styles)


def _layers(count: int) -> str:
    return f"{count} layer removed" if count == 1 else f"{count} layers removed"


def _wide(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return (
        bool(positive) and len(positive) == len(values) and max(positive) > LOG_FROM * min(positive)
    )


def answer_panels(scene: Scene) -> list[Panel]:
    """For each number of layers, the excess loss of the coloured repairs on the best cut."""
    panels = []
    for layers in layer_counts(asked(scene.entries)):
        best = lowest(scene.entries, layers)
        if best is None:
            continue
        rows = [
            each
            for each in at_cut(scene.entries, best.key.cut)
            if scene.style(each.key.repair).index is not None and each.excess is not None
        ]
        bars = [
            Bar(
                each.key.repair,
                max(each.excess or 0.0, 0.0),
                _share_text(each),
                _style(scene, each),
            )
            for each in reversed(rows)
        ]
        if bars:
            label = f"Excess loss of each repair, {_layers(layers)} by {best.key.select}"
            chart = bar_chart(bars, label, axis="nats above dense")
            panels.append(Panel(f"{_layers(layers)} ({best.key.select})", chart))
    return panels


def _style(scene: Scene, entry: Entry) -> Style:
    return scene.style(entry.key.repair)


def _share_text(entry: Entry) -> str:
    share = "" if entry.of_ghost is None else f" ({entry.of_ghost:.0%})"
    return f"+{entry.excess or 0.0:.3f}{share}"


def curve_views(scene: Scene) -> list[View]:
    """Loss, KL, agreement and accuracy against the number of layers, a panel a selection."""
    dense = scene.dense
    views = []
    if dense is not None and dense.loss is not None:
        views.append(_view(scene, "Mean loss", "nats above dense", lambda each: each.excess))
    else:
        views.append(_view(scene, "Mean loss", "loss, nats a token", lambda each: each.loss))
    names = corpus_names(scene.results)
    views += [
        _view(scene, name, "nats above dense", _above(dense, name))
        for name in (names if len(names) > 1 else ())
    ]
    views.append(_view(scene, "KL to dense", "KL, nats a token", lambda each: each.kl))
    views.append(
        _view(
            scene,
            "Same next token",
            "share of tokens, %",
            lambda each: None if each.agreement is None else 100 * each.agreement,
            log=False,
        )
    )
    accuracy = mean_accuracy(scene.results)
    views.append(
        _view(
            scene,
            "Task accuracy",
            "mean accuracy, %",
            lambda each: 100 * accuracy[each.key] if each.key in accuracy else None,
            log=False,
        )
    )
    return [view for view in views if view.panels]


def _above(dense: Entry | None, corpus: str) -> Callable[[Entry], float | None]:
    base = dense.losses.get(corpus) if dense else None

    def excess(entry: Entry) -> float | None:
        loss = entry.losses.get(corpus)
        return None if loss is None or base is None else loss - base

    return excess


def _view(
    scene: Scene,
    name: str,
    label: str,
    value: Callable[[Entry], float | None],
    *,
    log: bool | None = None,
) -> View:
    pruned = [each for each in scene.entries if not each.key.is_dense]
    known = [number for each in pruned if (number := value(each)) is not None]
    if not known:
        return View(name, ())
    logarithmic = _wide(known) if log is None else log
    scale = fit_scale(known, log=logarithmic, zero=log is None)
    axis = Axis(label + (" (log)" if logarithmic else ""), scale=scale, log=logarithmic)
    counts = Scale(min(layer_counts(pruned)) - 0.5, max(layer_counts(pruned)) + 0.5)
    across = Axis("layers removed", whole=True, scale=counts)
    panels = []
    for select in selections(pruned):
        mine = [each for each in pruned if each.key.select == select]
        lines = _curves(scene, mine, value)
        if lines and len(layer_counts(pruned)) == 1:
            panels.append(Panel(select, _ranking(lines, axis, f"{name} of each repair, {select}")))
        elif lines:
            note = f"{name} against layers removed, chosen by {select}, one line a repair"
            panels.append(Panel(select, line_chart(lines, across, axis, note)))
    return View(name, tuple(panels))


def _ranking(lines: Sequence[Series], axis: Axis, label: str) -> Markup:
    """A line a repair, lowest value first, where one number of layers makes no curve."""
    ranked = sorted(lines, key=lambda line: line.points[0][1])
    rows = [(line.name, [(line.points[0][1], line.notes[0], line.style)]) for line in ranked]
    return dot_chart(rows, axis, label)


def _curves(
    scene: Scene, entries: Sequence[Entry], value: Callable[[Entry], float | None]
) -> list[Series]:
    lines = []
    for repair in repairs_of(entries):
        points = sorted(
            (float(each.key.layers), known)
            for each in entries
            if each.key.repair == repair and (known := value(each)) is not None
        )
        notes = tuple(f"{repair}, {layers:.0f} layers: {known:.3f}" for layers, known in points)
        if points:
            lines.append(Series(repair, tuple(points), scene.style(repair), notes))
    return lines


def trade_panels(scene: Scene) -> list[Panel]:
    """Mean loss against time and against size, with the Pareto fronts."""
    panels = []
    for name, title, label, unit in (
        ("prefill_ms", "Speed", "prefill, ms", 1.0),
        ("num_parameters", "Size", "parameters, millions", 1e-6),
    ):
        known = [
            (size * unit, each.loss, each)
            for each in scene.entries
            if (size := each.number(name)) is not None and each.loss is not None
        ]
        if len(known) > 1:
            panels.append(_trade(scene, known, title, label))
    return panels


def _trade(
    scene: Scene, known: Sequence[tuple[float, float, Entry]], title: str, label: str
) -> Panel:
    front = pareto_front([(x, y) for x, y, _ in known])
    named = Counter(known[index][2].key.repair for index in front)
    series = []
    for repair in dict.fromkeys(each.key.repair for _, _, each in known):
        mine = [row for row in known if row[2].key.repair == repair]
        style = Style(7) if repair == "dense" else scene.style(repair)
        notes = tuple(f"{_title(each.key)}: {x:.1f}, loss {y:.3f}" for x, y, each in mine)
        series.append(Series(repair, tuple((x, y) for x, y, _ in mine), style, notes))
    axis, note = _loss_axis([y for _, y, _ in known])
    places = [(known[index][0], known[index][1]) for index in front]
    text = f"Mean loss against {label}, with the Pareto front"
    chart = scatter_chart(series, Axis(label), axis, text, places)
    return Panel(
        title,
        chart,
        "On the front: " + ", ".join(_times(*item) for item in named.most_common()) + "." + note,
    )


def _loss_axis(losses: Sequence[float]) -> tuple[Axis, str]:
    """An axis of losses that a few hopeless models do not flatten, and what it leaves out."""
    low = min(losses)
    limit = low + 4 * (median(losses) - low)
    shown = [loss for loss in losses if loss <= limit or limit == low]
    beyond = len(losses) - len(shown)
    note = f" Drawn at the upper edge, their loss being above it: {beyond}." if beyond else ""
    return Axis("mean loss, nats a token", scale=fit_scale(shown)), note


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ({count} times)"


def _title(key: Key) -> str:
    return "dense" if key.is_dense else f"{key.repair} ({key.select}, {key.layers})"


def similarity_panel(scene: Scene) -> Panel | None:
    """The similarity of all pairs of boundaries, with the chosen cuts."""
    tables = score_tables(scene.results)
    if not tables or not tables[0][1].get("similarity"):
        return None
    values = [[number(value) for value in row] for row in tables[0][1]["similarity"]]
    styles = selection_styles(scene)
    marks = [
        Mark(gap.start, gap.stop, f"{select}, {layers}: [{gap.start}, {gap.stop})", styles[select])
        for (layers, select), removed in _removed(scene).items()
        for gap in gaps_of(removed)
        if gap.stop < len(values)
    ]
    note = "Mean cosine between the stream at any two boundaries, with the gaps of every cut marked"
    return Panel("Similarity of boundaries", heat_map(values, marks, note))


def selection_styles(scene: Scene) -> dict[str, Style]:
    """A marker for each selection."""
    return {name: Style(index) for index, name in enumerate(selections(scene.entries))}


def _removed(scene: Scene) -> dict[tuple[int, str], str]:
    return {each.key.cut: each.removed for each in scene.entries if not each.key.is_dense}


def recover_panels(scene: Scene) -> list[Panel]:
    """For each number of layers, what spans promise and what their repair leaves."""
    panels = []
    for layers, table in score_tables(scene.results):
        spans = table.get("spans") or []
        lines = _span_lines(spans, number(table.get("dense_loss_nats")))
        if not lines:
            continue
        picture = line_chart(
            lines,
            Axis("first removed layer", whole=True),
            Axis("lower is better (log)", log=True),
            f"Scores of every span of {layers} layers by its first layer",
            bands=_flagged(spans),
            rules=_chosen(scene, layers),
        )
        panels.append(Panel(f"Spans of {layers} layers", picture, _birth_note(spans)))
    return panels


SPAN_SCORES = ("1 - cosine", "residual", "excess loss after repair")


def _span_lines(spans: Sequence[Mapping[str, Any]], dense: float | None) -> list[Series]:
    lines = []
    for index, name in enumerate(SPAN_SCORES):
        points = [
            (float(span["start"]), value)
            for span in spans
            if (value := _span_value(span, name, dense)) is not None and value > 0
        ]
        notes = tuple(f"span from layer {x:.0f}, {name}: {y:.3f}" for x, y in points)
        if points:
            lines.append(Series(name, tuple(points), Style(index), notes))
    return lines


def _span_value(span: Mapping[str, Any], name: str, dense: float | None) -> float | None:
    cosine, loss = number(span.get("cosine")), number(span.get("loss_nats"))
    if name == SPAN_SCORES[0]:
        return None if cosine is None else 1 - cosine
    if name == SPAN_SCORES[1]:
        return number(span.get("residual"))
    return None if loss is None or dense is None else loss - dense


def _flagged(spans: Sequence[Mapping[str, Any]]) -> list[Band]:
    starts = [int(span["start"]) for span in spans if span.get("massive_activation_born")]
    runs = merge_layers(set(starts))
    note = "a massive activation is born inside"
    return [Band(run.start - 0.5, run.stop - 0.5, note) for run in runs]


def _birth_note(spans: Sequence[Mapping[str, Any]]) -> str:
    return "Shaded: a massive activation is born inside." if _flagged(spans) else ""


def _chosen(scene: Scene, layers: int) -> list[tuple[float, str]]:
    starts: dict[int, list[str]] = {}
    for (count, select), removed in _removed(scene).items():
        gaps = gaps_of(removed)
        if count == layers and len(gaps) == 1:
            starts.setdefault(gaps[0].start, []).append(select)
    return [(float(start), ", ".join(names)) for start, names in sorted(starts.items())]


def norm_panel(scene: Scene) -> Panel | None:
    """Median and largest token norm at every boundary."""
    tables = score_tables(scene.results)
    if not tables:
        return None
    table = tables[0][1]
    lines = []
    for index, (name, field) in enumerate(
        (("median token", "median_norm"), ("largest token", "largest_norm"))
    ):
        points = [
            (float(boundary), value)
            for boundary, raw in enumerate(table.get(field) or [])
            if (value := number(raw)) is not None and value > 0
        ]
        notes = tuple(f"{name} at boundary {x:.0f}: {y:.4g}" for x, y in points)
        if points:
            lines.append(Series(name, tuple(points), Style(index), notes))
    if not lines:
        return None
    births = birth_layers(table.get("spans") or [])
    bands = [Band(b.start, b.stop, f"a massive activation is born in {b}") for b in births]
    picture = line_chart(
        lines,
        Axis("boundary", whole=True),
        Axis("token norm (log)", log=True),
        "Median and largest token norm by boundary",
        bands=bands,
    )
    where = ", ".join(_stretch(birth.start, birth.stop) for birth in births)
    note = f"Shaded: massive activations are born in {where}." if births else "No births flagged."
    return Panel("Token norms", picture, note)


def _stretch(start: int, stop: int) -> str:
    return f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"


def _operator_name(row: Mapping[str, Any]) -> str:
    start, stop = row["span"]
    return f"{row['select']}, {row['layers']}: [{start}, {stop})"


def spectrum_panels(scene: Scene, most: int = 160) -> list[Panel]:
    """Singular values of Ghost's operators, a panel a selection, and their parts' shares."""
    rows = drawn_operators(scene.results, scene.entries)
    panels = []
    for select in dict.fromkeys(str(row["select"]) for row in rows):
        mine = [row for row in rows if str(row["select"]) == select and row.get("singular_values")]
        lines = [_spectrum(row, index, most) for index, row in enumerate(mine)]
        if lines:
            picture = line_chart(
                lines,
                Axis("index of the singular value", zero=True),
                Axis("singular value of M (log)", log=True),
                f"Singular values of the operators on the cuts by {select}",
            )
            panels.append(Panel(f"Spectra, {select}", picture))
    shares = _share_rows(rows)
    if shares:
        picture = dot_chart(
            shares,
            Axis("share of the operator's norm, %", scale=Scale(0.0, 100.0)),
            "Symmetric and antisymmetric share of each operator",
            rules=((100 * PAPER_ANTISYMMETRIC, "46.9% (paper)"),),
        )
        panels.append(Panel("Symmetric and antisymmetric part", picture))
    return panels


def _spectrum(row: Mapping[str, Any], index: int, most: int) -> Series:
    values = [(place, number(value)) for place, value in enumerate(row["singular_values"], 1)]
    known = [(float(place), value) for place, value in values if value is not None and value > 0]
    step = max(1, -(-len(known) // most))
    every = max(1, len(known) // step // 8)
    return Series(_operator_name(row), tuple(known[::step]), Style(index), every=every)


SHARES = (("symmetric_share", "symmetric"), ("antisymmetric_share", "antisymmetric"))


def _share_rows(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[tuple[float, str, Style]]]]:
    drawn = []
    for row in rows:
        dots = [
            (100 * share, f"{_operator_name(row)}, {name}: {share:.1%}", Style(index))
            for index, (field, name) in enumerate(SHARES)
            if (share := number(row.get(field))) is not None
        ]
        if dots:
            drawn.append((_operator_name(row), dots))
    return drawn


def boundary_panels(scene: Scene) -> list[Panel]:
    """How far the stream stays from the dense one behind a cut, a panel a cut."""
    models = {key_of(row): row for row in scene.results.get("models", [])}
    known = [value for model in models.values() for _, value in _residuals(model)]
    axis = Axis("relative squared distance (log)", log=True, scale=fit_scale(known, log=True))
    panels = []
    for layers, select in cuts_of(scene.entries):
        lines = []
        for repair, style in scene.styles.items():
            points = _residuals(models.get(Key(layers, select, repair), {}))
            notes = tuple(f"{repair} at boundary {x:.0f}: {y:.3f}" for x, y in points)
            if points:
                lines.append(Series(repair, points, style, notes))
        if lines:
            picture = line_chart(
                lines,
                Axis("boundary of the original model", whole=True),
                axis,
                f"Distance to the dense stream, {_layers(layers)} by {select}",
            )
            panels.append(Panel(f"{_layers(layers)}, {select}", picture))
    return panels


def _residuals(model: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(boundary), value)
        for boundary, raw in model.get("boundary_residual") or []
        if (value := number(raw)) is not None and value > 0
    )
