"""From a comparison's results to the pictures of its page."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from ghostlayers.errors import counted
from ghostlayers.report.charts import (
    Axis,
    Dot,
    Series,
    bar_chart,
    dot_chart,
    limits,
    line_chart,
    scatter_chart,
)
from ghostlayers.report.drawing import Style
from ghostlayers.report.results import Results
from ghostlayers.report.rows import Key
from ghostlayers.report.summary import (
    Entry,
    asked,
    at_cut,
    corpus_names,
    highlighted,
    layer_counts,
    lowest,
    mean_accuracy,
    pareto_front,
    repairs_of,
    selections,
    summarise,
)

LOG_FROM = 12.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

Value = Callable[[Entry], float | None]


@dataclass(frozen=True)
class Overview:
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
        return next((entry for entry in self.entries if entry.key.is_dense), None)

    @property
    def pruned(self) -> list[Entry]:
        """All others."""
        return [entry for entry in self.entries if not entry.key.is_dense]


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
    panels: Sequence[Panel]


def make_overview(results: Results) -> Overview:
    """Summaries, and a style for every repair: a colour for the highlighted ones."""
    entries = tuple(summarise(results))
    bright = highlighted(entries)
    styles = {
        repair: Style(bright.index(repair) if repair in bright else None, place)
        for place, repair in enumerate(repairs_of(entries))
    }
    return Overview(results, entries, styles)


def answer_panels(overview: Overview) -> list[Panel]:
    """For each number of layers, the excess loss of the coloured repairs on the best cut."""
    panels = []
    for layers in layer_counts(asked(overview.entries)):
        best = lowest(overview.entries, layers)
        rows = [] if best is None else at_cut(overview.entries, best.key.cut)
        bars = [
            (row.key.repair, Dot(_excess(row), overview.style(row.key.repair), max(row.excess, 0)))
            for row in reversed(rows)
            if overview.style(row.key.repair).index is not None and row.excess is not None
        ]
        if best is not None and bars:
            removed, select = f"{counted(layers, 'layer')} removed", best.key.select
            label = f"Excess loss of each repair, {removed} by {select}"
            title = f"{removed} ({select})"
            panels.append(Panel(title, bar_chart(bars, label)))
    return panels


def _excess(entry: Entry) -> str:
    share = "" if entry.of_ghost is None else f" ({entry.of_ghost:.0%})"
    return f"+{entry.excess or 0.0:.3f}{share}"


def curve_views(overview: Overview) -> list[View]:
    """Loss, KL, agreement and accuracy against the number of layers, a panel a selection."""
    dense = overview.dense
    names = corpus_names(overview.results)
    accuracy = mean_accuracy(overview.results)
    above = "nats above dense"
    wanted: list[tuple[str, str, Value, bool]] = [
        ("Mean loss", above, lambda entry: entry.excess, True)
        if dense is not None and dense.loss is not None
        else ("Mean loss", "loss, nats a token", lambda entry: entry.loss, True),
        *((name, above, _above(dense, name), True) for name in names if len(names) > 1),
        ("KL to dense", "KL, nats a token", lambda entry: entry.kl, True),
        ("Same next token", "share of tokens, %", lambda row: _percent(row.agreement), False),
        ("Task accuracy", "mean accuracy, %", lambda row: _percent(accuracy.get(row.key)), False),
    ]
    views = (
        View(name, _curve_panels(overview, name, label, value, distance=distance))
        for name, label, value, distance in wanted
    )
    return [view for view in views if view.panels]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _above(dense: Entry | None, corpus: str) -> Value:
    base = dense.losses.get(corpus) if dense else None

    def excess(entry: Entry) -> float | None:
        loss = entry.losses.get(corpus)
        return None if loss is None or base is None else loss - base

    return excess


def _curve_panels(
    overview: Overview, name: str, label: str, value: Value, *, distance: bool
) -> list[Panel]:
    """A panel a selection; a distance has an axis that starts at zero, or a logarithmic one."""
    pruned = overview.pruned
    known = [number for entry in pruned if (number := value(entry)) is not None]
    if not known:
        return []
    log = distance and 0 < min(known) * LOG_FROM < max(known)
    axis = Axis(label + (" (log)" if log else ""), limits(known, log=log, zero=distance), log=log)
    counts = layer_counts(pruned)
    across = Axis("layers removed", (counts[0] - 0.5, counts[-1] + 0.5), whole=True)
    panels = []
    for select in selections(pruned):
        lines = _curves(overview, select, value)
        if lines and len(counts) == 1:
            picture = _ranking(lines, axis, f"{name} of each repair, {select}")
            panels.append(Panel(select, picture))
        elif lines:
            note = f"{name} against layers removed, chosen by {select}, one line a repair"
            panels.append(Panel(select, line_chart(lines, across, axis, note)))
    return panels


def _ranking(lines: Sequence[Series], axis: Axis, label: str) -> Markup:
    """A line a repair, lowest value first, where one number of layers makes no curve."""
    ranked = sorted(lines, key=lambda line: line.points[0][1])
    rows = [(line.name, [Dot(line.title, line.style, line.points[0][1])]) for line in ranked]
    return dot_chart(rows, axis, label)


def _curves(overview: Overview, select: str, value: Value) -> list[Series]:
    entries = [entry for entry in overview.pruned if entry.key.select == select]
    lines = []
    for repair in repairs_of(entries):
        points = sorted(
            (float(entry.key.layers), known)
            for entry in entries
            if entry.key.repair == repair and (known := value(entry)) is not None
        )
        if points:
            lines.append(Series(repair, points, overview.style(repair)))
    return lines


def trade_panels(overview: Overview) -> list[Panel]:
    """Mean loss against time and against size, with the Pareto fronts."""
    wanted: tuple[tuple[str, str, Value], ...] = (
        ("Speed", "prefill, ms", lambda entry: entry.model.prefill_ms),
        ("Size", "parameters, millions", lambda entry: _millions(entry.model.num_parameters)),
    )
    panels = []
    for title, label, value in wanted:
        known = [
            (x, entry.loss, entry)
            for entry in overview.entries
            if (x := value(entry)) is not None and entry.loss is not None
        ]
        if len(known) > 1:
            panels.append(_trade(overview, known, title, label))
    return panels


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _trade(
    overview: Overview, known: Sequence[tuple[float, float, Entry]], title: str, label: str
) -> Panel:
    front = pareto_front([(x, y) for x, y, _ in known])
    dots = [
        Dot(f"{_title(entry.key)}: {x:.1f}, loss {y:.3f}", _dot_style(overview, entry), x, y)
        for x, y, entry in known
    ]
    axis, note = loss_axis([y for _, y, _ in known])
    picture = scatter_chart(
        dots, Axis(label), axis, f"Mean loss against {label}, with the Pareto front",
        [known[index][:2] for index in front],
    )  # fmt: skip
    named = Counter(known[index][2].key.repair for index in front)
    names = (f"{name} ({n} times)" if n > 1 else name for name, n in named.most_common())
    return Panel(title, picture, f"On the front: {', '.join(names)}.{note}")


def _dot_style(overview: Overview, entry: Entry) -> Style:
    return Style(7) if entry.key.is_dense else overview.style(entry.key.repair)


def loss_axis(losses: Sequence[float]) -> tuple[Axis, str]:
    """An axis of losses that a few hopeless models do not flatten, and what it leaves out."""
    low = min(losses)
    limit = low + 4 * (median(losses) - low)
    shown = [loss for loss in losses if loss <= limit or limit == low]
    beyond = len(losses) - len(shown)
    note = f" Drawn at the upper edge, their loss being above it: {beyond}." if beyond else ""
    return Axis("mean loss, nats a token", limits(shown)), note


def _title(key: Key) -> str:
    return "dense" if key.is_dense else f"{key.repair} ({key.select}, {key.layers})"
