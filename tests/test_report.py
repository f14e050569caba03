"""The report of a comparison: summaries by hand, tables and page on invented results."""

import copy
import csv
import io
import math
import random
from html.parser import HTMLParser

import pytest

from ghostlayers.compare.files import RENDERERS
from ghostlayers.compare.store import REPORT
from ghostlayers.report.accuracies import DIFFERENCES
from ghostlayers.report.page import render_page
from ghostlayers.report.summary import (
    Entry,
    Key,
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
    number,
    one_layer_less,
    pareto_front,
    summarise,
)
from ghostlayers.report.svg import Scale, fit_scale, tag, write_number
from ghostlayers.report.tables import tasks_to_csv, to_csv, to_markdown
from ghostlayers.spans import Span

TEXTS = {"wikitext-2": 3.60, "c4": 3.50, "ptb": 4.37}
REPAIRS = {
    # share of Ghost's excess, added parameters, milliseconds, checkpoint
    "none": (1.68, 0, 0.0, "stock"),
    "magnitude": (1.66, 0, 0.0, "stock"),
    "linearpatch-diag": (1.47, 576, 0.1, "custom"),
    "linearpatch-hadamard": (1.44, 331776, 1.1, "custom"),
    "procrustes": (1.41, 331776, 1.1, "not savable"),
    "replaceme": (1.29, 0, 0.0, "stock"),
    "refit:1": (1.09, 0, 0.0, "stock"),
    "refit:2": (1.01, 0, 0.0, "stock"),
    "ghost": (1.0, 331776, 1.1, "custom"),
    "ghost:rank=64": (1.12, 73728, 0.6, "custom"),
    "ghost:ridge=auto": (0.99, 331776, 1.1, "custom"),
    "normed": (0.98, 331776, 1.2, "stock"),
    "joint:x+z": (0.92, 331776, 1.1, "custom"),
    "joint:x+phi": (0.87, 2654208, 7.0, "custom"),
    "piecewise:8": (0.89, 2654208, 3.0, "custom"),
}
CUTS = {
    (3, "recoverable"): ("20-22", 0.17),
    (5, "recoverable"): ("15-19", 0.31),
    (7, "recoverable"): ("12-18", 0.546),
    (3, "streamline"): ("21-23", 0.18),
    (5, "streamline"): ("14-18", 0.34),
    (7, "streamline"): ("12-18", 0.546),
    (3, "shortgpt"): ("17,25-26", 0.20),
    (5, "shortgpt"): ("13-15,25-26", 0.38),
    (7, "shortgpt"): ("12-15,17,25-26", 0.62),
}
LAYERS = 30


def loss_of(cut, share, text, noise):
    return TEXTS[text] + CUTS[cut][1] * share * (0.9 + 0.1 * len(text) / 10) + noise.gauss(0, 0.004)


def full_results(repairs=REPAIRS, cuts=CUTS):
    """Results with every section, shaped like those of SmolLM2-135M."""
    noise = random.Random(3)
    results = {
        "schema": 1,
        "ghostlayers": "0.1",
        "created": "2026-11-24",
        "machine": {"processor": "Example 2-core", "threads": 2, "torch": "2.13", "device": "cpu"},
        "model": {
            "name": "SmolLM2-135M",
            "num_layers": LAYERS,
            "hidden_size": 576,
            "num_parameters": 134515008,
            "licence": "apache-2.0",
        },
        "recipe": {"windows": 128, "fit_windows": 96, "sequence_length": 512, "seed": 0},
        "command": "ghostlayers compare SmolLM2-135M --layers 3,5,7",
        "corpora": [
            {
                "name": name,
                "num_windows": 12,
                "sequence_length": 512,
                "bos": False,
                "available_windows": 571,
                "calibration_overlap": 0,
            }
            for name in TEXTS
        ],
        "prompt": "The capital of France is",
        "cells": [],
        "models": [],
        "tasks": [],
        "comparisons": [],
        "operators": [],
        "scores": {str(n): score_table(n, noise) for n in sorted({c[0] for c in cuts})},
        "published": [
            {
                "source": "arXiv:2605.15491, table 2",
                "layers": 7,
                "select": "streamline",
                "repair": repair,
                "metric": metric,
                "value": value,
            }
            for repair, metric, value in (
                ("ghost", "ppl_average", 27.81),
                ("ghost", "accuracy_average", 60.01),
                ("none", "ppl_average", 2398.0),
            )
        ],
        "skipped": [
            {
                "layers": 7,
                "select": "shortgpt",
                "repair": "piecewise:4",
                "reason": "several gaps: not supported",
            }
        ],
    }
    add_model(results, Key(0, "", "dense"), "none", 0.0, (0, 0.0, "stock"), noise)
    for cut, (removed, _) in cuts.items():
        for repair, (share, added, time, kind) in repairs.items():
            add_model(results, Key(*cut, repair), removed, share, (added, time, kind), noise)
        for gap in gaps_of(removed):
            results["operators"].append(operator(cut, removed, gap))
    results["comparisons"] = [
        comparison("ghost", "none", 0.06),
        comparison("ghost", "refit:2", 0.004),
    ]
    return results


def add_model(results, key, removed, share, extra, noise):
    added, time, kind = extra
    where = {"layers": key.layers, "select": key.select, "repair": key.repair}
    for text in TEXTS:
        loss = TEXTS[text] if key.is_dense else loss_of(key.cut, share, text, noise)
        above = loss - TEXTS[text]
        results["cells"].append(
            {
                **where,
                "removed": removed,
                "corpus": text,
                "num_tokens": 6132,
                "loss_nats": loss,
                "kl_nats": 0.0 if key.is_dense else 0.9 * above,
                "greedy_agreement": 1.0 if key.is_dense else 0.9 - 0.5 * above,
            }
        )
    results["models"].append(
        {
            **where,
            "removed": removed,
            "num_parameters": 134515008 - key.layers * 3540096 + added,
            "added_parameters": added,
            "prefill_ms": 180 - key.layers * 5.5 + time + noise.gauss(0, 0.5),
            "prefill_spread_ms": 1.5,
            "prefill_tokens": 512,
            "kv_bytes_per_token": 768 * (LAYERS - key.layers),
            "checkpoint": kind,
            "fit_seconds": 12.5,
            "continuation": " Paris, a city on the Seine that is known for its museums and bread"
            + " and rain" * int(3 * share)
            + ".",
            "worse_than_none": key.repair == "magnitude" and key.layers == 7,
            "gaps": [
                {
                    "span": [gap.start, gap.stop],
                    "relative_residual": 0.16 * share,
                    "condition_number": 1e5,
                    "ridge": None,
                }
                for gap in gaps_of(removed)
            ]
            if not key.is_dense
            else [],
            "boundary_residual": []
            if key.is_dense
            else [
                [boundary, 0.1 * share * math.exp((boundary - 25) / 12)]
                for boundary in range(gaps_of(removed)[0].stop, LAYERS + 1)
            ],
        }
    )
    if key.layers in (0, 7) and key.repair in ("dense", "none", "replaceme", "ghost", "joint:x+z"):
        for task, base in (("arc_easy", 0.62), ("hellaswag", 0.43), ("winogrande", 0.53)):
            results["tasks"].append(
                {
                    **where,
                    "task": task,
                    "version": 1,
                    "num_documents": 1000,
                    "acc": base - 0.06 * share,
                    "acc_stderr": 0.015,
                    "acc_norm": None if task == "winogrande" else base - 0.05 * share,
                    "acc_norm_stderr": None if task == "winogrande" else 0.015,
                }
            )


def score_table(layers, noise):
    births = [10]
    spans = []
    for start in range(LAYERS - layers + 1):
        birth = any(start <= layer < start + layers for layer in births)
        spans.append(
            {
                "start": start,
                "stop": start + layers,
                "cosine": 0.97 - 0.3 * abs(start - 15) / 15 - 0.02 * layers,
                "residual": 1.3 if birth else 0.03 * layers + 0.01 * abs(start - 15),
                "loss_nats": 3.9 + 0.3 * noise.random() if 10 < start < 17 else None,
                "massive_activation_born": birth,
            }
        )
    return {
        "num_layers": LAYERS,
        "block_influence": [0.05] * LAYERS,
        "similarity": [
            [math.exp(-abs(a - b) / 14) for b in range(LAYERS + 1)] for a in range(LAYERS + 1)
        ],
        "median_norm": [20 * 1.12**b for b in range(LAYERS + 1)],
        "largest_norm": [230 if b < 11 else 26000 - 100 * b for b in range(LAYERS + 1)],
        "dense_loss_nats": 3.82,
        "spans": spans,
    }


def operator(cut, removed, gap):
    return {
        "layers": cut[0],
        "select": cut[1],
        "removed": removed,
        "span": [gap.start, gap.stop],
        "singular_values": [3 * cut[0] / 7 * math.exp(-place / 90) for place in range(576)],
        "symmetric_share": 0.89 - cut[0] / 100,
        "antisymmetric_share": 0.41 + cut[0] / 100,
        "identity_distance": 0.4,
    }


def comparison(one, other, difference):
    return {
        "a": {"layers": 7, "select": "recoverable", "repair": one},
        "b": {"layers": 7, "select": "recoverable", "repair": other},
        "metric": "acc_norm",
        "difference": difference,
        "stderr": 0.008,
        "low": difference - 0.016,
        "high": difference + 0.016,
        "p": 0.6 if difference < 0.016 else 0.001,
    }


def minimal_results():
    """Only what must be there."""
    cells = [
        {"layers": 0, "select": "", "repair": "dense", "removed": "none", "loss_nats": 3.0},
        {"layers": 2, "select": "streamline", "repair": "none", "removed": "4-5", "loss_nats": 5.0},
        {
            "layers": 2,
            "select": "streamline",
            "repair": "ghost",
            "removed": "4-5",
            "loss_nats": 4.0,
        },
    ]
    return {
        "schema": 1,
        "model": {"name": "tiny"},
        "recipe": {},
        "corpora": [{"name": "text"}],
        "cells": [{**cell, "corpus": "text"} for cell in cells],
    }


ATTACK = "<script>alert('x')</script>\"'|&"


def hostile_results():
    """Strings from models and prompts that would be markup if they were trusted."""
    results = full_results(
        cuts={cut: CUTS[cut] for cut in [(7, "recoverable"), (5, "recoverable")]}
    )
    results["model"]["name"] = results["prompt"] = results["command"] = ATTACK
    results["skipped"][0]["reason"] = ATTACK
    results["corpora"][0]["name"] = ATTACK
    for row in [*results["cells"], *results["models"]]:
        if row.get("corpus") == "wikitext-2":
            row["corpus"] = ATTACK
        row["repair"] = ATTACK if row["repair"] == "magnitude" else row["repair"]
        row["continuation"] = ATTACK
    return results


class Balance(HTMLParser):
    """Complains about tags that do not match, and notes what a page would fetch."""

    VOID = frozenset({"meta", "input", "br", "hr", "img", "link"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.fetched, self.ids, self.links, self.scripts = [], [], [], [], 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"repeated attribute in <{tag}>"
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")
        ]
        self.ids += [v for k, v in attrs if k == "id"]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def parse(page):
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("make", [full_results, minimal_results, hostile_results])
def test_page_is_whole_and_alone(make):
    page = render_page(make())
    parsed = parse(page)
    assert page.startswith("<!doctype html>")
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.fetched)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.scripts == 1
    assert "@import" not in page
    assert "url(" not in page
    assert not [word for word in ("nan", "None,", "inf ") if f">{word}" in page]


def test_page_names_everything():
    results = full_results()
    page = render_page(results)
    for repair in REPAIRS:
        assert f">{repair}</button>" in page
    for word in (
        "streamline",
        "wikitext-2",
        "The capital of France is",
        "several gaps",
        "within error",
    ):
        assert word in page
    assert "Not on this page" not in page


def test_minimal_page_says_what_is_missing():
    page = render_page(minimal_results())
    assert 'id="tasks"' not in page
    assert "Tasks" in page.split("Not on this page")[1]
    assert "leaves 100% of the excess loss of Ghost and 50% of the excess loss of no repair" in page


def test_hostile_strings_stay_text():
    page = render_page(hostile_results())
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<script>" not in to_markdown(hostile_results())


@pytest.mark.parametrize("key", ["models", "tasks", "scores", "operators", "machine", "prompt"])
def test_page_without_one_section(key):
    results = full_results()
    del results[key]
    parse(render_page(results))


def test_page_without_dense_model_or_with_broken_numbers():
    results = full_results()
    results["cells"] = [cell for cell in results["cells"] if cell["layers"]]
    results["cells"][0]["loss_nats"] = math.nan
    results["cells"][4]["loss_nats"] = None
    parse(render_page(results))
    to_markdown(results)
    to_csv(results)


def test_results_are_not_changed():
    results = full_results()
    before = copy.deepcopy(results)
    render_page(results)
    to_markdown(results)
    to_csv(results)
    assert results == before


def test_csv_parses_back():
    results = hostile_results()
    rows = list(csv.DictReader(io.StringIO(to_csv(results))))
    assert len(rows) == len(results["cells"])
    for row, cell in zip(rows, results["cells"], strict=True):
        assert float(row["loss_nats"]) == cell["loss_nats"]
        assert row["corpus"] == cell["corpus"]
        assert row["repair"] == cell["repair"]
        assert float(row["perplexity"]) == pytest.approx(math.exp(cell["loss_nats"]))
    ghost = next(row for row in rows if row["repair"] == "ghost")
    assert (ghost["added_parameters"], ghost["checkpoint"]) == ("331776", "custom")


def test_markdown_has_a_table_a_cut():
    text = to_markdown(full_results())
    losses, tasks = text.split("\n## Tasks")
    assert losses.count("\n## ") == len(CUTS)
    lines = [line for line in losses.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "## 7 layers removed by shortgpt: 12-15,17,25-26" in text
    assert all(f"| {repair} |" in text for repair in REPAIRS)
    grids = [line.count("|") for line in tasks.splitlines() if line.startswith("|")]
    names = {row["task"] for row in full_results()["tasks"]}
    assert set(grids) == {len(names) + 3, len(DIFFERENCES) + 1}


def test_accuracies_as_rows():
    results = full_results()
    rows = list(csv.DictReader(io.StringIO(tasks_to_csv(results))))
    assert len(rows) == len(results["tasks"])
    for row, told in zip(rows, results["tasks"], strict=True):
        assert (row["repair"], row["task"]) == (told["repair"], told["task"])
        assert float(row["acc"]) == told["acc"]
    assert tasks_to_csv(minimal_results()) is None


def test_an_overwritten_comparison_leaves_no_report():
    assert set(REPORT) == set(RENDERERS)


def test_summary_by_hand():
    results = minimal_results()
    dense, none, ghost = summarise(results)
    assert (dense.excess, dense.of_ghost) == (None, None)
    assert (none.excess, none.of_ghost, none.of_none) == (2.0, 2.0, 1.0)
    assert (ghost.excess, ghost.of_ghost, ghost.of_none) == (1.0, 1.0, 0.5)
    assert lowest([dense, none, ghost], 2) == ghost
    assert lowest([dense, none, ghost], 2, stock_only=True) is None


def test_a_mean_needs_every_text():
    results = minimal_results()
    results["corpora"].append({"name": "other"})
    assert all(each.loss is None for each in summarise(results))
    assert mean([1.0, 3.0]) == 2.0
    assert mean([1.0, None]) is None
    assert mean([]) is None


def test_excess_share_by_hand():
    assert excess_share(4.5, 4.0, 5.0) == 0.5
    assert excess_share(3.5, 4.0, 5.0) == -0.5
    assert excess_share(4.5, 4.0, 4.0) is None
    assert excess_share(None, 4.0, 5.0) is None


def test_numbers_are_finite_or_nothing():
    assert [number(v) for v in (1, 2.5, True, "3", None, math.nan, math.inf)] == [
        1.0, 2.5, None, None, None, None, None,
    ]  # fmt: skip


def test_pareto_front_by_hand():
    #         front   beaten   front   equal x  beaten  front   twin
    points = [(1, 9), (2, 9), (2, 5), (3, 6), (4, 5), (5, 1), (5, 1)]
    assert pareto_front(points) == [0, 2, 5]
    assert pareto_front([]) == []


def test_best_overall_needs_the_cuts_of_the_others():
    entries = summarise(full_results())
    assert best_overall(entries) == "joint:x+phi"
    assert best_overall(entries, stock_only=True) == "normed"
    partial = [each for each in entries if each.key.repair != "joint:x+phi" or each.key.layers == 3]
    assert best_overall(partial) == "piecewise:8"


def with_models(*rows):
    """Entries of (layers, repair, loss, checkpoint), dense at 4."""
    made = [Entry(Key(0, "", "dense"), "none", {}, 4.0, None, None)]
    for layers, repair, loss, kind in rows:
        key = Key(layers, "streamline", repair)
        made.append(Entry(key, "", {}, loss, None, None, model={"checkpoint": kind}))
    return made


def test_yardsticks_take_no_part_in_the_answer():
    rows = [(2, "ghost", 4.1, "custom"), (3, "ghost", 4.3, "custom"), (3, "none", 4.9, "stock")]
    entries = with_models(*rows, (3, "piecewise:8", 4.2, "custom"))
    assert {each.key.layers for each in asked(entries)} == {0, 3}
    assert best_overall(entries) == "piecewise:8"
    only_ghost = with_models(rows[0], rows[1])  # nothing else was asked for
    assert asked(only_ghost) == only_ghost


def test_one_operator_a_gap_is_drawn():
    rows = [
        {"layers": layers, "select": "streamline", "repair": repair, "span": [4, 4 + layers]}
        for layers in (2, 3)
        for repair in ("linearpatch-diag", "ghost", "symmetric")
    ]
    asked_for = [(3, "ghost", 4.3, "custom"), (3, "none", 5, "stock")]
    entries = with_models((2, "ghost", 4.1, "custom"), *asked_for)
    assert drawn_operators({"operators": rows}, entries) == [rows[4]]  # 2 removed is a yardstick
    without = [row for row in rows if row["repair"] != "ghost"]
    assert drawn_operators({"operators": without}, entries) == [without[2]]
    assert drawn_operators({}, entries) == []


def test_what_cannot_be_saved_wins_nothing():
    entries = with_models((3, "joint:x+phi", 4.1, "not savable"), (3, "ghost", 4.3, "custom"))
    assert lowest(entries, 3).key.repair == "ghost"
    assert lowest(entries, 3, savable=False).key.repair == "joint:x+phi"
    assert best_overall(entries) == "ghost"


def test_few_repairs_are_all_highlighted():
    entries = summarise(full_results())
    assert set(highlighted(entries)) == {
        "none", "linearpatch-diag", "replaceme", "ghost", "normed", "joint:x+phi",
    }  # fmt: skip
    assert highlighted(summarise(minimal_results())) == ["none", "ghost"]


def test_rival_of_one_layer_less():
    results = full_results(cuts={cut: CUTS[cut] for cut in [(7, "recoverable")]})
    entries = summarise(results)
    assert one_layer_less(entries, entries[-1]) is None
    results["cells"] += [
        {**cell, "layers": 6} for cell in results["cells"] if cell["repair"] == "ghost"
    ]
    entries = summarise(results)
    seven = next(each for each in entries if each.key == Key(7, "recoverable", "none"))
    rival = one_layer_less(entries, seven)
    assert rival is not None
    assert rival.key == Key(6, "recoverable", "ghost")
    assert "ghost with 6 removed" in render_page(results)


def test_gaps_and_births():
    assert gaps_of("12-15,17") == (Span(12, 16), Span(17, 18))
    assert gaps_of("none") == ()
    flag = [{"start": s, "stop": s + 3, "massive_activation_born": 4 <= s <= 6} for s in range(9)]
    assert birth_layers(flag) == [Span(6, 7)]
    two = [{"start": s, "stop": s + 2, "massive_activation_born": s in (1, 2, 3)} for s in range(9)]
    assert birth_layers(two) == [Span(1, 5)]


def test_mean_accuracy_needs_every_task():
    results = full_results()
    dense = mean_accuracy(results)[Key(0, "", "dense")]
    assert dense == pytest.approx((0.62 + 0.43 + 0.53) / 3)
    results["tasks"] = results["tasks"][1:]
    assert Key(0, "", "dense") not in mean_accuracy(results)


def test_one_number_of_layers_is_ranked_and_an_outlier_pinned():
    results = full_results(cuts={cut: CUTS[cut] for cut in [(7, "recoverable")]})
    for cell in results["cells"]:
        cell["loss_nats"] += 50 if cell["repair"] == "none" else 0
    page = render_page(results)
    parse(page)
    assert "Mean loss of each repair, recoverable" in page
    assert "their loss being above it: 1." in page


def test_scales():
    assert Scale(0.0, 10.0, 100.0, 200.0).at(5.0) == 150.0
    assert Scale(1.0, 100.0, 0.0, 1.0, log=True).at(10.0) == pytest.approx(0.5)
    assert Scale(0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(0.05, 2e4, log=True).ticks(5) == pytest.approx([0.1, 1, 10, 100, 1000, 10000])
    for values in ([], [3.0], [0.0, 0.0], [1e-9, 1e9], [-1.0, 1.0]):
        for log in (False, True):
            scale = fit_scale(values, log=log)
            assert scale.low < scale.high
            assert 0 < len(scale.ticks()) < 12
    assert [write_number(v) for v in (0, 0.025, 350, 26000, 1.3e6, 1e-6)] == [
        "0", "0.025", "350", "26k", "1.3M", "1e-6",
    ]  # fmt: skip


def test_elements_escape_their_text():
    assert tag("text", "<b>", class_='a"b') == '<text class="a&#34;b">&lt;b&gt;</text>'
