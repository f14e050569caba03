"""Removing layers and inserting repairs, in every family that can be cut."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from families import build
from ghostlayers import modeling, surgery
from ghostlayers.calibration import run_cut
from ghostlayers.errors import InputError, SpanError, UnsupportedModelError
from ghostlayers.families import FAMILIES as SUPPORTED
from ghostlayers.spans import Span, kept_layers
from ghostlayers.stream import LayerwiseModel, find_decoder_layers

CUTS = {
    "first": (Span(0, 2),),
    "middle": (Span(1, 3),),
    "last": (Span(3, 5),),
    "both ends": (Span(0, 1), Span(4, 5)),
    "two gaps": (Span(1, 2), Span(3, 4)),
}


def token_ids(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(0))


def operators(spans: tuple[Span, ...]) -> dict[Span, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        span: 0.05 * torch.randn(32, 32, generator=generator, dtype=torch.float64) for span in spans
    }


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def handmade(name: str, spans: tuple[Span, ...]) -> Any:
    """The same family built without the layers, filled with the kept layers' weights."""
    dense = build(name)
    kept = kept_layers(spans, 5)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if getattr(dense.config, "layer_types", None) is not None:
        changes["layer_types"] = [dense.config.layer_types[i] for i in kept]
    model = build(name, seed=99, **changes)
    state = {}
    for key, tensor in dense.state_dict().items():
        parts = key.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        state[".".join(parts)] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_bare_cut_is_the_handmade_model(name: str, cut: str) -> None:
    pruned = surgery.prune_layers(build(name), CUTS[cut])
    want = handmade(name, CUTS[cut])
    assert type(pruned) is type(want)
    assert torch.equal(logits(pruned, token_ids()), logits(want, token_ids()))
    layers = find_decoder_layers(pruned)
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(len(layers)))
    assert pruned.config.num_hidden_layers == len(layers)
    if getattr(want.config, "layer_types", None) is not None:
        assert pruned.config.layer_types == want.config.layer_types


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_empty_cut_is_the_identity(name: str) -> None:
    dense = build(name)
    pruned = surgery.prune_layers(dense, ())
    assert torch.equal(logits(pruned, token_ids()), logits(dense, token_ids()))


def literal_repaired(dense: Any, spans: tuple[Span, ...], ids: torch.Tensor) -> torch.Tensor:
    """Hooks on the dense model that skip removed layers and add x M at each gap."""
    deltas = operators(spans)
    handles = []

    def skip(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    def repair(span: Span) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return x + linear(x, deltas[span].T.float())

        return hook

    for span in spans:
        for index in span.layers:
            layer = find_decoder_layers(dense)[index]
            last = index == span.stop - 1
            handles.append(
                layer.register_forward_hook(repair(span) if last else skip, with_kwargs=True)
            )
    result = logits(dense, ids)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_repaired_cut_is_the_dense_model_with_layers_skipped(name: str, cut: str) -> None:
    spans = CUTS[cut]
    dense = build(name)
    repaired = surgery.prune_layers(dense, spans, operators(spans))
    want = literal_repaired(dense, spans, token_ids())
    assert torch.equal(logits(repaired, token_ids()), want)
    assert not torch.allclose(logits(surgery.prune_layers(dense, spans), token_ids()), want)


@pytest.mark.parametrize("cut", CUTS)
def test_measuring_a_cut_without_building_it_is_the_built_model(cut: str) -> None:
    spans = CUTS[cut]
    dense = build("gemma3_text")
    layerwise = LayerwiseModel(dense)
    batch, stream = layerwise.begin(token_ids())
    for layer in range(spans[0].start):
        stream = layerwise.run_layer(layer, batch, stream)
    end = run_cut(layerwise, batch, stream, operators(spans))
    built = surgery.prune_layers(dense, spans, operators(spans))
    assert torch.equal(layerwise.logits(batch, end), logits(built, token_ids()))


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("repaired", [False, True])
def test_cached_generation_is_uncached_generation(name: str, repaired: bool) -> None:
    spans = CUTS["two gaps"]
    model = surgery.prune_layers(build(name), spans, operators(spans) if repaired else None)
    ids = token_ids(length=9)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
    }
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    past = model(input_ids=ids, use_cache=True).past_key_values
    assert len(past.layers) == 3


def test_the_dense_model_is_unchanged_and_shares_its_weights() -> None:
    dense = build("llama")
    config, before = copy.deepcopy(dense.config.to_dict()), logits(dense, token_ids())
    spans = CUTS["middle"]
    pruned = surgery.prune_layers(dense, spans, operators(spans))
    assert torch.equal(logits(dense, token_ids()), before)
    assert dense.config.to_dict() == config
    assert len(find_decoder_layers(dense)) == 5
    assert [x.self_attn.layer_idx for x in dense.model.layers] == [0, 1, 2, 3, 4]
    assert pruned.model.layers[1].mlp.up_proj.weight is dense.model.layers[3].mlp.up_proj.weight


@pytest.mark.parametrize("name", SUPPORTED)
def test_ties_are_kept(name: str) -> None:
    dense = build(name, tie_word_embeddings=True)
    pruned = surgery.prune_layers(dense, CUTS["middle"], operators(CUTS["middle"]))
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def test_removing_layers_that_write_nothing_changes_nothing() -> None:
    dense = build("llama")
    for index in (1, 2):
        dense.model.layers[index].self_attn.o_proj.weight.zero_()
        dense.model.layers[index].mlp.down_proj.weight.zero_()
    pruned = surgery.prune_layers(dense, CUTS["middle"])
    assert torch.equal(logits(pruned, token_ids()), logits(dense, token_ids()))


def test_a_zero_repair_is_the_bare_cut_exactly_in_bfloat16() -> None:
    dense = build("llama").to(torch.bfloat16)
    span = Span(1, 3)
    zero = surgery.prune_layers(dense, (span,), {span: torch.zeros(32, 32)})
    bare = surgery.prune_layers(dense, (span,))
    assert torch.equal(logits(zero, token_ids()), logits(bare, token_ids()))


def test_operators_are_bare_parameters() -> None:
    spans = CUTS["both ends"]
    repaired = surgery.prune_layers(build("llama"), spans, operators(spans))
    names = [name for name, _ in repaired.named_parameters() if "repair" in name]
    assert names == ["model.layers.0.repair_before", "model.layers.2.repair_after"]
    assert not any("repair" in name for name, _ in repaired.named_modules())
    assert repaired.config.repaired_boundaries == [0, 3]
    assert modeling.repair_place(0) == (0, "repair_before")


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="type 'gpt2' cannot be pruned yet; supported"):
        surgery.prune_layers(build("gpt2"), CUTS["middle"])


def test_a_repaired_model_is_not_cut_again() -> None:
    once = surgery.prune_layers(build("llama"), CUTS["middle"], operators(CUTS["middle"]))
    with pytest.raises(UnsupportedModelError, match="removed and repaired before"):
        surgery.prune_layers(once, (Span(0, 1),))


@pytest.mark.parametrize("spans", [(Span(0, 5),), (Span(4, 6),), (Span(1, 3), Span(2, 4))])
def test_impossible_spans_are_refused(spans: tuple[Span, ...]) -> None:
    with pytest.raises(SpanError):
        surgery.prune_layers(build("llama"), spans)


@pytest.mark.parametrize("delta", [torch.zeros(32, 31), torch.full((32, 32), float("nan"))])
def test_impossible_operators_are_refused(delta: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"finite \[32, 32\] matrix"):
        surgery.prune_layers(build("llama"), CUTS["middle"], {Span(1, 3): delta})
