"""`Study`: the verbs give what `prune` gives, and nothing in it changes."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostlayers
from ghostlayers.calibration.cuts import race_cuts
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.passes import Runner
from ghostlayers.errors import RecipeError
from ghostlayers.model.dense import DenseModel
from ghostlayers.repairs import FitOptions, find_method
from ghostlayers.spans import Span
from ghostlayers.study import Study
from ghostlayers.surgery import removal

TEXT = {"windows": 12, "sequence_length": 64, "held_out_windows": 2}


@pytest.fixture(scope="module")
def study(trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> Study:
    return Study.open(trained_llama, tokenizer=byte_tokenizer, data=some_text, **TEXT)


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["ghost", "refit:2", "none"])
def test_verbs_give_what_prune_gives(
    study: Study, repair: str, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    pruned = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, layers=2, repair=repair, **TEXT
    )
    cut = study.choose("recoverable", layers=2, repair=repair)
    fits = study.fit(cut, [repair])
    built = study.build(cut, fits[repair])
    assert built.spans == pruned.spans
    assert same_weights(built.model, pruned.model)
    assert built.record == {**pruned.record, "created": built.record["created"]}


def test_several_repairs_come_from_one_sweep(study: Study) -> None:
    cut = study.choose(remove="3-4")
    names = ["ghost", "linearpatch-diag", "joint:x+norm"]
    together = study.fit(cut, names)
    assert list(together) == names
    (alone,) = study.fit(cut, ["ghost"]).values()
    assert torch.equal(alone[Span(3, 5)].delta, together["ghost"][Span(3, 5)].delta)
    losses = study.losses(cut, together)
    assert list(losses) == ["dense", "cut", *names]
    assert losses["dense"].loss_nats < losses["ghost"].loss_nats < losses["cut"].loss_nats


def test_losses_on_other_text_are_those_of_the_built_model(
    study: Study, some_text: list[str], byte_tokenizer: Any
) -> None:
    cut = study.choose(remove="3-4")
    fits = study.fit(cut, ["ghost"])
    measured = study.losses(cut, fits, on=some_text[:20], max_windows=2)["ghost"]
    (built,) = ghostlayers.evaluate(
        study.build(cut, fits["ghost"]).model, tokenizer=byte_tokenizer, data=[some_text[:20]],
        sequence_length=64, max_windows=2,
    )  # fmt: skip
    assert measured.loss_nats == pytest.approx(built.sums.loss_nats, abs=1e-5)


def test_scores_are_those_of_the_command(
    study: Study, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    want = ghostlayers.score(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, layers=2, **TEXT
    )
    got = study.scores(layers=2)
    assert [score.loss for score in got.spans] == [score.loss for score in want.spans]
    assert torch.equal(got.similarity, want.similarity)


def test_a_cut_without_repairs_is_bare(study: Study) -> None:
    built = study.build(study.choose(remove="3-4"))
    want = removal.prune_layers(study.dense, (Span(3, 5),))
    assert same_weights(built.model, want)
    assert built.record["recipe"]["repair"] == "none"


def test_a_study_needs_to_be_told_what_goes(study: Study) -> None:
    with pytest.raises(RecipeError, match="how many layers"):
        study.choose("streamline")


def test_nothing_in_it_changes(study: Study) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        study.recipe = study.recipe  # type: ignore[misc]
    before = study.recipe
    study.choose("streamline", layers=3)
    assert study.recipe is before
    assert study.dense.residency.memory.spent == 0


def test_it_shows_itself_in_a_line(study: Study) -> None:
    assert repr(study).startswith("Study('LlamaForCausalLM', 12 + ")
    assert "windows of 64 tokens of" in repr(study)
    assert len(repr(study)) < 200


def test_it_stays_small() -> None:
    """A dozen verbs at most, each of them short, so that it never becomes a god object."""
    methods = [
        method for name, method in vars(Study).items()
        if inspect.isfunction(method) or isinstance(method, (property, classmethod))
    ]  # fmt: skip
    assert (
        len([method for method in methods if not getattr(method, "__name__", "_").startswith("__")])
        <= 14
    )
    for method in methods:
        function = (
            method.fget if isinstance(method, property) else getattr(method, "__func__", method)
        )
        if function.__doc__ and function.__module__ == Study.__module__:
            body = inspect.getsource(function).split('"""')[-1].strip().splitlines()
            assert len(body) <= 15, function.__name__


def test_a_run_is_kept_and_goes_on(study: Study, tmp_path: Path) -> None:
    plain = study.fit(study.choose("streamline", layers=2))
    with study.keeping(tmp_path / "kept") as kept:
        assert kept.runner.journal is not None
        again = kept.fit(kept.choose("streamline", layers=2))
    (one,), (other,) = plain.values(), again.values()
    assert all(torch.equal(one[span].delta, other[span].delta) for span in one)


def test_a_race_is_of_the_checkpoints(trained_llama: Any, study: Study) -> None:
    """With folds in the base, candidates run on weights rounded to the type of the files."""
    dense = DenseModel(trained_llama, stored_dtype=torch.bfloat16)
    windows, held_out = study.windows, study.held_out.first(1)
    fitting = Fitting(find_method("refit:1"), FitOptions(), stored_dtype=torch.bfloat16)
    base = fit_gaps(Runner(dense), windows, [Span(5, 6)], fitting)
    more = {**fit_gaps(Runner(dense), windows, [Span(2, 3)], fitting), **base}
    race, _ = race_cuts(Runner(dense), held_out, {"more": more}, base=base)
    built = removal.prune_layers(dense, tuple(sorted(more)), more)
    ids = held_out.input_ids
    with torch.no_grad():
        want = float(built(input_ids=ids, labels=ids).loss)
    assert float(race.losses["more"][0]) == pytest.approx(want, abs=1e-6)
    exact = removal.prune_layers(DenseModel(trained_llama), tuple(sorted(more)), more)
    with torch.no_grad():
        unrounded = float(exact(input_ids=ids, labels=ids).loss)
    assert abs(unrounded - want) > 1e-6  # else the test could not tell


def test_memory_that_a_fit_takes_is_given_back(trained_llama: Any, study: Study) -> None:
    memory = study.dense.residency.memory
    before = memory.spent
    study.fit(study.choose(remove="3-4"), ["joint:x+z"])
    assert memory.spent == before


def test_what_a_prompt_shows_is_a_line(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    study = Study.open(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, windows=8, held_out_windows=2,
        sequence_length=64, layers=2,
    )  # fmt: skip
    cut = study.choose()
    repairs = study.fit(cut, ["ghost", "refit:1"])
    pruned = study.build(cut, repairs["ghost"])
    for shown in (study, cut, *repairs["ghost"].values(), *repairs["refit:1"].values(), pruned):
        assert "\n" not in repr(shown)
        assert "tensor" not in repr(shown)
        assert len(repr(shown)) < 300
    assert "loss_nats=" in repr(pruned.evidence["dense"])
