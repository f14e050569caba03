"""The main job through the public functions, on a small trained model."""

import copy
from typing import Any

import pytest
import torch

import ghostlayers
from ghostlayers import Recipe, Span
from ghostlayers.errors import RecipeError, SpanError, WindowError

CHOICES: dict[str, Any] = {
    "windows": 24,
    "fit_windows": 24,
    "held_out_windows": 4,
    "sequence_length": 64,
}


def prune(model: Any, tokenizer: Any, text: list[str], **choices: Any) -> ghostlayers.PrunedModel:
    return ghostlayers.prune(model, tokenizer=tokenizer, data=text, **{**CHOICES, **choices})


@pytest.fixture(scope="module")
def recoverable(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> ghostlayers.PrunedModel:
    return prune(trained_llama, byte_tokenizer, some_text, layers=3)


def test_recoverable_takes_the_best_of_its_shortlist(recoverable: ghostlayers.PrunedModel) -> None:
    table = recoverable.table
    assert table is not None
    measured = {each.span: each for each in table.spans if each.loss is not None}
    assert 3 <= len(measured) <= 6
    best = min(each.loss for each in measured.values() if each.loss is not None)
    taken = measured[recoverable.spans[0]]
    assert taken.behind <= 2 * taken.behind_error
    assert taken.loss_tokens == table.num_loss_tokens
    assert table.dense_loss is not None
    assert table.dense_loss < best


def test_the_result_says_what_was_done(recoverable: ghostlayers.PrunedModel) -> None:
    assert len(recoverable.removed) == 3
    assert sorted(recoverable.removed + recoverable.kept) == list(range(8))
    assert list(recoverable.evidence) == ["dense", "cut", "repaired"]
    evidence = recoverable.evidence
    assert evidence["dense"].loss_nats < evidence["repaired"].loss_nats < evidence["cut"].loss_nats
    record = recoverable.record
    assert record["cut"]["removed"] == recoverable.removed
    assert record["recipe"]["layers"] == 3
    assert len(record["calibration"]["sha256"]) == 64
    assert record["calibration"]["documents"]
    assert record["evidence_text"]["windows"] == 4


def test_named_layers_are_removed_and_repaired_gap_by_gap(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    result = prune(trained_llama, byte_tokenizer, some_text, remove="1-2,4")
    assert result.spans == (Span(1, 3), Span(4, 5))
    assert list(result.repairs) == [Span(1, 3), Span(4, 5)]
    assert result.table is None
    assert result.model.config.repaired_boundaries == [1, 2]


@pytest.mark.parametrize("remove", ["0-1", "6-7", "0,7"])
def test_the_first_and_the_last_layer_can_go(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], remove: str
) -> None:
    result = prune(trained_llama, byte_tokenizer, some_text, remove=remove)
    assert result.evidence["repaired"].loss_nats < result.evidence["cut"].loss_nats


@pytest.mark.parametrize("select", ["streamline", "shortgpt"])
def test_other_selections(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], select: str
) -> None:
    result = prune(trained_llama, byte_tokenizer, some_text, layers=2, select=select)
    table = result.table
    assert table is not None
    if select == "streamline":
        assert result.spans == (max(table.spans, key=lambda each: each.cosine).span,)
    else:
        lowest = sorted(range(8), key=lambda layer: table.block_influence[layer])[:2]
        assert result.removed == sorted(lowest)


def test_no_repair_gives_a_stock_model(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    result = prune(trained_llama, byte_tokenizer, some_text, remove="3", repair="none")
    assert type(result.model) is type(trained_llama)
    assert list(result.evidence) == ["dense", "cut"]


def test_the_same_recipe_gives_the_same_operator(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    recoverable: ghostlayers.PrunedModel,
) -> None:
    again = prune(trained_llama, byte_tokenizer, some_text, layers=3)
    assert again.spans == recoverable.spans
    span = again.spans[0]
    assert torch.equal(again.repairs[span].delta, recoverable.repairs[span].delta)


def test_a_birth_inside_the_cut_is_reported(byte_tokenizer: Any, some_text: list[str]) -> None:
    from conftest import make_tiny_llama

    model = make_tiny_llama()
    with torch.no_grad():
        # One layer writes a hundred times more than the stream holds, for one byte in ten.
        model.model.embed_tokens.weight[64] *= 3
        gate = model.model.layers[2].mlp
        direction = model.model.embed_tokens.weight[64]
        unit = direction / direction.norm()
        gate.gate_proj.weight[0] = 40 * unit
        gate.up_proj.weight[0] = 40 * unit
        gate.down_proj.weight[:, 0] = 40 * torch.randn(32)
    result = ghostlayers.prune(
        model, tokenizer=byte_tokenizer, data=some_text, remove="2", **CHOICES
    )
    born = result.births
    other = ghostlayers.prune(
        model, tokenizer=byte_tokenizer, data=some_text, remove="4", **CHOICES
    )
    assert born == (Span(2, 3),)
    assert other.births == ()


def test_scores_as_a_library(trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> None:
    table = ghostlayers.score(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, layers=2, **CHOICES
    )
    assert len(table.spans) == 7
    assert all(each.residual is not None for each in table.spans)
    assert any(each.loss is not None for each in table.spans)


def test_evaluation_as_a_library(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    recoverable: ghostlayers.PrunedModel,
) -> None:
    corpus = ghostlayers.text.corpora.Corpus("held out", tuple(some_text))
    (result,) = ghostlayers.evaluate(
        recoverable.model,
        data=corpus,
        against=trained_llama,
        tokenizer=byte_tokenizer,
        sequence_length=64,
        max_windows=5,
    )
    assert result.sums.num_tokens == 5 * 63
    assert result.sums.kl_nats > 0
    assert 0 < result.sums.agreement <= 1
    assert result.available_windows > 5


def test_bad_requests_are_refused_before_any_layer_runs(
    tiny_llama: Any, byte_tokenizer: Any, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama.model, "forward", lambda *_, **__: pytest.fail("ran"))

    def refuse(error: type[Exception], match: str, **choices: Any) -> None:
        with pytest.raises(error, match=match):
            prune(tiny_llama, byte_tokenizer, some_text, **choices)

    refuse(RecipeError, "say how many layers")
    refuse(SpanError, "cannot remove 6 of 6 decoder layers", layers=6)
    refuse(SpanError, "layers 6-7 do not exist", remove="5-7")
    refuse(
        WindowError, "longest that works is --sequence-length 128", layers=1, sequence_length=129
    )
    refuse(
        WindowError,
        "8 tokens; repair 'ghost' solves for 32 unknowns",
        layers=1,
        fit_windows=1,
        sequence_length=8,
    )
    refuse(WindowError, "gives .* windows of 64 tokens, 9004 are needed", layers=1, windows=9000)
    refuse(RecipeError, "unknown key 'layer' in a recipe. Did you mean 'layers'", layer=1)


def test_fields_win_over_the_recipe(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    recipe = Recipe(layers=4, repair="none", **CHOICES)
    result = ghostlayers.prune(
        trained_llama, recipe, tokenizer=byte_tokenizer, data=some_text, layers=1
    )
    assert len(result.removed) == 1
    assert result.recipe.repair == "none"


def test_layers_and_names_together_are_refused(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    with pytest.raises(RecipeError, match="not both"):
        prune(trained_llama, byte_tokenizer, some_text, layers=2, remove="1")


def test_a_model_in_memory_goes_on_training(
    tiny_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    model = copy.deepcopy(tiny_llama).train()
    model.model.layers[1].eval()
    before = [each.training for each in model.modules()]
    pruned = prune(model, byte_tokenizer, some_text, remove="2", repair="none")
    assert [each.training for each in model.modules()] == before
    assert not any(each.training for each in pruned.model.modules())
    with pytest.raises(SpanError):
        prune(model, byte_tokenizer, some_text, remove="99")
    assert [each.training for each in model.modules()] == before
