"""Which layers go: every selection at every number of layers, equal cuts together."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghostlayers.checkpoint.record import table_to_dict
from ghostlayers.compare.experiment import Experiment
from ghostlayers.compare.request import EVERY, Comparison
from ghostlayers.errors import counted
from ghostlayers.selection.choices import find_selection
from ghostlayers.spans import Span, format_layers, removed_layers

Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Choice:
    """Layers chosen one way, to be repaired in several."""

    layers: int
    select: str
    spans: Spans
    repairs: tuple[str, ...]


Cuts = dict[Spans, list[Choice]]
"""Cuts, and the choices that led to each."""

Jobs = list[tuple[Spans, tuple[str, ...]]]
"""Cuts, and the repairs of each."""


def choose(experiment: Experiment) -> tuple[Cuts, dict[str, Any]]:
    """The cuts, and the fullest table of scores for each number of layers."""
    cuts: Cuts = {}
    tables: dict[str, Any] = {}
    for choice, table in _choices(experiment):
        cuts.setdefault(choice.spans, []).append(choice)
        layers = str(choice.layers)
        if table is not None and _measured(table) > _measured(tables.get(layers)):
            tables[layers] = table
    return cuts, tables


def _choices(experiment: Experiment) -> Iterator[tuple[Choice, dict[str, Any] | None]]:
    request, repairs = experiment.request, experiment.repairs.names
    for layers in sorted(set(request.layers)):
        # A sweep that keeps a sample of the stream serves those that need none, too.
        for select in sorted(request.selections, key=lambda name: _needs_no_sample(request, name)):
            _choose_one(experiment, layers, select)
        for select in request.select:
            if select == EVERY:
                for span in request.every_span(experiment.study.dense.num_layers, layers):
                    name = f"{EVERY}:{format_layers(span.layers)}"
                    yield Choice(layers, name, (span,), repairs), None
                continue
            spans, table = _choose_one(experiment, layers, select)
            yield Choice(layers, select, spans, repairs), table
    if "ghost" in repairs:
        for layers in request.yardsticks:
            for select in request.selections:
                spans, _ = _choose_one(experiment, layers, select)
                yield Choice(layers, select, spans, ("ghost",)), None


def _needs_no_sample(request: Comparison, select: str) -> bool:
    recipe = request.recipe_for(request.layers[0], select)
    return "residuals" not in find_selection(recipe.select).needs


def _measured(table: Mapping[str, Any] | None) -> int:
    """How many residuals and losses a score table holds."""
    if table is None:
        return -1
    values = (span[key] for span in table["spans"] for key in ("residual", "loss_nats"))
    return sum(value is not None for value in values)


def _choose_one(
    experiment: Experiment, layers: int, select: str
) -> tuple[Spans, dict[str, Any] | None]:
    key = f"choice {layers} {select}"
    part = experiment.store.get(key)
    if part is None:
        experiment.say(f"Choosing {counted(layers, 'layer')} by {select}")
        recipe = experiment.request.recipe_for(layers, select)
        study = dataclasses.replace(experiment.study, recipe=recipe)
        with experiment.keeping(key, study) as keeping:
            cut = keeping.choose()
        table = None if cut.table is None else table_to_dict(cut.table)
        part = experiment.store.put(key, {"spans": span_rows(cut.spans), "table": table})
    return spans_in(part), part["table"]


def span_rows(spans: Sequence[Span]) -> list[list[int]]:
    """Spans as a part holds them."""
    return [[span.start, span.stop] for span in spans]


def spans_in(part: Mapping[str, Any]) -> Spans:
    """The spans that a part holds."""
    return tuple(Span(start, stop) for start, stop in part["spans"])


def jobs_of(cuts: Mapping[Spans, Sequence[Choice]]) -> Jobs:
    """The cuts that were chosen, and the repairs that any of their choices asks for, each once."""
    return [
        (spans, tuple(dict.fromkeys(name for choice in choices for name in choice.repairs)))
        for spans, choices in cuts.items()
    ]


def expected_jobs(request: Comparison, depth: int, repairs: tuple[str, ...]) -> Jobs:
    """Before anything is chosen: every choice a cut of its own, in the middle of the model."""
    wanted = [(count, select, repairs) for count in request.layers for select in request.select]
    if "ghost" in repairs:
        wanted += [
            (count, select, ("ghost",))
            for count in request.yardsticks
            for select in request.selections
        ]
    return [
        ((span,), names)
        for count, select, names in wanted
        for span in _expected_spans(request, select, count, depth)
    ]


def _expected_spans(request: Comparison, select: str, count: int, depth: int) -> Sequence[Span]:
    if select == EVERY:
        return request.every_span(depth, count)
    return (Span((depth - count) // 2, (depth + count) // 2),)


def cut_key(spans: Sequence[Span], names: Sequence[str]) -> str:
    """Under which a finished cut is kept."""
    return f"cut {format_layers(removed_layers(spans))} {' '.join(names)}"
