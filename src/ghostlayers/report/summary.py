"""What the numbers of a comparison say: means, shares of excess loss, fronts. No drawing here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ghostlayers.errors import GhostlayersError
from ghostlayers.spans import Span, merge_layers, parse_layers

Results = Mapping[str, Any]
"""The dictionary that a comparison writes."""

USUAL = ("none", "linearpatch-diag", "replaceme", "ghost")
"""The repairs that are always drawn in colour: the published baselines and the paper's."""

STOCK = "stock"
NOT_SAVABLE = "not savable"
"""What ``checkpoint`` says of a model."""


@dataclass(frozen=True, order=True)
class Key:
    """One model: how many layers went, how they were chosen, how the cut was repaired."""

    layers: int
    select: str
    repair: str

    @property
    def cut(self) -> tuple[int, str]:
        """The number of layers and the selection."""
        return self.layers, self.select

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        return self.layers == 0


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
        excess: loss above the dense model's.
        of_ghost: excess as a share of Ghost's on the same cut.
        of_none: excess as a share of the unrepaired cut's.
        model: what was measured without a text: size, speed, checkpoint.
    """

    key: Key
    removed: str
    losses: Mapping[str, float]
    loss: float | None
    kl: float | None
    agreement: float | None
    excess: float | None = None
    of_ghost: float | None = None
    of_none: float | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    def number(self, name: str) -> float | None:
        """A finite number of ``model``, or None."""
        return number(self.model.get(name))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else: an absent value, infinity, not-a-number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None if there is no value or one of them is missing."""
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) / len(known) if known and len(known) == len(given) else None


def excess_share(loss: float | None, dense: float | None, reference: float | None) -> float | None:
    """(loss - dense) / (reference - dense); None where the reference loses nothing."""
    if loss is None or dense is None or reference is None or reference <= dense:
        return None
    return (loss - dense) / (reference - dense)


def key_of(row: Mapping[str, Any]) -> Key:
    """The model a row of the results speaks of."""
    return Key(int(row["layers"]), str(row["select"]), str(row["repair"]))


def corpus_names(results: Results) -> list[str]:
    """The texts in the order of the results."""
    return [str(corpus["name"]) for corpus in results["corpora"]]


def summarise(results: Results) -> list[Entry]:
    """One entry a model, the dense one first, then in the order of the results."""
    names = corpus_names(results)
    models = {key_of(row): row for row in results.get("models", [])}
    rows: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        rows.setdefault(key_of(cell), {})[str(cell["corpus"])] = cell
    plain = {key: _entry(key, cells, names, models.get(key, {})) for key, cells in rows.items()}
    dense = next((each.loss for key, each in plain.items() if key.is_dense), None)
    entries = [_with_shares(each, dense, plain) for each in plain.values()]
    return sorted(entries, key=lambda each: not each.key.is_dense)


def _entry(
    key: Key,
    cells: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    model: Mapping[str, Any],
) -> Entry:
    def average(quantity: str) -> float | None:
        return mean(number(cells.get(name, {}).get(quantity)) for name in names)

    losses = {name: number(cell.get("loss_nats")) for name, cell in cells.items()}
    return Entry(
        key=key,
        removed=str(next(iter(cells.values())).get("removed", "")),
        losses={name: loss for name, loss in losses.items() if loss is not None},
        loss=average("loss_nats"),
        kl=average("kl_nats"),
        agreement=average("greedy_agreement"),
        model=model,
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
    cuts = dict.fromkeys(each.key.cut for each in entries if not each.key.is_dense)
    return sorted(cuts, key=lambda cut: cut[0])


def layer_counts(entries: Sequence[Entry]) -> list[int]:
    """The numbers of removed layers, without the dense model's zero."""
    return sorted({each.key.layers for each in entries} - {0})


def selections(entries: Sequence[Entry]) -> list[str]:
    """The selections in the order of the results."""
    return list(dict.fromkeys(each.key.select for each in entries if not each.key.is_dense))


def repairs_of(entries: Sequence[Entry]) -> list[str]:
    """The repairs in the order of the results."""
    return list(dict.fromkeys(each.key.repair for each in entries if not each.key.is_dense))


def at_cut(entries: Sequence[Entry], cut: tuple[int, str]) -> list[Entry]:
    """The models of one cut, lowest loss first, those without a mean last."""
    return sorted((each for each in entries if each.key.cut == cut), key=loss_order)


def loss_order(entry: Entry) -> float:
    """The mean loss, infinite where there is none."""
    return math.inf if entry.loss is None else entry.loss


def asked(entries: Sequence[Entry]) -> list[Entry]:
    """The models that were asked for: not Ghost alone with one layer less, which is a yardstick."""
    repairs: dict[int, set[str]] = {}
    for each in entries:
        repairs.setdefault(each.key.layers, set()).add(each.key.repair)
    if max(map(len, repairs.values()), default=0) == 1:
        return list(entries)
    return [each for each in entries if each.key.is_dense or len(repairs[each.key.layers]) > 1]


def drawn_operators(results: Results, entries: Sequence[Entry]) -> list[Mapping[str, Any]]:
    """One operator a gap: Ghost's, or the first repair's where Ghost took no part; no yardsticks.

    Args:
        results: with ``operators``.
        entries: its models.
    """
    rows = list(results.get("operators") or [])
    names = list(dict.fromkeys(str(row.get("repair")) for row in rows))
    counts = set(layer_counts(asked(entries)))
    shown = "ghost" if "ghost" in names else next(iter(names), None)
    return [row for row in rows if str(row.get("repair")) == shown and row["layers"] in counts]


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
        each
        for each in entries
        if each.key.layers == layers
        and each.loss is not None
        and _is_kind(each, stock_only=stock_only, savable=savable)
    ]
    return min(fitting, key=loss_order, default=None)


def _is_kind(entry: Entry, *, stock_only: bool, savable: bool) -> bool:
    kind = entry.model.get("checkpoint")
    return (kind == STOCK or not stock_only) and (kind != NOT_SAVABLE or not savable)


def one_layer_less(entries: Sequence[Entry], entry: Entry, repair: str = "ghost") -> Entry | None:
    """The rival at about equal size: the same selection with one layer less removed."""
    key = Key(entry.key.layers - 1, entry.key.select, repair)
    return next((each for each in entries if each.key == key), None)


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
    for each in asked(entries):
        fits = _is_kind(each, stock_only=stock_only, savable=True)
        if each.key.is_dense or each.loss is None or not fits:
            continue
        losses.setdefault(each.key.repair, []).append(each.loss)
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


def birth_layers(spans: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Where massive activations are born: the layers that all flagged neighbouring spans share.

    A birth in layer b flags every span that contains b, so a run of consecutive flagged spans
    meets in b alone, unless the model's edge or a second birth cuts the run short.
    """
    flagged = sorted(
        (int(each["start"]), int(each["stop"]))
        for each in spans
        if each.get("massive_activation_born")
    )
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


def score_tables(results: Results) -> list[tuple[int, Mapping[str, Any]]]:
    """The score tables by number of removed layers, smallest first."""
    tables = results.get("scores") or {}
    return sorted((int(layers), table) for layers, table in tables.items())


def task_score(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Length-normalised accuracy and its standard error, or the plain one where there is none."""
    if number(row.get("acc_norm")) is not None:
        return number(row["acc_norm"]), number(row.get("acc_norm_stderr"))
    return number(row.get("acc")), number(row.get("acc_stderr"))


def mean_accuracy(results: Results) -> dict[Key, float]:
    """Mean accuracy of every model that did all the tasks that any model did."""
    tasks = {str(row["task"]) for row in results.get("tasks", [])}
    scores: dict[Key, dict[str, float | None]] = {}
    for row in results.get("tasks", []):
        scores.setdefault(key_of(row), {})[str(row["task"])] = task_score(row)[0]
    means = {key: mean(done.get(task) for task in tasks) for key, done in scores.items()}
    return {key: value for key, value in means.items() if value is not None}
