"""The sweep equals the model's own forward pass, bit for bit, in every family."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from families import FAMILIES, build
from ghostlayers.calibration.cuts import Cut
from ghostlayers.errors import NonFiniteError, UnsupportedModelError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import check_finite, find_decoder_layers
from oracles import token_ids


def walk(model: DenseModel, batch: Any, stream: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
    return Cut(model, {}).walk(batch, stream, start)


@torch.no_grad()
def own_boundaries(model: Any, ids: torch.Tensor, mask: Any = None) -> tuple[list[Any], Any]:
    """What enters each layer and what leaves the last, by hooks on an ordinary forward pass."""
    layers = find_decoder_layers(model)
    seen: list[torch.Tensor] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("name", FAMILIES)
def test_sweep_is_the_models_own_forward(name: str) -> None:
    model = build(name)
    layerwise = DenseModel(model)
    before = list(layerwise.layers)
    for ids in (token_ids(3), token_ids(3, seed=1), token_ids(1, seed=2)):  # the last is smaller
        batch, stream = layerwise.begin(ids)
        got = dict(walk(layerwise, batch, stream))
        assert list(got) == list(range(6))
        own, logits = own_boundaries(model, ids)
        for boundary, hidden in got.items():
            assert torch.equal(hidden, own[boundary]), f"boundary {boundary}"
        assert torch.equal(layerwise.logits(batch, got[5]), logits)
    assert [a is b for a, b in zip(before, layerwise.layers, strict=True)] == [True] * 5


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_sweep_with_padding(name: str) -> None:
    model = build(name)
    layerwise = DenseModel(model)
    ids, mask = token_ids(2), torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    batch, stream = layerwise.begin(ids, mask)
    *_, (_, last) = walk(layerwise, batch, stream)
    own, _ = own_boundaries(model, ids, mask)
    assert torch.equal(last, own[-1])
    assert batch.tokens(last).shape == (13 + 9, 32)
    assert torch.equal(batch.tokens(last), torch.cat([last[0], last[1, 4:]]))


def test_layers_after_the_stop_and_the_head_never_run() -> None:
    model = build("llama")
    layerwise = DenseModel(model)
    ran: list[str] = []
    for name, module in model.named_modules():
        if name in ("model.layers.2", "model.layers.3", "model.layers.4", "lm_head"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    batch, stream = layerwise.begin(token_ids(2))
    next(stream for boundary, stream in walk(layerwise, batch, stream) if boundary == 3)
    assert ran == ["model.layers.2"]


def test_a_sweep_can_start_in_the_middle_and_leaves_streams_alone() -> None:
    layerwise = DenseModel(build("llama"))
    batch, stream = layerwise.begin(token_ids(2))
    whole = dict(walk(layerwise, batch, stream))
    copies = {boundary: hidden.clone() for boundary, hidden in whole.items()}
    again = dict(walk(layerwise, batch, whole[2], start=2))
    assert sorted(again) == [2, 3, 4, 5]
    assert torch.equal(again[5], copies[5])
    assert all(torch.equal(whole[boundary], copies[boundary]) for boundary in whole)


def test_logits_of_some_positions() -> None:
    layerwise = DenseModel(build("llama"))
    batch, stream = layerwise.begin(token_ids(1))
    *_, (_, last) = walk(layerwise, batch, stream)
    whole = layerwise.logits(batch, last)
    torch.testing.assert_close(layerwise.logits(batch, last, slice(3, 7)), whole[:, 3:7])


def test_layers_come_back_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    layerwise = DenseModel(model)
    before = list(layerwise.layers)
    monkeypatch.setattr(model.model.norm, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layerwise.begin(token_ids(1))
    assert all(a is b for a, b in zip(before, layerwise.layers, strict=True))


def test_nan_is_refused_by_layer_and_dtype() -> None:
    model = build("llama")
    model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    layerwise = DenseModel(model)
    batch, stream = layerwise.begin(token_ids(1))
    with pytest.raises(NonFiniteError, match=r"decoder layer 3 gave NaN or infinity in float32"):
        list(walk(layerwise, batch, stream))
    with pytest.raises(NonFiniteError, match="try --dtype bfloat16 or float32"):
        check_finite(torch.tensor([[[float("inf")]]], dtype=torch.float16), 0)


def test_a_model_without_decoder_layers_is_refused() -> None:
    model = build("llama")
    model.config.num_hidden_layers = 4
    with pytest.raises(UnsupportedModelError, match="has no list of 4 decoder layers"):
        DenseModel(model)
