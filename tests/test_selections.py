"""Every selection against a slow transcription of its paper, on trained weights."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from typer.testing import CliRunner

import families
from ghostlayers.calibration import measuring, scoring, search
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.gradients import layer_gradients
from ghostlayers.calibration.passes import Runner
from ghostlayers.checkpoint import saving
from ghostlayers.checkpoint.proof import Verification
from ghostlayers.cli import app
from ghostlayers.errors import SpanError
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import FitOptions, find_method
from ghostlayers.repairs.base import Repair, linear
from ghostlayers.runtime.progress import Silent, shown_by
from ghostlayers.selection.angular import add_last_tokens
from ghostlayers.selection.choices import SELECTIONS, eligible_layers, find_selection
from ghostlayers.selection.lorp import choose_layers, cluster_layers, locality, number_of_clusters
from ghostlayers.selection.pairs import empty_pairs
from ghostlayers.selection.weights import counts, magnitude_importance, taylor_importance
from ghostlayers.spans import Span, merge_layers, removed_layers
from ghostlayers.surgery.removal import prune_layers
from ghostlayers.text.tokens import Windows
from oracles import literal_ghost, literal_streams, skipping, study_of

NAMES = [
    "streamline",
    "angular",
    "shortgpt",
    "lorp",
    "lorp:k=2",
    "magnitude:unprotected",
    "taylor:unprotected",
    "taylor:norms:unprotected",
    "perplexity",
    "perplexity:one-shot",
    "recoverable",
    "recoverable:greedy",
]
ITERATED = [name for name in NAMES if not find_selection(name).not_iterated]
RIDGE = FitOptions(ridge=0.0, absolute_ridge=1e-6)
PAPER = {"ridge": 0.0, "absolute_ridge": 1e-6, "token_weight": "uniform"}
USUAL = {"ridge": 1e-6, "absolute_ridge": 0.0, "token_weight": "auto"}


def ghost(**changes: Any) -> Fitting:
    settings = {"method": find_method("ghost"), "options": RIDGE, "token_weight": "uniform"}
    return Fitting(**{**settings, **changes})


def choose(
    model: DenseModel, windows: Windows, select: str, layers: int = 3, **more: Any
) -> tuple[list[int], Any]:
    """What a selection removes, of 12 windows with 4 held out."""
    length = windows.sequence_length
    how = {"select": select, "windows": 12, "sequence_length": length, **PAPER, **more}
    runner = Runner(model, batch_size=5)
    cut = search.choose(study_of(runner, Recipe(layers=layers, **how), *windows.split_at(12)))
    return removed_layers(cut.spans), cut.table


# Slow transcriptions


@torch.no_grad()
def literal_loss(
    model: Any, ids: Tensor, deltas: dict[Span, Tensor] | None = None, more: tuple[int, ...] = ()
) -> float:
    with skipping(model, deltas or {}, more):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def literal_fit(model: Any, ids: Tensor, removed: list[int]) -> dict[Span, Tensor]:
    """Gap after gap, each on the stream that the repairs before it leave."""
    dense, done = literal_streams(model, ids), {}
    for span in merge_layers(removed):
        received = literal_streams(model, ids, done)
        done[span] = literal_ghost(received[span.start], dense[span.stop])
    return done


def literal_influence(model: Any, ids: Tensor, deltas: dict[Span, Tensor]) -> list[float]:
    h = literal_streams(model, ids, deltas)
    return [1 - float(cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(h)]


# Angular


def test_angles_are_those_of_the_last_tokens(layerwise: Any, windows: Windows) -> None:
    table, _ = scoring.measure_scores(
        Runner(layerwise, 5), windows, [Span(i, i + 3) for i in range(6)], residuals=False
    )
    last = literal_streams(layerwise.network, windows.input_ids)[:, :, -1].double()
    for score in table.spans:
        a, b = last[score.span.start], last[score.span.stop]
        want = torch.arccos(cosine_similarity(a, b, dim=-1)).mean() / math.pi
        assert score.angular == pytest.approx(float(want), abs=1e-6)


def test_right_angles_are_a_half_and_small_ones_are_not_lost() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    tiny = torch.tensor([1.0, 1e-5])
    got = add_last_tokens(empty_pairs(3), torch.stack([x, y, tiny])[:, None]).mean()
    assert float(got[0, 1]) == pytest.approx(0.5)
    assert float(got[0, 2]) == pytest.approx(1e-5 / math.pi, rel=1e-3)


def test_angular_takes_the_span_of_least_angle(layerwise: Any, windows: Windows) -> None:
    last = literal_streams(layerwise.network, windows.input_ids[:12])[:, :, -1].double()
    angles = [
        float(torch.arccos(cosine_similarity(last[i], last[i + 3], dim=-1)).mean())
        for i in range(6)
    ]
    best = angles.index(min(angles))
    assert choose(layerwise, windows, "angular")[0] == [best, best + 1, best + 2]


# Magnitude and Taylor


def test_which_weights_count() -> None:
    matrix, gain = torch.ones(2, 3), torch.ones(3)
    assert counts("mlp.up_proj.weight", matrix)
    assert not counts("input_layernorm.weight", gain)
    assert counts("input_layernorm.weight", gain, norms=True)
    assert not counts("self_attn.q_proj.bias", gain, norms=True)


@pytest.mark.parametrize("norms", [False, True])
def test_magnitude_is_the_sum_of_absolute_weights(
    layerwise: Any, windows: Windows, norms: bool
) -> None:
    name = "magnitude:unprotected" + ":norms" * norms
    removed, table = choose(layerwise, windows, name)
    for layer, got in zip(layerwise.layers, table.importance, strict=True):
        own = [w for n, w in layer.named_parameters() if "proj" in n or (norms and "norm" in n)]
        assert got == pytest.approx(sum(float(w.double().abs().sum()) for w in own), rel=1e-6)
    order = sorted(range(8), key=lambda i: table.importance[i])
    assert removed == sorted(order[:3])


def literal_taylor(model: Any, ids: Tensor, names: tuple[str, ...]) -> list[float]:
    """|weight x gradient| summed over every layer, from one ordinary backward pass."""
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    scores = [
        sum(
            float((p.detach() * p.grad).double().abs().sum())
            for n, p in layer.named_parameters()
            if p.grad is not None and any(part in n for part in names)
        )
        for layer in model.model.layers
    ]
    model.zero_grad()
    model.requires_grad_(False)
    return scores


@pytest.mark.parametrize("norms", [False, True])
def test_taylor_is_that_of_plain_autograd(layerwise: Any, windows: Windows, norms: bool) -> None:
    name = "taylor:unprotected" + ":norms" * norms
    removed, table = choose(layerwise, windows, name, search_windows=7)
    ids = windows.input_ids[:7]
    want = literal_taylor(layerwise.network, ids, ("proj", "norm") if norms else ("proj",))
    assert list(table.importance) == pytest.approx(want, rel=1e-4)
    assert removed == sorted(sorted(range(8), key=lambda i: want[i])[:3])


def test_taylor_sees_through_repairs(layerwise: Any, windows: Windows) -> None:
    spans = (Span(2, 4), Span(5, 6))
    repairs = fit_gaps(Runner(layerwise), windows, spans, ghost())
    built = prune_layers(layerwise, spans, repairs)
    want = literal_taylor(built, windows.input_ids[:3], ("proj",))
    layerwise.network.requires_grad_(False)
    got = {
        layer: taylor_importance(p for n, p in pairs.items() if counts(n, p[0]))
        for layer, pairs in layer_gradients(
            Runner(layerwise, 2), Cut(layerwise, repairs), windows.first(3)
        )
    }
    assert sorted(got) == [0, 1, 4, 6, 7]
    assert [got[layer] / (3 * 63) for layer in sorted(got)] == pytest.approx(want, rel=1e-3)


def test_importance_of_known_weights() -> None:
    w, g = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]])
    assert magnitude_importance([w, g]) == 6.5
    assert taylor_importance([(w, g)]) == 4.0


@pytest.mark.parametrize("name", ["magnitude", "taylor"])
def test_plus_protects_the_first_four_and_the_last_two(name: str) -> None:
    assert eligible_layers(find_selection(name), 12) == range(4, 10)
    assert eligible_layers(find_selection(f"{name}:unprotected"), 12) == range(12)
    assert eligible_layers(find_selection(name), 12, (1, 1)) == range(1, 11)


def test_a_protected_selection_says_how_many_layers_it_may_remove(
    layerwise: Any, windows: Windows
) -> None:
    with pytest.raises(SpanError) as caught:
        choose(layerwise, windows, "taylor")
    assert str(caught.value) == (
        "cannot remove 3 layers by 'taylor': only 2 of the model's 8 decoder layers are eligible "
        "(4 to 5), the others are protected. Remove fewer, or choose another selection; "
        "'taylor:unprotected' may remove any."
    )


# Perplexity


def brute_greedy(model: Any, ids: Tensor, count: int) -> tuple[list[int], list[float]]:
    """SLEB with every candidate built."""
    removed: list[int] = []
    losses = []
    for _ in range(count):
        tried = {}
        for layer in set(range(8)) - set(removed):
            built = prune_layers(DenseModel(model), merge_layers([*removed, layer]))
            tried[layer] = literal_loss(built, ids)
        best = min(tried, key=lambda layer: tried[layer])
        removed.append(best)
        losses.append(tried[best])
    return removed, losses


@pytest.mark.slow
def test_greedy_perplexity_is_that_of_built_models(layerwise: Any, windows: Windows) -> None:
    removed, table = choose(layerwise, windows, "perplexity", search_windows=7)
    order, losses = brute_greedy(layerwise.network, windows.input_ids[:7], 3)
    assert [step.layer for step in table.steps] == order
    assert [step.loss for step in table.steps] == pytest.approx(losses, rel=1e-5)
    assert removed == sorted(order)


def test_one_shot_perplexity_measures_every_layer_once(layerwise: Any, windows: Windows) -> None:
    removed, table = choose(layerwise, windows, "perplexity:one-shot", search_windows=7)
    ids = windows.input_ids[:7]
    want = [literal_loss(prune_layers(layerwise, [Span(i, i + 1)]), ids) for i in range(8)]
    assert list(table.importance) == pytest.approx(want, rel=1e-5)
    assert removed == sorted(sorted(range(8), key=lambda i: want[i])[:3])


# LoRP


def blocks(sizes: tuple[int, ...], inside: float, outside: float) -> Tensor:
    """A similarity matrix of clusters; later layers of each are a little less similar."""
    owner = torch.tensor([k for k, size in enumerate(sizes) for _ in range(size)])
    place = torch.tensor([i for size in sizes for i in range(size)])
    same = owner[:, None] == owner[None, :]
    s = torch.where(same, inside - 0.01 * (place[:, None] + place[None, :]), outside).double()
    return s.fill_diagonal_(1.0)


def literal_lorp(s: Tensor, members: list[list[int]], count: int) -> list[int]:
    """Equations 8 to 11, in loops."""
    ends = (0, len(s) - 1)
    chosen: list[int] = []

    def redundancy(layer: int, cluster: list[int]) -> float:
        others = [float(s[layer, m]) for m in cluster if m != layer]
        return sum(others) / len(others) if others else -math.inf

    def best(cluster: list[int]) -> int | None:
        left = [m for m in cluster if m not in chosen and m not in ends]
        return max(left, key=lambda m: redundancy(m, cluster)) if left else None

    for cluster in members:
        if len(chosen) < count and best(cluster) is not None:
            chosen.append(best(cluster))
    while len(chosen) < count:
        means = []
        for cluster in members:
            left = [m for m in cluster if m not in chosen]
            pairs = [float(s[a, b]) for a in left for b in left if a < b]
            usable = best(cluster) is not None
            means.append((sum(pairs) / len(pairs) if pairs else -1e9) if usable else -1e18)
        chosen.append(best(members[means.index(max(means))]))
    return chosen


@pytest.mark.parametrize("sizes", [(4, 5), (3, 6, 4), (5, 3, 4, 4), (2, 9)])
def test_planted_clusters_are_found(sizes: tuple[int, ...]) -> None:
    s = blocks(sizes, 0.95, 0.2)
    start, want = 0, []
    for size in sizes:
        want.append(list(range(start, start + size)))
        start += size
    assert cluster_layers(s, len(sizes)) == want
    shuffled = torch.randperm(start, generator=torch.Generator().manual_seed(0))
    got = cluster_layers(s[shuffled][:, shuffled], len(sizes))
    clusters = sorted(sorted(int(shuffled[i]) for i in cluster) for cluster in got)
    assert clusters == want


@pytest.mark.parametrize("sizes", [(4, 5), (3, 6, 4), (5, 3, 4, 4), (1, 6, 1)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_lorp_takes_layers_as_the_equations_say(sizes: tuple[int, ...], count: int) -> None:
    noise = 0.02 * torch.rand(20, 20, generator=torch.Generator().manual_seed(1)).double()
    s = blocks(sizes, 0.9, 0.3)
    s = (s - (noise + noise.T)[: len(s), : len(s)]).fill_diagonal_(1.0)
    members = cluster_layers(s, len(sizes))
    assert choose_layers(s, count, len(sizes)) == literal_lorp(s, members, count)


def test_locality_and_the_number_of_clusters() -> None:
    s = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.6], [0.1, 0.6, 1.0]])
    assert locality(s) == pytest.approx(-math.log2(0.4))
    assert locality(-torch.ones(3, 3)) == math.inf
    assert [number_of_clusters(rls) for rls in (1.0, 0.99, 0.7, 0.69, 0.0)] == [2, 3, 3, 4, 4]


def test_lorp_never_takes_the_first_and_the_last_layer(layerwise: Any, windows: Windows) -> None:
    assert choose(layerwise, windows, "lorp", layers=6)[0] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SpanError, match="only 6 of the model's 8 decoder layers are eligible"):
        choose(layerwise, windows, "lorp", layers=7)
    streams = literal_streams(layerwise.network, windows.input_ids[:12])
    s = torch.tensor(
        [
            [float(cosine_similarity(a, b, dim=-1).mean()) for b in streams[:-1]]
            for a in streams[:-1]
        ]
    )
    clusters = number_of_clusters(locality(s))
    want = literal_lorp(s, cluster_layers(s.double(), clusters), 3)
    assert choose(layerwise, windows, "lorp")[0] == sorted(want)


# One layer at a time


def literal_score(model: Any, ids: Tensor, deltas: dict[Span, Tensor], name: str) -> list[float]:
    """What a single layer changes; the last token of each window alone for ``angular``."""
    if name != "angular":
        return literal_influence(model, ids, deltas)
    h = literal_streams(model, ids, deltas)[:, :, -1].double()
    return [float(torch.arccos(cosine_similarity(a, b, dim=-1)).mean()) for a, b in pairwise(h)]


@pytest.mark.parametrize("name", ["shortgpt", "streamline", "angular"])
def test_iterated_scores_are_those_of_hooks(layerwise: Any, windows: Windows, name: str) -> None:
    model, scored, fit = layerwise.network, windows.input_ids[:12], windows.input_ids[:10]
    removed, deltas = [], {}
    for _ in range(4):
        score = literal_score(model, scored, deltas, name)
        removed.append(min(set(range(8)) - set(removed), key=lambda i: score[i]))
        deltas = literal_fit(model, fit, removed)
    got, table = choose(layerwise, windows, name, 4, iterative=True, fit_windows=10)
    assert [step.layer for step in table.steps] == removed
    assert got == sorted(removed)


@pytest.mark.slow
def test_iterated_perplexity_skips_a_layer_of_the_repaired_model(
    layerwise: Any, windows: Windows
) -> None:
    model, few = layerwise.network, windows.input_ids[:7]
    removed, losses, deltas = [], [], {}
    for _ in range(3):
        left = set(range(8)) - set(removed)
        tried = {layer: literal_loss(model, few, deltas, (layer,)) for layer in left}
        removed.append(min(tried, key=lambda layer: tried[layer]))
        losses.append(tried[removed[-1]])
        deltas = literal_fit(model, windows.input_ids[:10], removed)
    more = {"iterative": True, "search_windows": 7, "fit_windows": 10}
    _, table = choose(layerwise, windows, "perplexity:one-shot", **more)
    assert [step.layer for step in table.steps] == removed
    assert [step.loss for step in table.steps] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", ITERATED)
def test_iterating_once_is_not_iterating(layerwise: Any, windows: Windows, name: str) -> None:
    how = moving(name)
    once = choose(layerwise, windows, name, layers=1, **how)[0]
    assert choose(layerwise, windows, name, layers=1, iterative=True, **how)[0] == once


def moving(name: str) -> dict[str, Any]:
    """A repair that changes what a score reads: for one of weights, not Ghost."""
    if not find_selection(name).scores_only_weights:
        return {}
    return {"repair": "refit:1", **USUAL}


@pytest.mark.slow
def test_greedy_recoverable_is_that_of_hooks(
    layerwise: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (scoring, measuring):  # 3 windows then give exactly the sample
        monkeypatch.setattr(module, "TOKENS_PER_CHANNEL", 4)
    model, few, fit = layerwise.network, windows.input_ids[:3], windows.input_ids[:10]
    held_out = windows.input_ids[12:]
    dense = literal_streams(model, few)
    removed, losses, deltas = [], [], {}
    for _ in range(3):
        left = [layer for layer in range(8) if layer not in removed]
        influence = literal_influence(model, few, deltas)
        tried = search.greedy_candidates(influence, left, list(deltas))
        now, raced = literal_streams(model, few, deltas), {}
        for layer in tried:
            spans = merge_layers([*removed, layer])
            (gap,) = [span for span in spans if layer in span]
            one = literal_ghost(now[gap.start], dense[gap.stop])
            others = {span: delta for span, delta in deltas.items() if span in spans}
            repairs = {s: Repair("ghost", linear(d)) for s, d in {**others, gap: one}.items()}
            raced[layer] = literal_loss(prune_layers(DenseModel(model), spans, repairs), held_out)
        removed.append(min(raced, key=lambda layer: raced[layer]))
        losses.append(raced[removed[-1]])
        deltas = literal_fit(model, fit, removed)
    got, table = choose(layerwise, windows, "recoverable:greedy", search_windows=3, fit_windows=10)
    assert [step.layer for step in table.steps] == removed
    assert [step.loss for step in table.steps] == pytest.approx(losses, rel=1e-3)
    assert got == sorted(removed)


def test_greedy_recoverable_samples_enough_windows(layerwise: Any, windows: Windows) -> None:
    assert len(choose(layerwise, windows, "recoverable:greedy", search_windows=1)[0]) == 3


def test_greedy_candidates_lie_low_or_beside_a_gap() -> None:
    influence = [0.9, 0.1, 0.8, 0.0, 0.7, 0.2, 0.6, 0.3, 0.5]
    left = [0, 1, 2, 5, 6, 7, 8]
    assert search.greedy_candidates(influence, left, [Span(3, 5)]) == [1, 2, 5, 7, 8]


def test_a_cut_starts_from_what_it_shares(layerwise: Any, windows: Windows) -> None:
    first = fit_gaps(Runner(layerwise), windows, (Span(1, 2), Span(5, 6)), ghost())
    grown = {Span(1, 2): first[Span(1, 2)], Span(4, 6): first[Span(5, 6)]}
    assert Cut(layerwise, grown).fork_from(first) == 4
    assert Cut(layerwise, first).fork_from(first) == 8
    assert Cut(layerwise, first).fork == 1
    batch, stream = layerwise.begin(windows.input_ids[:2])
    shared = dict(Cut(layerwise, first).walk(batch, stream))[4]
    want = Cut(layerwise, grown).run(batch, stream, 0)
    assert torch.equal(Cut(layerwise, grown).run(batch, shared, 4), want)


# Contracts


def random_windows(count: int = 16, length: int = 12) -> Windows:
    ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows(ids, False, count, ())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", NAMES)
def test_every_selection_works_on_every_family(family: str, name: str) -> None:
    model = DenseModel(families.build(family))
    removed, table = choose(model, random_windows(), name, layers=2, **USUAL)
    assert len(removed) == len(set(removed)) == 2
    assert table.num_layers == 5
    if find_selection(name).contiguous:
        assert removed[1] == removed[0] + 1


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "falcon"])
@pytest.mark.parametrize("name", ["angular", "lorp", "perplexity", "taylor:unprotected"])
def test_selections_need_no_family_data(family: str, name: str) -> None:
    model = DenseModel(families.build(family))
    removed, _ = choose(model, random_windows(), name, layers=2, **USUAL)
    assert len(removed) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ITERATED)
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_every_score_can_be_iterated(family: str, name: str) -> None:
    model = DenseModel(families.build(family))
    how = {**USUAL, **moving(name)}
    removed, table = choose(model, random_windows(), name, layers=3, iterative=True, **how)
    assert len(set(removed)) == 3
    assert sorted(step.layer for step in table.steps) == removed


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["none", "refit:2", "magnitude", "normed", "joint:x+z"])
@pytest.mark.parametrize(
    ("name", "iterative"),
    [("recoverable:greedy", False), ("recoverable", True), ("taylor:unprotected", True)],
)
def test_searches_work_with_repairs_that_fold(
    layerwise: Any, windows: Windows, repair: str, name: str, iterative: bool
) -> None:
    how = {"iterative": iterative, "repair": repair, **USUAL}
    removed, _ = choose(layerwise, windows, name, 4, **how)
    assert len(set(removed)) == 4
    if find_method(repair).reach:
        assert 0 not in removed


@pytest.mark.slow
def test_searches_do_not_depend_on_the_batch_size(layerwise: Any, windows: Windows) -> None:
    one = choose(layerwise, windows, "perplexity")[1].steps
    recipe = Recipe(layers=3, select="perplexity", windows=12, sequence_length=64)
    runner = Runner(layerwise, batch_size=1)
    table = search.choose(study_of(runner, recipe, *windows.split_at(12))).table
    assert table is not None
    assert [step.layer for step in table.steps] == [step.layer for step in one]
    assert [s.loss for s in table.steps] == pytest.approx([s.loss for s in one], rel=1e-5)


class Counted(Silent):
    """Checks that every stage counts to its total."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []

    @contextmanager
    def stage(self, description: str, total: int) -> Iterator[Any]:
        done = [0]

        def advance(units: int = 1) -> None:
            done[0] += units

        yield advance
        self.stages.append((description, total, done[0]))


@pytest.mark.parametrize("name", ["perplexity", "taylor:unprotected", "recoverable:greedy"])
def test_progress_reaches_its_end(layerwise: Any, windows: Windows, name: str) -> None:
    progress = Counted()
    recipe = Recipe(layers=2, select=name, windows=12, sequence_length=64)
    with shown_by(progress):
        search.choose(study_of(Runner(layerwise), recipe, *windows.split_at(12)))
    assert progress.stages
    assert all(total == done for _, total, done in progress.stages), progress.stages
    titles = " ".join(title for title, _, _ in progress.stages)
    assert ("gradient checkpointing" in titles) == (name == "taylor:unprotected")


def test_the_table_of_selections_is_whole() -> None:
    assert {find_selection(name).name for name in NAMES} == set(SELECTIONS)
    for name, row in SELECTIONS.items():
        assert row.needs, name
        assert "arXiv" in row.source or row.source == "ours"
        assert dataclasses.replace(row) == row


# The command line


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, some_text: list[str]) -> Path:
    path = tmp_path_factory.mktemp("select") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some_text))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [(name, ()) for name in NAMES] + [("shortgpt", ("--iterative",))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_prune_takes_every_selection(
    tiny_folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))
    arguments = [
        *("prune", str(tiny_folder), "-o", str(tmp_path / "out"), "-n", "2", "--select", name),
        *("-d", str(text), "--windows", "8", "--held-out-windows", "2"),
        *("--sequence-length", "64", "--device", "cpu", "--search-windows", "3", *more),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "ghostlayers.json").read_text())
    assert record["recipe"]["select"] == name
    assert len(record["cut"]["removed"]) == 2
    order = [step["layer"] for step in record["scores"]["steps"]]
    if order:
        assert sorted(order) == record["cut"]["removed"]
        assert "Layers in the order of their removal" in result.output
    assert ("taylor" in name or "magnitude" in name) <= bool(record["scores"]["importance"])


def test_prune_refuses_more_layers_than_a_selection_may_remove(
    tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["prune", str(tiny_folder), "-o", str(tmp_path / "out"), "-n", "2", "-d", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--select", "taylor", "--sequence-length", "64"])
    assert result.exit_code == 1
    assert "only 0 of the model's 6 decoder layers are eligible" in " ".join(result.output.split())
