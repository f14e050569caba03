"""What models write: rollouts against loops without a cache, and the figures of models known."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from conftest import make_tiny_llama
from families import build
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.evaluation.written import (
    DRAWN_EVERY,
    Written,
    continuations,
    take_prefixes,
    tokens_to_write,
    write_and_measure,
    writing_figures,
)
from ghostlayers.text.tokens import Windows

END = 2


class Letters:
    """A tokenizer whose every token is a word."""

    eos_token_id = END

    def decode(self, row: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"w{int(token)}" for token in row)


@pytest.fixture
def letters() -> Any:
    return Letters()


def some_prefixes(count: int = 5, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def next_scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the token behind a text, read from its beginning without a cache."""
    scores: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    scores[:, END] = -torch.inf
    return scores


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "bloom"])
def test_greedy_texts_are_those_of_a_loop_without_cache(name: str, letters: Any) -> None:
    model, prefixes = build(name), some_prefixes(9)
    written = continuations(model, letters, prefixes, new_tokens=9)
    ids = prefixes
    for _ in range(9):
        ids = torch.cat([ids, next_scores(model, ids).argmax(1, keepdim=True)], dim=1)
    assert torch.equal(written.greedy, ids[:, 7:])
    assert written.sampled.shape == (2, 10, 9)
    assert torch.equal(written.drawn_behind, prefixes[::DRAWN_EVERY])


def test_work_is_foreseen(letters: Any) -> None:
    windows = Windows(torch.arange(9 * 64).view(9, 64) % 90 + 3, False, 9, ())
    model = build("llama", max_position_embeddings=128)
    written = continuations(model, letters, take_prefixes([windows], 9, model))
    parts = (written.greedy, written.sampled)
    tokens = sum(part.numel() + part.numel() // part.shape[-1] * 64 for part in parts)
    assert tokens_to_write(9) == tokens


def test_draws_have_the_chances_that_the_model_gives(letters: Any) -> None:
    model, prefixes = build("llama", vocab_size=12), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    written = continuations(model, letters, prefixes, new_tokens=1, samples=4000)
    chances = next_scores(model, prefixes)[0].softmax(0)
    counts = written.sampled.flatten().bincount(minlength=12)
    assert counts[END] == 0
    error = (chances * (1 - chances) / 4000).sqrt()
    assert ((counts / 4000 - chances).abs() <= 4 * error).all()
    assert chances.max() > 0.15  # not all alike


def test_later_draws_follow_what_was_drawn(letters: Any) -> None:
    """The same noise, added to the scores of a loop without cache."""
    model, prefixes = build("llama"), some_prefixes(1)
    written = continuations(model, letters, prefixes, new_tokens=6, samples=3, seed=5)
    generator, ids = torch.Generator().manual_seed(5), prefixes.repeat(3, 1)
    for _ in range(6):
        waits = torch.empty(3, 96).exponential_(generator=generator)
        ids = torch.cat(
            [ids, (next_scores(model, ids) - waits.log()).argmax(1, keepdim=True)], dim=1
        )
    assert torch.equal(written.sampled[0], ids[:, 7:])
    again = continuations(model, letters, prefixes, new_tokens=6, samples=3, seed=6)
    assert not torch.equal(again.sampled, written.sampled)


def test_a_models_own_settings_and_the_global_generator_stay_out_of_it(letters: Any) -> None:
    prefixes = some_prefixes()
    plain = continuations(build("llama"), letters, prefixes, new_tokens=8)
    set_up, end = build("llama"), int(plain.sampled[0, 0, 0])
    set_up.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=2, repetition_penalty=3.0, eos_token_id=[END, end],
        max_new_tokens=2, no_repeat_ngram_size=1,
    )  # fmt: skip
    before = torch.get_rng_state()
    asked = continuations(set_up, letters, prefixes, new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not (asked.sampled == end).any()  # it ends a text, as its settings say
    greedy = [row for row in plain.greedy if not (row == end).any()]
    assert greedy
    assert all(any(torch.equal(row, other) for other in asked.greedy) for row in greedy)


def test_texts_in_several_batches_are_written_alike(
    letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prefixes = build("llama"), some_prefixes(9)
    whole = continuations(model, letters, prefixes, new_tokens=4, samples=3)
    monkeypatch.setattr("ghostlayers.evaluation.written.ROWS_AT_ONCE", 4)
    parts = continuations(model, letters, prefixes, new_tokens=4, samples=3)
    assert torch.equal(parts.greedy, whole.greedy)
    assert parts.sampled.shape == whole.sampled.shape


def test_texts_stay_within_the_models_positions(letters: Any) -> None:
    windows = Windows(torch.arange(3, 67)[None], False, 1, ())
    model = build("llama", max_position_embeddings=20)
    prefixes = take_prefixes([windows], 4, model)
    assert prefixes.shape == (4, 10)
    assert continuations(model, letters, prefixes).greedy.shape == (4, 10)


def test_prefixes_lie_evenly_over_all_texts() -> None:
    model = build("llama", max_position_embeddings=16)
    one, two = (
        Windows(torch.arange(n * 33).view(n, 33) + first, False, n, ())
        for n, first in ((3, 0), (2, 1000))
    )
    prefixes = take_prefixes([one, two], 5, model)
    assert prefixes.shape == (5, 8)
    assert prefixes[:, 0].tolist() == [0, 33, 66, 1000, 1033]
    assert torch.equal(prefixes - prefixes[:, :1], torch.arange(8).expand(5, 8))
    assert len(take_prefixes([two], 99, model)) == 2 * 4  # all that there are


def test_prefixes_begin_as_windows_do() -> None:
    model = build("llama", max_position_embeddings=16)
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.arange(60).view(2, 30) + 10], dim=1)
    prefixes = take_prefixes([Windows(ids, True, 2, ())], 8, model)
    assert prefixes[:, 0].tolist() == [1] * 8
    assert prefixes[:, 1].tolist() == [10, 17, 24, 31, 40, 47, 54, 61]
    assert prefixes[0].tolist() == [1, *range(10, 17)]


def test_a_class_that_cannot_generate_is_refused(letters: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no 'generate'"):
        continuations(build("llama").model, letters, some_prefixes())


def planted() -> Written:
    """Four prefixes; a text that loops, one that does not, and two in between."""
    texts = [[5, 6, 7, 8, 9, 8, 9, 8, 9], list(range(10, 19)), [3] * 9, [4, 5, 6, 7] * 2 + [4]]
    sampled = torch.tensor([[texts[0], texts[0], texts[1]]])
    return Written(some_prefixes(4), torch.tensor(texts), sampled)


def test_figures_of_texts_that_are_known(letters: Any) -> None:
    dense, written = build("llama"), planted()
    other = written.greedy.clone()
    other[0, 3] = other[1, 0] = 20
    greedy, sampled = writing_figures(written, other, dense, letters)
    assert (greedy.manner, greedy.num_continuations, greedy.new_tokens) == ("greedy", 4, 9)
    assert greedy.loops == 0.5
    assert greedy.healthy_tokens == (3 + 9 + 0 + 9) / 4
    assert greedy.repeated_4grams == pytest.approx((1 / 6 + 0 + 5 / 6 + 2 / 6) / 4)
    assert greedy.agreement_tokens == (3 + 0 + 9 + 9) / 4
    assert greedy.texts[1] == "w10 w11 w12 w13 w14 w15 w16 w17 w18"
    assert (sampled.manner, sampled.num_continuations) == ("sampled", 3)
    assert sampled.distinct == 2
    assert sampled.loops == pytest.approx(2 / 3)
    assert sampled.texts == (greedy.texts[0],)


def test_the_dense_model_scores_every_written_token(
    letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostlayers.evaluation.written.LOGITS_AT_ONCE", 3 * 16 * 96)
    dense, written = build("gpt2"), planted()
    greedy, sampled = writing_figures(written, written.greedy, dense, letters)
    rows = [*zip(written.prefixes, written.greedy, strict=True)]
    drawn = [(written.prefixes[0], text) for text in written.sampled[0]]
    for figures, pairs in ((greedy, rows), (sampled, drawn)):
        losses = []
        for prefix, text in pairs:
            for place in range(len(text)):
                ids = torch.cat([prefix, text[:place]])[None]
                with torch.no_grad():
                    log_p = dense(input_ids=ids).logits[0, -1].log_softmax(0)
                losses.append(-float(log_p[text[place]]))
        assert figures.dense_loss_nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.slow
def test_a_model_beside_itself_agrees_in_every_token(byte_tokenizer: Any) -> None:
    model, twin, other = (make_tiny_llama(seed=s, tie_word_embeddings=False) for s in (3, 3, 4))
    windows = Windows(torch.arange(240).view(6, 40), False, 6, ())
    report = write_and_measure(model, twin, byte_tokenizer, [windows], 6)
    assert report.figures == report.dense
    greedy, sampled = report.figures
    assert greedy.agreement_tokens == greedy.new_tokens == 64
    assert len(report.prefixes) == len(greedy.texts) == 6
    assert len(sampled.texts) == 1
    apart = write_and_measure(other, model, byte_tokenizer, [windows], 6)
    assert apart.dense == report.dense
    agreement = apart.figures[0].agreement_tokens
    assert agreement is not None
    assert agreement < 64
    content = apart.to_dict()
    assert [row["manner"] for row in content["writing"]] == ["greedy", "sampled"]
    assert content["writing_against"][1]["distinct"] == report.dense[1].distinct
