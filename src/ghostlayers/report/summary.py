"""What the numbers of a comparison say: means, shares of excess loss, fronts. No drawing here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ghostlayers.errors import GhostlayersError
from ghostlayers.report.results import Results
from ghostlayers.report.rows import Key, MeasuredModel, Operator, ScoredSpan, Scores, TextLoss
from ghostlayers.spans import Span, merge_layers, parse_layers

USUAL = ("none", "linearpatch-diag", "replaceme", "ghost")
"""The repairs that are always drawn in colour: the published baselines and the paper's."""

STOCK = "stock"
NOT_SAVABLE = "not savable"
"""What ``checkpoint`` says of a model."""


@dataclass(frozen=True)
class Entry:
    """One model with its means over the texts.

    Attributes:
        key: which model.
        removed: its removed layers, such as ``12-18``.
        losses: nats a token on each text.
        loss: their mean; None unless every text was measured, since means over different
            texts cannot be compared.
        kl: mean divergence from the dense model, on the same condition.
        agreement: mean share of tokens on which it predicts what the dense model predicts.
        acceptance: mean share of tokens that the dense model would keep of its drafts.
        model: what was measured without a text: size, speed, checkpoint.
        excess: loss above the dense model's.
        of_ghost: excess as a share of Ghost's on the same cut.
        of_none: excess as a share of the unrepaired cut's.
    """

    key: Key
    removed: str
    losses: Mapping[str, float]
    loss: float | None
    kl: float | None
    agreement: float | None
    model: MeasuredModel
    excess: float | None = None
    of_ghost: float | None = None
    of_none: float | None = None
    acceptance: float | None = None


def mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None if there is no value or one of them is missing."""
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) / len(known) if known and len(known) == len(given) else None


HEALED = "+heal"
"""Behind a repair's name: its model was trained after the cut."""


def excess_share(loss: float | None, dense: float | None, reference: float | None) -> float | None:
    """(loss - dense) / (reference - dense); None where the reference loses nothing."""
    if loss is None or dense is None or reference is None or reference <= dense:
        return None
    return (loss - dense) / (reference - dense)


def corpus_names(results: Results) -> list[str]:
    """The texts in the order of the results."""
    return [text.name for text in results.corpora]


def summarise(results: Results) -> list[Entry]:
    """One entry a model, the dense one first, then in the order of the results."""
    models = {row.key: row for row in results.models}
    rows: dict[Key, dict[str, TextLoss]] = {}
    for row in results.cells:
        rows.setdefault(row.key, {})[row.corpus] = row
    plain = {
        key: _entry(key, cells, corpus_names(results), models.get(key))
        for key, cells in rows.items()
    }
    dense = next((entry.loss for key, entry in plain.items() if key.is_dense), None)
    entries = [_with_shares(entry, dense, plain) for entry in plain.values()]
    return sorted(entries, key=lambda entry: not entry.key.is_dense)


def _entry(
    key: Key, cells: Mapping[str, TextLoss], names: Sequence[str], model: MeasuredModel | None
) -> Entry:
    # No mean over some of the texts: without all of them there are no rows to take it over.
    rows = [cells[name] for name in names] if set(names) <= set(cells) else []
    return Entry(
        key=key,
        removed=next(iter(cells.values())).removed,
        losses={name: row.loss_nats for name, row in cells.items() if row.loss_nats is not None},
        loss=mean(row.loss_nats for row in rows),
        kl=mean(row.kl_nats for row in rows),
        agreement=mean(row.greedy_agreement for row in rows),
        acceptance=mean(row.acceptance for row in rows),
        model=model or MeasuredModel(layers=key.layers, select=key.select, repair=key.repair),
    )


def _with_shares(entry: Entry, dense: float | None, plain: Mapping[Key, Entry]) -> Entry:
    def share(repair: str) -> float | None:
        reference = plain.get(Key(*entry.key.cut, repair))
        return excess_share(entry.loss, dense, reference.loss if reference else None)

    if entry.key.is_dense:
        return entry
    return replace(
        entry,
        excess=None if entry.loss is None or dense is None else entry.loss - dense,
        of_ghost=share("ghost"),
        of_none=share("none"),
    )


def cuts_of(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    """The cuts, fewest layers first, selections in the order of the results."""
    cuts = dict.fromkeys(entry.key.cut for entry in entries if not entry.key.is_dense)
    return sorted(cuts, key=lambda cut: cut[0])


def layer_counts(entries: Sequence[Entry]) -> list[int]:
    """The numbers of removed layers, without the dense model's zero."""
    return sorted({entry.key.layers for entry in entries} - {0})


def selections(entries: Sequence[Entry]) -> list[str]:
    """The selections in the order of the results."""
    return list(dict.fromkeys(entry.key.select for entry in entries if not entry.key.is_dense))


def repairs_of(entries: Sequence[Entry]) -> list[str]:
    """The repairs in the order of the results."""
    return list(dict.fromkeys(entry.key.repair for entry in entries if not entry.key.is_dense))


def at_cut(entries: Sequence[Entry], cut: tuple[int, str]) -> list[Entry]:
    """The models of one cut, lowest loss first, those without a mean last."""
    return sorted((entry for entry in entries if entry.key.cut == cut), key=loss_order)


def loss_order(entry: Entry) -> float:
    """The mean loss, infinite where there is none."""
    return math.inf if entry.loss is None else entry.loss


def asked(entries: Sequence[Entry]) -> list[Entry]:
    """The models that were asked for: not Ghost alone with one layer less, which is a yardstick."""
    repairs: dict[int, set[str]] = {}
    for entry in entries:
        repairs.setdefault(entry.key.layers, set()).add(entry.key.repair)
    if max(map(len, repairs.values()), default=0) == 1:
        return list(entries)
    return [entry for entry in entries if entry.key.is_dense or len(repairs[entry.key.layers]) > 1]


def drawn_operators(results: Results, entries: Sequence[Entry]) -> list[Operator]:
    """One operator a gap: Ghost's, or the first repair's where Ghost took no part; no yardsticks.

    Args:
        results: with ``operators``.
        entries: its models.
    """
    rows = results.operators
    counts = set(layer_counts(asked(entries)))
    with_ghost = any(row.repair == "ghost" for row in rows)
    shown = "ghost" if with_ghost else next((row.repair for row in rows), None)
    return [row for row in rows if row.repair == shown and row.layers in counts]


def lowest(
    entries: Sequence[Entry], layers: int, *, stock_only: bool = False, savable: bool = True
) -> Entry | None:
    """The model of lowest mean loss with this many layers removed, over all selections.

    Args:
        entries: to choose from.
        layers: how many layers are gone.
        stock_only: stock checkpoints only.
        savable: only what a checkpoint can hold.
    """
    fitting = [
        entry
        for entry in entries
        if entry.key.layers == layers
        and entry.loss is not None
        and _is_kind(entry, stock_only=stock_only, savable=savable)
    ]
    return min(fitting, key=loss_order, default=None)


def _is_kind(entry: Entry, *, stock_only: bool, savable: bool) -> bool:
    kind = entry.model.checkpoint
    return (kind == STOCK or not stock_only) and (kind != NOT_SAVABLE or not savable)


def one_layer_less(entries: Sequence[Entry], entry: Entry, repair: str = "ghost") -> Entry | None:
    """The rival at about equal size: the same selection with one layer less removed."""
    key = Key(entry.key.layers - 1, entry.key.select, repair)
    return next((rival for rival in entries if rival.key == key), None)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, by the first coordinate.

    Lower is better in both. Of equal points the first stays.
    """
    order = sorted(range(len(points)), key=lambda index: (*points[index], index))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def best_overall(entries: Sequence[Entry], *, stock_only: bool = False) -> str | None:
    """The savable repair of lowest loss on average over the cuts that were asked for.

    Only repairs measured on as many cuts as any other take part, or else one that was only tried
    on an easy cut would win.
    """
    losses: dict[str, list[float]] = {}
    for entry in asked(entries):
        fits = _is_kind(entry, stock_only=stock_only, savable=True)
        if entry.key.is_dense or entry.loss is None or not fits:
            continue
        losses.setdefault(entry.key.repair, []).append(entry.loss)
    most = max((len(values) for values in losses.values()), default=0)
    full = {name: sum(v) / len(v) for name, v in losses.items() if len(v) == most}
    return min(full, key=lambda name: full[name], default=None)


def highlighted(entries: Sequence[Entry], most: int = 7) -> list[str]:
    """The repairs to draw in colour: all if they are few, else the usual ones and the best."""
    names = repairs_of(entries)
    if len(names) <= most:
        return names
    best = [best_overall(entries, stock_only=True), best_overall(entries)]
    wanted = {*USUAL, *(name for name in best if name)}
    return [name for name in names if name in wanted]


def gaps_of(removed: str) -> tuple[Span, ...]:
    """The gaps of a cut written as ``12-18,20``; none if it cannot be read."""
    try:
        return merge_layers(parse_layers(removed))
    except (GhostlayersError, ValueError):
        return ()


def birth_layers(spans: Sequence[ScoredSpan]) -> list[Span]:
    """Where massive activations are born: the layers that all flagged neighbouring spans share.

    A birth in layer b flags every span that contains b, so a run of consecutive flagged spans
    meets in b alone, unless the model's edge or a second birth cuts the run short.
    """
    flagged = sorted((span.start, span.stop) for span in spans if span.massive_activation_born)
    runs: list[list[tuple[int, int]]] = []
    for span in flagged:
        if runs and span[0] == runs[-1][-1][0] + 1:
            runs[-1].append(span)
        else:
            runs.append([span])
    return [_meeting(run) for run in runs]


def _meeting(run: Sequence[tuple[int, int]]) -> Span:
    start, stop = run[-1][0], run[0][1]
    return Span(start, stop) if start < stop else Span(run[0][0], run[-1][1])


def score_tables(results: Results) -> list[tuple[int, Scores]]:
    """The score tables by number of removed layers, smallest first."""
    return sorted((int(layers), table) for layers, table in results.scores.items())


def mean_accuracy(results: Results) -> dict[Key, float]:
    """Mean accuracy of every model that did all the tasks that any model did."""
    tasks = {row.task for row in results.tasks}
    scores: dict[Key, dict[str, float | None]] = {}
    for row in results.tasks:
        scores.setdefault(row.key, {})[row.task] = row.score
    means = {key: mean(done.get(task) for task in tasks) for key, done in scores.items()}
    return {key: value for key, value in means.items() if value is not None}
