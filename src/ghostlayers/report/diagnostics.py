"""Why a comparison came out as it did: pictures of the model, its spans and its operators."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ghostlayers.errors import counted
from ghostlayers.report.charts import (
    Axis,
    Band,
    Dot,
    Series,
    dot_chart,
    heat_map,
    limits,
    line_chart,
)
from ghostlayers.report.drawing import Style
from ghostlayers.report.figures import Overview, Panel
from ghostlayers.report.rows import Key, Operator, ScoredSpan
from ghostlayers.report.summary import (
    birth_layers,
    cuts_of,
    drawn_operators,
    gaps_of,
    score_tables,
    selections,
)
from ghostlayers.spans import merge_layers

MOST_VALUES = 160
"""Singular values drawn of one operator."""

PAPER_ANTISYMMETRIC = 0.469
"""Antisymmetric share of Ghost's operator on Llama-3.1-8B (arXiv:2605.15491)."""

SPAN_SCORES = ("1 - cosine", "residual", "excess loss after repair")
NORMS = ("median token", "largest token")
SHARES = ("symmetric", "antisymmetric")
"""Names of the lines and dots of the pictures that show no repairs."""


@dataclass(frozen=True)
class Part:
    """Pictures of one question, and what their lines and marks mean."""

    title: str
    panels: Sequence[Panel]
    keys: Mapping[str, Mapping[str, Style]] = field(default_factory=dict)
    note: str = ""


def diagnose(overview: Overview) -> list[Part]:
    """All parts, those without a picture too."""
    operators = {
        select: _numbered(name for name, _ in rows)
        for select, rows in operators_by_selection(overview).items()
    }
    return [
        _spans_part(overview),
        Part(
            "Token norms and massive activations",
            norm_panels(overview),
            {"Lines": _numbered(NORMS)},
        ),
        Part(
            "The operators",
            spectrum_panels(overview),
            {**operators, "Shares": _numbered(SHARES)},
            "M is what Ghost adds to the identity. A symmetric operator, such as LinearPatch's, "
            "can never reach the antisymmetric part; the paper reports 46.9% on Llama-3.1-8B.",
        ),
        Part(
            "Distance to the dense stream",
            boundary_panels(overview),
            note="Squared distance between the repaired and the dense stream, relative to the "
            "dense one, at every boundary behind the cut. Colours are those of the legend above.",
        ),
        Part(
            "Gates behind the cut",
            gate_panels(overview),
            note="What goes into the activation of every MLP behind the cut, beside the dense "
            "model's: how far the units' means have moved, in the dense units' standard deviations "
            "(RMS over units), and which share of units gives less than 1% of a token's RMS, with "
            "the dense model's as a thin grey line.",
        ),
    ]


def _spans_part(overview: Overview) -> Part:
    similarity, recover = similarity_panels(overview), recover_panels(overview)
    keys = {
        "Marks on the map": _numbered(selections(overview.entries) if similarity else ()),
        "Lines": _numbered(SPAN_SCORES if recover else ()),
    }
    return Part(
        "Which spans can go",
        [*similarity, *recover],
        keys,
        "Left of a cut's mark is the boundary it starts at, below it the one it stops at; marks "
        "nest where selections agree. Vertical lines name the selection that starts there.",
    )


def _numbered(names: Iterable[str]) -> dict[str, Style]:
    """A colour and marker for each name."""
    return {name: Style(index) for index, name in enumerate(names)}


def similarity_panels(overview: Overview) -> list[Panel]:
    """The similarity of all pairs of boundaries, with the chosen cuts."""
    tables = score_tables(overview.results)
    similarity = tables[0][1].similarity if tables else ()
    if not similarity:
        return []
    styles = _numbered(selections(overview.entries))
    marks = [
        Dot(f"{select}, {layers}: [{gap.start}, {gap.stop})", styles[select], gap.stop, gap.start)
        for (layers, select), removed in _removed(overview).items()
        for gap in gaps_of(removed)
        if gap.stop < len(similarity)
    ]
    note = "Mean cosine between the stream at any two boundaries, with the gaps of every cut marked"
    return [Panel("Similarity of boundaries", heat_map(similarity, marks, note))]


def _removed(overview: Overview) -> dict[tuple[int, str], str]:
    return {entry.key.cut: entry.removed for entry in overview.pruned}


def _line(
    name: str, values: Iterable[tuple[float, float | None]], style: Style, every: int = 1
) -> list[Series]:
    """A line of what a logarithmic axis can show, or none."""
    points = [(x, y) for x, y in values if y is not None and y > 0]
    return [Series(name, points, style, every)] if points else []


def recover_panels(overview: Overview) -> list[Panel]:
    """For each number of layers, what spans promise and what their repair leaves."""
    panels = []
    for layers, table in score_tables(overview.results):
        lines = [
            line
            for index, name in enumerate(SPAN_SCORES)
            for line in _line(
                name,
                [(s.start, _span_scores(s, table.dense_loss_nats)[index]) for s in table.spans],
                Style(index),
            )
        ]
        if lines:
            bands = _flagged(table.spans)
            picture = line_chart(
                lines,
                Axis("first removed layer", whole=True),
                Axis("lower is better (log)", log=True),
                f"Scores of every span of {counted(layers, 'layer')} by its first layer",
                bands=bands,
                rules=_chosen(overview, layers),
            )
            note = "Shaded: a massive activation is born inside." if bands else ""
            panels.append(Panel(f"Spans of {counted(layers, 'layer')}", picture, note))
    return panels


def _span_scores(span: ScoredSpan, dense: float | None) -> tuple[float | None, ...]:
    """The values of `SPAN_SCORES`."""
    unlike = None if span.cosine is None else 1 - span.cosine
    excess = None if span.loss_nats is None or dense is None else span.loss_nats - dense
    return unlike, span.residual, excess


def _flagged(spans: Sequence[ScoredSpan]) -> list[Band]:
    runs = merge_layers({span.start for span in spans if span.massive_activation_born})
    note = "a massive activation is born inside"
    return [Band(run.start - 0.5, run.stop - 0.5, note) for run in runs]


def _chosen(overview: Overview, layers: int) -> list[tuple[float, str]]:
    """Where cuts of one gap start, and which selections chose them."""
    starts: dict[int, list[str]] = {}
    for (count, select), removed in _removed(overview).items():
        gaps = gaps_of(removed)
        if count == layers and len(gaps) == 1:
            starts.setdefault(gaps[0].start, []).append(select)
    return [(float(start), ", ".join(names)) for start, names in sorted(starts.items())]


def norm_panels(overview: Overview) -> list[Panel]:
    """Median and largest token norm at every boundary."""
    tables = score_tables(overview.results)
    norms = [(table.median_norm, table.largest_norm) for _, table in tables[:1]]
    lines = [
        line
        for index, name in enumerate(NORMS)
        for values in norms
        for line in _line(name, enumerate(values[index]), Style(index))
    ]
    if not lines:
        return []
    births = birth_layers(tables[0][1].spans)
    picture = line_chart(
        lines,
        Axis("boundary", whole=True),
        Axis("token norm (log)", log=True),
        "Median and largest token norm by boundary",
        bands=[Band(b.start, b.stop, f"a massive activation is born in {b}") for b in births],
    )
    where = ", ".join(_stretch(birth.start, birth.stop) for birth in births)
    note = f"Shaded: massive activations are born in {where}." if births else "No births flagged."
    return [Panel("Token norms", picture, note)]


def _stretch(start: int, stop: int) -> str:
    return f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"


def operators_by_selection(overview: Overview) -> dict[str, list[tuple[str, Operator]]]:
    """The operators that are drawn, each with the name of its gap, by selection."""
    rows: dict[str, list[tuple[str, Operator]]] = {}
    for row in drawn_operators(overview.results, overview.entries):
        name = f"{row.layers}: [{row.span[0]}, {row.span[1]})"
        rows.setdefault(row.select, []).append((name, row))
    return rows


def spectrum_panels(overview: Overview) -> list[Panel]:
    """Singular values of Ghost's operators, a panel a selection, and their parts' shares."""
    panels = []
    shares = []
    for select, rows in operators_by_selection(overview).items():
        lines = [line for index, row in enumerate(rows) for line in _spectrum(*row, Style(index))]
        if lines:
            picture = line_chart(
                lines,
                Axis("index of the singular value"),
                Axis("singular value of M (log)", log=True),
                f"Singular values of the operators on the cuts by {select}",
            )
            panels.append(Panel(f"Spectra, {select}", picture))
        shares += [(f"{select}, {name}", _shares(row)) for name, row in rows if _shares(row)]
    if shares:
        picture = dot_chart(
            shares,
            Axis("share of the operator's norm, %", (0.0, 100.0)),
            "Symmetric and antisymmetric share of each operator",
            rules=((100 * PAPER_ANTISYMMETRIC, "46.9% (paper)"),),
        )
        panels.append(Panel("Symmetric and antisymmetric part", picture))
    return panels


def _spectrum(name: str, row: Operator, style: Style) -> list[Series]:
    """Every so many of the values, and a marker on about eight of them."""
    step = max(1, -(-len(row.singular_values) // MOST_VALUES))
    values = list(enumerate(row.singular_values, 1))[::step]
    return _line(name, values, style, max(1, len(values) // 8))


def _shares(row: Operator) -> list[Dot]:
    values = (row.symmetric_share, row.antisymmetric_share)
    return [
        Dot(f"{name}: {share:.1%}", Style(index), 100 * share)
        for index, (name, share) in enumerate(zip(SHARES, values, strict=True))
        if share is not None
    ]


def boundary_panels(overview: Overview) -> list[Panel]:
    """How far the stream stays from the dense one behind a cut, a panel a cut."""
    residuals = {row.key: row.boundary_residual for row in overview.results.models}
    known = [value for pairs in residuals.values() for _, value in pairs if value is not None]
    axis = Axis("relative squared distance (log)", limits(known, log=True), log=True)
    panels = []
    for layers, select in cuts_of(overview.entries):
        lines = [
            line
            for repair, style in overview.styles.items()
            for line in _line(
                repair,
                residuals.get(Key(layers, select, repair), []),
                style,
            )
        ]
        if lines:
            picture = line_chart(
                lines,
                Axis("boundary of the original model", whole=True),
                axis,
                f"Distance to the dense stream, {counted(layers, 'layer')} removed by {select}",
            )
            panels.append(Panel(f"{counted(layers, 'layer')} removed, {select}", picture))
    return panels


def gate_panels(overview: Overview) -> list[Panel]:
    """How far a cut moves the gates behind it, and how many units it silences: two panels a cut."""
    panels = []
    for cut in cuts_of(overview.entries):
        rows = {r.repair: r.gates for r in overview.results.models if r.key.cut == cut and r.gates}
        styles = {name: style for name, style in overview.styles.items() if name in rows}
        shifts = [
            line
            for name, style in styles.items()
            for line in _line(name, [(row.layer, row.mean_shift) for row in rows[name]], style)
        ]
        if shifts:
            panels.append(_gate_panel(cut, "shift of means", "standard deviations (log)", shifts))
        dead = [
            line
            for name, style in styles.items()
            for line in _line(name, [(row.layer, _percent(row.dead)) for row in rows[name]], style)
        ]
        dense = [(row.layer, _percent(row.dense_dead)) for row in next(iter(rows.values()), ())]
        dead += _line("dense", dense, overview.style("dense"))
        if dead:
            panels.append(_gate_panel(cut, "dead units", "% of units (log)", dead))
    return panels


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _gate_panel(cut: tuple[int, str], what: str, unit: str, lines: Sequence[Series]) -> Panel:
    title = f"{counted(cut[0], 'layer')} removed, {cut[1]}: {what}"
    axes = Axis("layer of the original model", whole=True), Axis(unit, log=True)
    return Panel(title, line_chart(lines, *axes, title))
