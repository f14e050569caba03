"""Losses, divergence and protocol."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, softmax

from families import build
from ghostlayers.errors import InputError
from ghostlayers.evaluation import LossSums, evaluate_windows, prefill_seconds
from ghostlayers.statistics.losses import sum_losses, tokens_a_verification
from ghostlayers.text.tokens import Windows


def make_windows(count: int = 5, length: int = 11) -> Windows:
    ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows(ids, bos=False, available=9, documents=("a", "b"))


def test_sums_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(600, 17, generator=generator) for _ in range(2))
    targets = torch.randint(0, 17, (600,), generator=generator)
    sums = sum_losses(q, targets, p)
    loss = kl = agree = kept = 0.0
    for t in range(600):
        a, b = softmax(p[t].double(), 0), softmax(q[t].double(), 0)
        loss -= math.log(float(b[targets[t]]))
        kl += float((a * (a / b).log()).sum())
        agree += int(p[t].argmax() == q[t].argmax())
        kept += sum(min(float(a[v]), float(b[v])) for v in range(17))
    assert sums.num_tokens == 600
    assert sums.loss == pytest.approx(loss, rel=1e-6)
    assert sums.kl == pytest.approx(kl, rel=1e-6)
    assert sums.agreements == agree
    assert sums.acceptance == pytest.approx(kept / 600, rel=1e-6)
    assert sums.total_variation == pytest.approx(1 - kept / 600, rel=1e-6)


def test_a_model_agrees_with_itself() -> None:
    logits = torch.randn(30, 9, generator=torch.Generator().manual_seed(0))
    sums = sum_losses(logits, logits.argmax(dim=1), logits)
    assert sums.kl == 0.0
    assert sums.agreement == 1.0
    assert sums.total_variation == pytest.approx(0.0, abs=1e-6)
    assert sums.acceptance == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_tokens_a_verification_are_those_of_the_game_itself(acceptance: float) -> None:
    """Drafted tokens are kept until the first refusal; the dense model adds one of its own."""
    expected = 0.0
    for kept in range(5):
        chance = acceptance**kept * (1 - acceptance if kept < 4 else 1.0)
        expected += chance * (kept + 1)
    assert tokens_a_verification(acceptance) == pytest.approx(expected)
    assert tokens_a_verification(acceptance, drafted=1) == pytest.approx(1 + acceptance)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3_text", "qwen3_moe"])
def test_any_causal_model_is_evaluated(name: str) -> None:
    model, windows = build(name), make_windows()
    result = evaluate_windows(model, windows, corpus="x", against=build(name, seed=1), batch_size=2)
    with torch.no_grad():
        logits = model(input_ids=windows.input_ids).logits[:, :-1].flatten(0, 1)
    want = float(cross_entropy(logits, windows.input_ids[:, 1:].flatten()))
    assert result.sums.loss_nats == pytest.approx(want, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(want), rel=1e-5)
    assert result.sums.num_tokens == 50
    assert result.sums.kl_nats > 0
    keys = {"corpus", "num_tokens", "loss_nats", "perplexity", "kl_nats", "greedy_agreement"}
    assert keys <= set(result.to_dict())
    dense = evaluate_windows(build(name, seed=1), windows, corpus="x", batch_size=2)
    assert result.dense is not None
    assert result.dense.loss_nats == dense.sums.loss_nats
    assert result.to_dict()["dense_perplexity"] == dense.perplexity


def test_without_a_dense_model_there_is_no_divergence() -> None:
    result = evaluate_windows(build("llama"), make_windows(), corpus="x")
    assert not {"kl_nats", "greedy_agreement"} & set(result.to_dict())


def test_shared_documents_are_counted() -> None:
    result = evaluate_windows(build("llama"), make_windows(), corpus="x", calibration=["b", "c"])
    assert result.calibration_overlap == 1


def test_other_vocabularies_are_refused() -> None:
    other = build("llama", vocab_size=128)
    with pytest.raises(InputError, match=r"vocabularies differ \(96 and 128 tokens\)"):
        evaluate_windows(build("llama"), make_windows(), corpus="x", against=other)


def test_an_enormous_loss_is_an_infinite_perplexity() -> None:
    result = evaluate_windows(build("llama"), make_windows(), corpus="x")
    from dataclasses import replace

    assert replace(result, sums=LossSums(1, 1e4)).perplexity == math.inf


def test_prefill_is_timed_without_running_the_head() -> None:
    model: Any = build("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    assert prefill_seconds(model, num_tokens=16, repeats=1) > 0
