"""What the models of a comparison wrote: figures as words in a grid, and texts side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ghostlayers.errors import counted
from ghostlayers.evaluation.written import DRAWN_EVERY, SAMPLES
from ghostlayers.report.accuracies import Grid
from ghostlayers.report.figures import Overview
from ghostlayers.report.page_table import Table, plain
from ghostlayers.report.results import Results
from ghostlayers.report.rows import Key, Writing
from ghostlayers.report.summary import Entry, at_cut, cuts_of, layer_counts, loss_order
from ghostlayers.report.words import NOTHING, decimal, percent
from ghostlayers.statistics.writing import LEAST_REPEATS, LONGEST_PERIOD

HEAD = (
    *("model", "repeated", "loops", "before it", "as dense", "dense loss"),
    *("repeated, drawn", "loops, drawn", "dense loss, drawn", f"distinct of {SAMPLES}"),
)


READ_EVERY = DRAWN_EVERY // 2
"""Texts behind every so many stretches are shown."""


@dataclass(frozen=True)
class Text:
    """What one model wrote behind one stretch of text.

    Attributes:
        name: of the model.
        colour: of its repair on the page.
        greedy: the likeliest token each time.
        drawn: at temperature 1; empty where none was.
    """

    name: str
    colour: str
    greedy: str
    drawn: str


@dataclass(frozen=True)
class Group:
    """The models of one cut, the dense one first.

    Attributes:
        title: names the cut.
        table: their figures.
        texts: some of the stretches, each with what every model wrote behind it.
    """

    title: str
    table: Table
    texts: Sequence[tuple[str, Sequence[Text]]]


def writing_content(overview: Overview) -> dict[str, Any] | None:
    """What the page shows of it; None where nothing was written."""
    results = overview.results
    if not results.writing:
        return None
    groups = [
        Group(title, plain(*writing_grid(results, keys)), _texts(overview, keys))
        for title, keys in written_cuts(results, overview.entries)
    ]
    return {"says": said_of_writing(results), "groups": groups}


def written_cuts(results: Results, entries: Sequence[Entry]) -> Iterator[tuple[str, list[Key]]]:
    """The models of each cut that wrote, lowest loss first, behind the dense one.

    Methods that chose for themselves stand together by their number of layers.

    Args:
        results: with ``writing``.
        entries: its models.
    """
    wrote = {row.key for row in results.writing}
    dense = [entry.key for entry in entries if entry.key.is_dense]
    for title, rows in _cuts(results, entries):
        keys = [entry.key for entry in rows if entry.key in wrote]
        if keys:
            yield title, [*dense, *keys]


def _cuts(results: Results, entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    if results.presets:
        for layers in layer_counts(entries):
            mine = [entry for entry in entries if entry.key.layers == layers]
            yield f"{counted(layers, 'layer')} removed", sorted(mine, key=loss_order)
        return
    for layers, select in cuts_of(entries):
        mine = at_cut(entries, (layers, select))
        yield f"{counted(layers, 'layer')} removed by {select}: {mine[0].removed}", mine


def writing_grid(results: Results, keys: Sequence[Key]) -> Grid:
    """A row a model: its greedy texts, then those drawn.

    Args:
        results: with ``writing``.
        keys: the models, in the order of the rows; those that wrote nothing are left out.
    """
    rows = [
        (_name(results, key), *_figures(*pair))
        for key in keys
        if (pair := _of(results, key)) is not None
    ]
    return HEAD, rows


def _name(results: Results, key: Key) -> str:
    return key.select if results.presets and not key.is_dense else key.repair


def _of(results: Results, key: Key) -> tuple[Writing, Writing] | None:
    mine = {row.manner: row for row in results.writing if row.key == key}
    return (mine["greedy"], mine["sampled"]) if {"greedy", "sampled"} <= set(mine) else None


def _figures(greedy: Writing, drawn: Writing) -> tuple[str, ...]:
    return (
        percent(greedy.repeated_4grams, 1),
        percent(greedy.loops),
        decimal(greedy.healthy_tokens, 1),
        decimal(greedy.agreement_tokens, 1),
        decimal(greedy.dense_loss_nats, 2),
        percent(drawn.repeated_4grams, 1),
        percent(drawn.loops),
        decimal(drawn.dense_loss_nats, 2),
        decimal(drawn.distinct, 1),
    )


def _texts(overview: Overview, keys: Sequence[Key]) -> list[tuple[str, list[Text]]]:
    """Every `READ_EVERY`-th stretch, those that texts were drawn behind among them."""
    results = overview.results
    pairs = [(key, pair) for key in keys if (pair := _of(results, key)) is not None]
    shown = []
    for place in range(0, len(results.prefixes), READ_EVERY):
        texts = [
            Text(
                _name(results, key),
                overview.style(key.repair).colour,
                _at(greedy, place),
                _at(drawn, place // DRAWN_EVERY) if place % DRAWN_EVERY == 0 else "",
            )
            for key, (greedy, drawn) in pairs
        ]
        shown.append((results.prefixes[place], texts))
    return shown


def _at(row: Writing, place: int) -> str:
    return row.texts[place] if place < len(row.texts) else NOTHING


def said_of_writing(results: Results) -> str:
    """How much was written, and what the columns are."""
    return explain(len(results.prefixes), results.writing[0].new_tokens or 0)


def explain(prefixes: int, new_tokens: int) -> str:
    """How much was written, and what the columns of a table of it are.

    Args:
        prefixes: stretches that were continued.
        new_tokens: of each text.
    """
    return (
        f"Every model continued {prefixes} stretches of the texts by {new_tokens} tokens, none "
        f"ending before: greedily, and {SAMPLES} times drawn at temperature 1 behind one in "
        f"{DRAWN_EVERY}. Repeated: 4-grams that stood in the text before. Loops: texts that end in "
        f"at most {LONGEST_PERIOD} tokens said {LEAST_REPEATS} times or more; before it: tokens "
        "before the loop, all of a text without one. As dense: tokens before the dense model's "
        "greedy text differs. Dense loss: the dense model's on what was written, nats a token. "
        f"Distinct: of {SAMPLES} drawn texts, those that say something else by their words; noise "
        "is distinct, too, so read it beside the loss."
    )
