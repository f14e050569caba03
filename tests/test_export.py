"""In what form a checkpoint holds a repair: folded, as an ordinary layer, or with its own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ghostlayers
from families import build
from ghostlayers.errors import RecipeError, UnsupportedModelError, VerificationError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.recipe import Recipe
from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.surgery import removal
from ghostlayers.surgery.stock_layer import check_same, check_stock_layer, with_stock_layers
from oracles import CUTS, fitted, logits, token_ids

PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {},
    "smollm3": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 5},
}


def plain(name: str) -> Any:
    model = build(name, **PLAIN[name])
    if name == "mistral":
        model.config.sliding_window = None
    return model


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_stock_layer_is_the_operator_bit_for_bit(name: str, cut: str, tmp_path: Path) -> None:
    dense, spans = plain(name), CUTS[cut]
    check_stock_layer(dense)
    repairs = fitted(dense, "normed", spans)
    operator = removal.prune_layers(DenseModel(dense), spans, repairs)
    bare = removal.prune_layers(DenseModel(dense), spans)
    stock = with_stock_layers(bare, spans, repairs, torch.float32)
    kind = "LlamaForCausalLM" if name in {"mistral", "qwen2"} else type(dense).__name__
    assert type(stock).__name__ == kind
    assert len(find_decoder_layers(stock)) == len(find_decoder_layers(bare)) + len(spans)
    want = logits(operator, token_ids())
    assert torch.equal(logits(stock, token_ids()), want)
    assert not torch.allclose(want, logits(bare, token_ids()), atol=1e-3)
    stock.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, token_ids()), want)
    ids = token_ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    cached = again.generate(ids, **options)
    assert torch.equal(cached, operator.generate(ids, use_cache=False, **options))


def test_a_stock_layer_in_bfloat16_rounds_once() -> None:
    dense, spans = plain("llama"), CUTS["two gaps"]
    repairs = {
        span: Repair("normed", each.operator and each.operator.rounded(torch.bfloat16))
        for span, each in fitted(dense, "normed", spans).items()
    }
    for parameter in dense.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    operator = removal.prune_layers(DenseModel(dense), spans, repairs)
    bare = removal.prune_layers(DenseModel(dense), spans)
    stock = with_stock_layers(bare, spans, repairs, torch.bfloat16)
    assert check_same(stock, operator) <= 0.05 * float(logits(operator, token_ids()).abs().max())
    assert stock.dtype == torch.bfloat16


def test_the_made_layer_shares_the_survivors_and_keeps_ties() -> None:
    dense, spans = build("llama", tie_word_embeddings=True), CUTS["middle"]
    stock = with_stock_layers(
        removal.prune_layers(DenseModel(dense), spans),
        spans,
        fitted(dense, "normed", spans),
        torch.float32,
    )
    mine, theirs = find_decoder_layers(stock), find_decoder_layers(dense)
    assert mine[2].mlp.up_proj.weight.data_ptr() == theirs[3].mlp.up_proj.weight.data_ptr()
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert not any(each.is_meta for each in (*stock.parameters(), *stock.buffers()))


def test_another_computation_is_noticed() -> None:
    dense, spans = plain("llama"), CUTS["middle"]
    repairs = fitted(dense, "normed", spans)
    other = {span: Repair("normed", Operator({"normed": torch.eye(32)})) for span in spans}
    bare = removal.prune_layers(DenseModel(dense), spans)
    stock = with_stock_layers(bare, spans, other, torch.float32)
    with pytest.raises(VerificationError, match="logits differ by"):
        check_same(stock, removal.prune_layers(DenseModel(dense), spans, repairs))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma3_text", {}, "the MLP of 'gemma3_text' has no biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"intermediate_size": 24}, "narrower than the residual stream"),
        ("mistral", {}, "with a sliding window is not a Llama"),
        ("qwen2", {}, "with a sliding window is not a Llama"),
    ],
)
def test_families_without_such_a_layer_are_refused(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{reason}.* Use --export custom"):
        check_stock_layer(build(name, **changes))


@pytest.mark.parametrize(
    ("export", "repair", "advice"),
    [
        ("fold", "ghost", "Those that fold: refit:3"),
        ("fold", "joint:x+z", "Those that fold: refit:3"),
        ("stock-layer", "ghost", "The one that can: normed"),
        ("stock-layer", "refit:2", "The one that can: normed"),
        ("custom", "refit:2", "Use --export fold"),
        ("custom", "none", "Use --export fold"),
        ("adapter", "ghost", "must be one of auto, fold, stock-layer, custom"),
    ],
)
def test_an_export_never_changes_the_repair(export: str, repair: str, advice: str) -> None:
    with pytest.raises(RecipeError, match=advice):
        Recipe(layers=1, repair=repair, export=export)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("export", "repair", "mode"),
    [
        ("auto", "ghost", "custom"),
        ("custom", "ghost", "custom"),
        ("auto", "refit:2", "stock"),
        ("fold", "replaceme", "stock"),
        ("auto", "normed", "custom"),
        ("stock-layer", "normed", "stock-layer"),
    ],
)
def test_every_form_is_saved_and_says_which_it_is(
    export: Any, repair: str, mode: str, trained_llama: Any, byte_tokenizer: Any,
    some_text: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    pruned = ghostlayers.prune(
        trained_llama, layers=2, select="streamline", repair=repair, export=export,
        windows=8, sequence_length=64, held_out_windows=2,
        tokenizer=byte_tokenizer, data=some_text,
    )  # fmt: skip
    assert pruned.save(tmp_path / "out").identical
    record = ghostlayers.inspect(tmp_path / "out")
    assert record["mode"] == mode
    custom = (tmp_path / "out" / "modeling_ghostlayers.py").exists()
    assert custom == (mode == "custom")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("any engine that runs the base model" in card) == (mode != "custom")
    kept = trained_llama.config.num_hidden_layers - 2
    layers = find_decoder_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert len(layers) == kept + (mode == "stock-layer")


def test_a_family_without_the_layer_is_refused_before_anything_is_computed(
    byte_tokenizer: Any, some_text: list[str]
) -> None:
    model = build("gemma3_text", vocab_size=256)
    with pytest.raises(UnsupportedModelError, match="has no biases"):
        ghostlayers.prune(
            model, remove="1-2", repair="normed", export="stock-layer",
            windows=4, sequence_length=32, tokenizer=byte_tokenizer, data=some_text,
        )  # fmt: skip
