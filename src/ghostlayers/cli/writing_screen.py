"""What models write, on the screen: figures beside the dense model's, and a text of each."""

from collections.abc import Sequence

from ghostlayers.cli import screen
from ghostlayers.evaluation.written import WritingFigures, WritingReport
from ghostlayers.report.results import Results
from ghostlayers.report.summary import Entry
from ghostlayers.report.writing import (
    HEAD,
    explain,
    said_of_writing,
    writing_grid,
    written_cuts,
)
from ghostlayers.runtime.shown import one_line

GREEDY = 6
"""Columns of `HEAD` that speak of greedy texts."""

SHOWN = 2
"""Stretches whose texts are shown."""


def show_writing(report: WritingReport) -> None:
    """A row a manner, the dense model's below it; what the columns are; a few texts to read."""
    rows = []
    for ours, theirs in zip(report.figures, report.dense, strict=True):
        rows += [_row(ours.manner, ours), _row("  dense", theirs)]
    screen.table(("written", *HEAD[1:GREEDY], "distinct"), rows)
    screen.say(screen.dim(explain(len(report.prefixes), report.figures[0].new_tokens)))
    texts = zip(report.prefixes, report.dense[0].texts, report.figures[0].texts, strict=True)
    for shown in list(texts)[:SHOWN]:
        names = ("prefix", "dense", "this model")
        screen.prose([(name, one_line(text)) for name, text in zip(names, shown, strict=True)])


def _row(name: str, figures: WritingFigures) -> Sequence[str]:
    return (
        name,
        f"{figures.repeated_4grams:.1%}",
        f"{figures.loops:.0%}",
        f"{figures.healthy_tokens:.1f}",
        "" if figures.agreement_tokens is None else f"{figures.agreement_tokens:.1f}",
        f"{figures.dense_loss_nats:.2f}",
        "" if figures.distinct is None else f"{figures.distinct:.1f}",
    )


def show_written(results: Results, entries: Sequence[Entry]) -> None:
    """What the models of each cut of a comparison wrote greedily, the dense one's first."""
    if not results.writing:
        return
    for title, keys in written_cuts(results, entries):
        rows = [row[:GREEDY] for row in writing_grid(results, keys)[1]]
        screen.table(HEAD[:GREEDY], rows, f"Written greedily, {title}")
    screen.say(screen.dim(f"{said_of_writing(results)} Drawn ones: results.md."))
