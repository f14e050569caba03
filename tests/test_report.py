"""The report of a comparison: summaries by hand, tables and page on results from a file."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ghostlayers.compare.files import RENDERERS
from ghostlayers.compare.store import REPORT
from ghostlayers.report import page
from ghostlayers.report.charts import limits
from ghostlayers.report.drawing import PALETTE, write_number
from ghostlayers.report.results import read_results
from ghostlayers.report.rows import Key, MeasuredModel, Operator, ScoredSpan
from ghostlayers.report.summary import (
    Entry,
    asked,
    best_overall,
    birth_layers,
    drawn_operators,
    excess_share,
    gaps_of,
    highlighted,
    lowest,
    mean,
    mean_accuracy,
    one_layer_less,
    pareto_front,
    summarise,
)
from ghostlayers.report.tables import tasks_to_csv, to_csv, to_markdown
from ghostlayers.report.words import NOTHING
from ghostlayers.spans import Span

FILE = Path(__file__).parent / "fixtures" / "results.json"
ATTACK = "<script>alert('$x$')</script>\"'|&\x1b"
GAP = {"layers": 2, "select": "recoverable", "repair": "piecewise:4", "reason": "several gaps"}

Values = dict[str, Any]


def full() -> Values:
    """Results with every section."""
    values: Values = json.loads(FILE.read_text())
    values["skipped"] = [{**GAP}, {"repair": "joint:x+z", "reason": "no such features"}]
    values["scores"]["2"]["spans"][3]["massive_activation_born"] = True
    dense, cut = ({k: row[k] for k in ("layers", "select", "repair", "removed")}
                  for row in (values["models"][0], values["models"][3]))  # fmt: skip
    for place, model in enumerate(values["models"][1:]):
        model["gates"] = [
            {
                "layer": layer,
                "mean_shift": 0.1,
                "spread": 1.1,
                "dead": 0.02 * place,
                "dense_dead": 0.01,
            }
            for layer in (3, 4, 5)
        ]
    values["prefixes"] = [f"Stretch {number}" for number in range(9)]
    for place, model in enumerate((dense, cut)):
        figures = {"repeated_4grams": 0.125 + place / 4, "dense_loss_nats": 1.5, "new_tokens": 7}
        texts = [f"text {place} {number}" for number in range(9)]
        more = {"greedy": {"agreement_tokens": 7.0 - place}, "sampled": {"distinct": 8.5}}
        values["writing"] = values.get("writing", []) + [
            {**model, "manner": manner, **figures, **row, "texts": texts}
            for manner, row in more.items()
        ]
    for number, (name, kind) in enumerate([(dense, "F16"), (dense, "Q8_0"), (cut, "Q8_0")], 3):
        row = {**name, "type": kind}
        speed = {"decode_tokens_s": 10.0 * number, "prompt_tokens": 512, "context": 4096}
        losses = {"corpus": "one", "loss_nats": float(number), "window_losses": [number, number]}
        values.setdefault("files", []).append({**row, "size_bytes": 9 - number, **speed})
        values.setdefault("file_losses", []).append({**row, **losses})
    return values


def minimal() -> Values:
    """Only what must be there."""
    names = [(0, "", "dense", "none", 3.0), (2, "streamline", "none", "4-5", 5.0)]
    names.append((2, "streamline", "ghost", "4-5", 4.0))
    keys = ("layers", "select", "repair", "removed", "loss_nats")
    return {
        "model": {"name": "tiny"},
        "recipe": {},
        "corpora": [{"name": "text"}],
        "cells": [{**dict(zip(keys, row, strict=True)), "corpus": "text"} for row in names],
    }


def hostile() -> Values:
    """Strings from models and prompts that would be markup if they were trusted."""
    values = full()
    values["model"]["name"] = values["prompt"] = values["command"] = ATTACK
    values["corpora"][0]["name"] = values["skipped"][0]["reason"] = ATTACK
    values["prefixes"][0] = values["writing"][0]["texts"][0] = ATTACK
    named = ("cells", "models", "operators", "tasks", "files", "file_losses", "writing")
    for row in (row for name in named for row in values[name]):
        row["repair"] = ATTACK if row["repair"] == "refit:1" else row["repair"]
        row["select"] = ATTACK if row["layers"] else ""
        row.update({key: ATTACK for key in ("corpus", "continuation", "task") if key in row})
    return values


def methods() -> Values:
    """Methods by their own choices."""
    values = full()
    recipe = {**values["recipe"], "data": "c4"}
    values["presets"] = {"recoverable": recipe}
    return values


def render(values: Values) -> str:
    return page.render_page(read_results(values))


@pytest.fixture(scope="module")
def shown() -> str:
    return render(full())


class Balance(HTMLParser):
    """Complains about tags that do not match, and notes what a page would fetch."""

    VOID = frozenset({"meta", "input", "br", "hr", "img", "link"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str | None] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in <{tag}>"
        links = ("src", "href", "xlink:href", "data", "action")
        self.fetched += [value or "" for key, value in attrs if key in links]
        self.ids += [value for key, value in attrs if key == "id"]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(text: str) -> Balance:
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("make", [full, minimal, hostile, methods])
def test_page_is_whole_and_alone(make: Any) -> None:
    text = render(make())
    parsed = parse(text)
    assert text.startswith("<!doctype html>")
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.fetched)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.scripts == 1
    assert not [word for word in ("@import", "url(", ">nan", ">None", ">inf ") if word in text]
    assert "<script>alert" not in text
    assert ("&lt;script&gt;alert" in text) == (make is hostile)


def test_page_names_everything(shown: str) -> None:
    for repair in ("none", "ghost", "refit:1"):
        assert f">{repair}</button>" in shown
    words = [
        "ghost with 1 removed",
        "within error",
        "joint:x+z, every cut",
        GAP["reason"],
        "250.50",
    ]
    assert all(word in shown for word in words)
    assert "Not on this page" not in shown


def test_pictures_are_the_same_each_time_and_coloured_by_the_page(shown: str) -> None:
    assert render(full()) == shown
    pictures = re.findall("<svg.*?</svg>", shown, re.DOTALL)
    assert len(pictures) > 8
    variables = set(re.findall(r"var\(--(\w+)\)", "".join(pictures)))
    assert {"text", "quiet", "grid", "c0", "page"} <= variables <= set(PALETTE)
    assert not [light for light, _ in PALETTE.values() if light in "".join(pictures)]
    assert all('role="img"' in each and 'aria-label="' in each for each in pictures)
    assert "font-family" not in "".join(pictures)
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


def test_a_pointer_reads_a_line_and_the_legend_finds_it(shown: str) -> None:
    number = re.search(
        r'<tr data-r="(\d)">\s*<td>[^\n]*</td>\s*<th[^>]*><button[^>]*>ghost<', shown
    )
    assert number
    assert re.search(
        rf'<g data-r="{number[1]}">\s*<title>ghost: [^<]+ at 1, [^<]+ at 2</title>', shown
    )


def test_minimal_page_says_what_is_missing() -> None:
    text = render(minimal())
    assert 'id="tasks"' not in text
    assert "Tasks" in text.split("Not on this page")[1]
    assert "leaves 100% of the excess loss of Ghost and 50% of the excess loss of no repair" in text


@pytest.mark.slow
@pytest.mark.parametrize("key", ["models", "tasks", "scores", "operators", "machine", "prompt"])
def test_page_without_one_section(key: str) -> None:
    values = full()
    del values[key]
    parse(render(values))


def test_page_without_dense_model_or_with_broken_numbers() -> None:
    values = full()
    values["cells"] = [cell for cell in values["cells"] if cell["layers"]]
    values["cells"][0]["loss_nats"] = math.nan
    values["cells"][2]["loss_nats"] = None
    parse(render(values))
    to_markdown(read_results(values))
    to_csv(read_results(values))


def test_one_number_of_layers_is_ranked_and_an_outlier_pinned() -> None:
    values = full()
    values["cells"] = [cell for cell in values["cells"] if cell["layers"] != 1]
    for cell in values["cells"]:
        cell["loss_nats"] += 50 if cell["repair"] == "none" else 0
    text = render(values)
    assert "Mean loss of each repair, recoverable" in text
    assert "their loss being above it: 1." in text


def test_csv_parses_back() -> None:
    values = hostile()
    rows = list(csv.DictReader(io.StringIO(to_csv(read_results(values)))))
    for row, cell in zip(rows, values["cells"], strict=True):
        assert float(row["loss_nats"]) == cell["loss_nats"]
        assert row["corpus"] == ATTACK.removesuffix("\x1b")
        assert float(row["perplexity"]) == pytest.approx(math.exp(cell["loss_nats"]))
    ghost = next(row for row in rows if row["repair"] == "ghost" and row["layers"] == "2")
    assert (ghost["added_parameters"], ghost["checkpoint"]) == ("1024", "custom")
    tasks = list(csv.DictReader(io.StringIO(tasks_to_csv(read_results(full())) or "")))
    for row, answered in zip(tasks, full()["tasks"], strict=True):
        assert (row["repair"], row["task"]) == (answered["repair"], answered["task"])
        assert float(row["acc"]) == answered["acc"]
    assert tasks_to_csv(read_results(minimal())) is None


def test_markdown_has_a_table_a_cut() -> None:
    losses, tasks = to_markdown(read_results(full())).split("\n## Tasks")
    losses, files = losses.split("\n## Cut or quantise")
    files, written = files.split("\n## What they write")
    assert "| dense | 12.5% |" in written
    assert "| dense | Q8_0 |" in files
    assert losses.count("\n## ") == 2
    assert "## 2 layers removed by recoverable: 1-2" in losses
    assert all(f"| {repair} |" in losses for repair in ("none", "ghost", "refit:1"))
    for part, kinds in ((losses, 1), (tasks, 2)):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) == kinds
    assert "<script>" not in to_markdown(read_results(hostile()))
    assert "| recoverable | 1-2 | ghost |" in to_markdown(read_results(methods()))


def test_texts_stand_side_by_side_behind_what_they_continue(shown: str) -> None:
    section = shown.split('id="writing"')[1].split("<section")[0]
    assert "Every model continued 9 stretches of the texts by 7 tokens" in section
    parts = section.split('class="prefix"')[1:]
    for part, place, drawn in zip(parts, (0, 4, 8), ("0", "", "1"), strict=True):
        assert f"Stretch {place}<" in part  # texts were drawn behind every eighth
        cards = re.findall(
            r"<strong>([^<]+)</strong><p>([^<]+)</p>(?:<p[^>]+>Drawn: ([^<]+)<)?", part
        )
        assert cards == [
            (name, f"text {number} {place}", f"text {number} {drawn}" if drawn else "")
            for number, name in enumerate(("dense", "refit:1"))
        ]
    rows = re.findall(r'<th scope="row"[^>]*>([^<]+)</th>\s*((?:<td[^>]*>[^<]*</td>\s*)+)', section)
    figures, no = {n: re.findall(r">([^<]*)</td>", cells) for n, cells in rows}, [NOTHING] * 2
    assert figures["dense"] == ["12.5%", *no, "7.0", "1.50", "12.5%", *no[:1], "1.50", "8.5"]
    assert figures["refit:1"][:4] == ["37.5%", *no, "6.0"]


def test_methods_that_wrote_go_by_their_names() -> None:
    text = to_markdown(read_results(methods())).split("## What they write")[1]
    assert "### 2 layers removed" in text
    assert "| recoverable | 37.5% |" in text


def test_an_overwritten_comparison_leaves_no_report() -> None:
    assert set(REPORT) == set(RENDERERS)


def test_summary_by_hand() -> None:
    dense, none, ghost = summarise(read_results(minimal()))
    assert (dense.excess, dense.of_ghost) == (None, None)
    assert (none.excess, none.of_ghost, none.of_none) == (2.0, 2.0, 1.0)
    assert (ghost.excess, ghost.of_ghost, ghost.of_none) == (1.0, 1.0, 0.5)
    assert lowest([dense, none, ghost], 2) == ghost
    assert lowest([dense, none, ghost], 2, stock_only=True) is None


def test_a_mean_needs_every_text() -> None:
    values = minimal()
    values["corpora"].append({"name": "other"})
    assert all(entry.loss is None for entry in summarise(read_results(values)))
    assert mean([1.0, 3.0]) == 2.0
    assert mean([1.0, None]) is None
    assert mean([]) is None


def test_excess_share_by_hand() -> None:
    assert excess_share(4.5, 4.0, 5.0) == 0.5
    assert excess_share(3.5, 4.0, 5.0) == -0.5
    assert excess_share(4.5, 4.0, 4.0) is None
    assert excess_share(None, 4.0, 5.0) is None


def test_pareto_front_by_hand() -> None:
    #         front   beaten   front   equal x  beaten  front   twin
    points = [(1, 9), (2, 9), (2, 5), (3, 6), (4, 5), (5, 1), (5, 1)]
    assert pareto_front(points) == [0, 2, 5]
    assert pareto_front([]) == []


def with_models(*rows: tuple[int, str, float, str]) -> list[Entry]:
    """Entries of (layers, repair, loss, checkpoint), dense at 4."""
    return [
        Entry(
            Key(layers, "streamline" if layers else "", repair), "", {}, loss, None, None,
            MeasuredModel(layers=layers, select="", repair=repair, checkpoint=kind),
        )
        for layers, repair, loss, kind in [(0, "dense", 4.0, "stock"), *rows]
    ]  # fmt: skip


def test_best_overall_needs_the_cuts_of_the_others() -> None:
    rows = [(layers, name, loss + layers, kind) for layers in (3, 5) for name, loss, kind in (
        ("ghost", 4.3, "custom"), ("normed", 4.2, "stock"), ("joint:x+phi", 4.1, "custom"),
    )]  # fmt: skip
    assert best_overall(with_models(*rows)) == "joint:x+phi"
    assert best_overall(with_models(*rows), stock_only=True) == "normed"
    assert best_overall(with_models(*rows[:-1])) == "normed"


def test_yardsticks_take_no_part_in_the_answer() -> None:
    rows = [(2, "ghost", 4.1, "custom"), (3, "ghost", 4.3, "custom"), (3, "none", 4.9, "stock")]
    entries = with_models(*rows, (3, "piecewise:8", 4.2, "custom"))
    assert {entry.key.layers for entry in asked(entries)} == {0, 3}
    assert best_overall(entries) == "piecewise:8"
    rival = one_layer_less(entries, entries[-1])
    assert rival is not None
    assert rival.key == Key(2, "streamline", "ghost")
    assert one_layer_less(entries, rival) is None
    only_ghost = with_models(rows[0], rows[1])  # nothing else was asked for
    assert asked(only_ghost) == only_ghost


def test_one_operator_a_gap_is_drawn() -> None:
    rows = tuple(
        Operator(layers=layers, select="streamline", repair=repair, span=(4, 4 + layers))
        for layers in (2, 3)
        for repair in ("linearpatch-diag", "ghost", "symmetric")
    )
    entries = with_models(
        (2, "ghost", 4.1, "custom"), (3, "ghost", 4.3, "custom"), (3, "none", 5, "stock")
    )
    results = read_results(minimal())
    without = tuple(row for row in rows if row.repair != "ghost")
    for operators, drawn in ((rows, [rows[4]]), (without, [without[2]]), ((), [])):
        given = results.model_copy(update={"operators": operators})
        assert drawn_operators(given, entries) == drawn  # 2 removed is a yardstick


def test_what_cannot_be_saved_wins_nothing() -> None:
    entries = with_models((3, "joint:x+phi", 4.1, "not savable"), (3, "ghost", 4.3, "custom"))
    best, any_best = lowest(entries, 3), lowest(entries, 3, savable=False)
    assert [entry and entry.key.repair for entry in (best, any_best)] == ["ghost", "joint:x+phi"]
    assert best_overall(entries) == "ghost"


def test_few_repairs_are_all_highlighted() -> None:
    names = ("none", "a", "b", "c", "linearpatch-diag", "replaceme", "ghost", "d", "best")
    rows = [(3, name, 6.0 - place / 10, "custom") for place, name in enumerate(names)]
    assert highlighted(with_models(*rows)) == [name for name in names if len(name) > 1]
    assert highlighted(with_models(*rows[:5])) == list(names[:5])


def test_gaps_and_births() -> None:
    assert gaps_of("12-15,17") == (Span(12, 16), Span(17, 18))
    assert gaps_of("none") == ()

    def flagged(length: int, starts: set[int]) -> list[ScoredSpan]:
        return [
            ScoredSpan(start=s, stop=s + length, massive_activation_born=s in starts)
            for s in range(9)
        ]

    assert birth_layers(flagged(3, {4, 5, 6})) == [Span(6, 7)]
    assert birth_layers(flagged(2, {1, 2, 3})) == [Span(1, 5)]


def test_mean_accuracy_needs_every_task() -> None:
    values = full()
    dense = values["tasks"][0]
    values["tasks"].append({**dense, "task": "verbs", "acc_norm": None})
    means = mean_accuracy(read_results(values))
    assert means == {Key(0, "", "dense"): pytest.approx((dense["acc_norm"] + dense["acc"]) / 2)}


def test_axes_hold_their_values() -> None:
    for values in ([], [3.0], [0.0, 0.0], [1e-9, 1e9], [-1.0, 1.0]):
        for log in (False, True):
            low, high = limits(values, log=log)
            assert low < high
            assert all(low < value < high for value in values if value > 0 or not log)
    assert limits([1.0, 2.0], zero=True)[0] == 0
    assert [write_number(v) for v in (0, 0.025, 350, 26000, 1.3e6, 1e-6)] == [
        "0", "0.025", "350", "26k", "1.3M", "1e-6",
    ]  # fmt: skip
