"""A smaller model as a draft: the text is the dense model's own, and what is counted is true."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ghostlayers
from conftest import make_byte_tokenizer, make_tiny_llama
from families import build
from ghostlayers.cli import app
from ghostlayers.errors import InputError, UnsupportedModelError
from ghostlayers.evaluation import drafting
from ghostlayers.evaluation.drafting import DraftPoint, measure_drafts

PROMPTS = torch.arange(36).view(3, 12) * 7 % 200
TOKENIZER = make_byte_tokenizer(bos=False)
SLIDING = 6


def measure(dense: Any, draft: Any, **how: Any) -> list[DraftPoint]:
    asked = {"lengths": [2, 5], "new_tokens": 16, "repeats": 1, **how}
    return measure_drafts(dense, draft, TOKENIZER, PROMPTS, **asked)


def alone(model: Any, prompt: torch.Tensor, ends: list[int], new_tokens: int = 16) -> list[int]:
    """What a model writes, a whole pass for each token: no cache, no `generate`."""
    ids = prompt[None]
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].clone()
        logits[ends] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    written: list[int] = ids[0, len(prompt) :].tolist()
    return written


def slow_counts(dense: Any, draft: Any, length: int, new_tokens: int = 16) -> tuple[int, ...]:
    """Passes, drafted and kept tokens, by the definition of speculative decoding."""
    passes = drafted = kept = 0
    for prompt in PROMPTS:
        text = alone(dense, prompt, [0], new_tokens)
        done = 0
        while done < new_tokens:
            known = torch.cat([prompt, torch.tensor(text[:done], dtype=prompt.dtype)])
            proposed = alone(draft, known, [0], min(length, new_tokens - done - 1))
            agree = [a == b for a, b in zip(proposed, text[done:], strict=False)]
            matches = agree.index(False) if False in agree else len(agree)
            passes, drafted, kept = passes + 1, drafted + len(proposed), kept + matches
            done += matches + 1
    return passes, drafted, kept


@pytest.mark.slow
def test_counts_are_those_of_the_definition() -> None:
    dense = make_tiny_llama(seed=3)
    draft = make_tiny_llama(seed=3)
    with torch.no_grad():  # alike, but not always of one mind
        noise = torch.Generator().manual_seed(0)
        for weight in draft.model.layers[-1].parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=noise)
    first, *points = measure(dense, draft)
    assert (first.draft_tokens, first.acceptance, first.tokens_a_verification) == (0, None, 1.0)
    shares = []
    for point in points:
        found = point.verifications, point.drafted, point.accepted
        assert found == slow_counts(dense, draft, point.draft_tokens)
        assert point.differences == ()
        shares.append(point.acceptance)
        assert point.to_dict()["tokens_s"] == 3 * 16 / point.time.median
    assert all(0 < share < 1 for share in shares)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3", "olmo3", "mistral"])
def test_caches_are_right_beyond_a_sliding_window(family: str) -> None:
    """A draft that is the dense model itself is always kept, wherever its cache was cut back."""
    model = build(family, vocab_size=256, sliding_window=SLIDING).double()
    first, *points = measure(model, model)
    for point in (first, *points):
        assert point.differences == ()
    assert [point.acceptance for point in points] == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["ghost", "piecewise:2", "joint:x+z", "refit:2"])
def test_a_repaired_model_drafts_as_it_writes(
    repair: str, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    pruned = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, remove="3-4", repair=repair,
        windows=8, held_out_windows=1, sequence_length=48,
    )  # fmt: skip
    model = pruned.model
    assert [p.acceptance for p in measure(model, model)[1:]] == [1.0, 1.0]
    point = measure(trained_llama, model, lengths=[3])[1]
    assert (point.verifications, point.drafted, point.accepted) == slow_counts(
        trained_llama, model, 3
    )


@pytest.mark.slow
def test_drawn_drafts_are_kept_as_often_as_distributions_overlap() -> None:
    """Sum of min(p, q), which `eval` calls acceptance: here of one token, at the first place."""
    dense, draft = make_tiny_llama(seed=4), make_tiny_llama(seed=5)
    prompts = PROMPTS[:1].expand(400, -1)
    (_, point) = measure_drafts(
        dense, draft, TOKENIZER, prompts, lengths=[1], new_tokens=2, repeats=1, sampled=True
    )
    assert point.differences is None
    assert point.drafted == 400
    with torch.no_grad():
        logits = [model(input_ids=prompts[:1]).logits[0, -1] for model in (dense, draft)]
    for each in logits:
        each[0] = -torch.inf
    p, q = (each.softmax(0) for each in logits)
    overlap = float(torch.minimum(p, q).sum())
    assert point.acceptance == pytest.approx(overlap, abs=4 * (overlap / 400) ** 0.5)


@pytest.mark.slow
def test_settings_of_the_models_are_left_as_they_were() -> None:
    dense, draft = make_tiny_llama(), make_tiny_llama(seed=1)
    before = [each.generation_config for each in (dense, draft)]
    state = torch.random.get_rng_state()
    measure(dense, draft, lengths=[2], sampled=True)
    assert all(a is b.generation_config for a, b in zip(before, (dense, draft), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.slow
def test_differences_are_told_with_how_far_apart_the_two_tokens_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = make_tiny_llama()
    write = drafting._Writer._generate

    def another(self: Any, ids: Any, rounds: Any, length: int, assistant: Any) -> Any:
        text = write(self, ids, rounds, length, assistant)
        if assistant:
            text[0, len(PROMPTS[0]) + 4] = 7
        return text

    monkeypatch.setattr(drafting._Writer, "_generate", another)
    point = measure(dense, dense, lengths=[2])[1]
    assert [(each.prompt, each.token) for each in point.differences or ()] == [
        (0, 4),
        (1, 4),
        (2, 4),
    ]
    for each in point.differences or ():
        own = alone(dense, PROMPTS[each.prompt], [0])
        ids = torch.cat([PROMPTS[each.prompt], torch.tensor(own[:4])])[None]
        with torch.no_grad():
            predicted = dense(input_ids=ids).logits[0, -1].log_softmax(0)
        assert each.gap_nats == pytest.approx(float(predicted[own[4]] - predicted[7]), abs=1e-5)
    assert not point.by_rounding


def test_recurrent_models_and_other_vocabularies_are_refused_by_name() -> None:
    recurrent = build("jamba", vocab_size=256)
    with pytest.raises(UnsupportedModelError, match=r"cannot write with a draft here \(jamba"):
        measure(recurrent, recurrent)
    with pytest.raises(InputError, match="256 tokens and the draft 250"):
        measure(make_tiny_llama(), make_tiny_llama(vocab_size=250))


@pytest.fixture(scope="module")
def place(
    tiny_folder: Path, some_text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint, an adapter, and a text."""
    folder = tmp_path_factory.mktemp("drafts")
    pruned = ghostlayers.prune(
        str(tiny_folder), data=some_text, remove="2-3", windows=8, sequence_length=64
    )
    pruned.save(folder / "out")
    pruned.save_adapter(folder / "adapter")
    (folder / "text.txt").write_text("\n\n".join(some_text))
    return folder


SMALL = ["--new-tokens", "12", "--repeats", "1", "--prompts", "3", "--length", "16"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "adapter"])
def test_the_command_says_what_is_kept_and_what_it_saves(
    name: str, place: Path, tiny_folder: Path
) -> None:
    given = [str(place / name), "--against", str(tiny_folder), "--draft", *SMALL]
    files = ["--json", str(place / "d.json"), "--png", str(place / "d.png"), "--overwrite"]
    text = ["--data", str(place / "text.txt"), "--draft-tokens", "2,3"]
    done = CliRunner().invoke(app, ["bench", *given, *files, *text])
    assert done.exit_code == 0, done.output
    found = json.loads((place / "d.json").read_text())
    assert [each["draft_tokens"] for each in found["drafts"]] == [0, 2, 3]
    assert {each["prompts"] for each in found["drafts"]} == {3}
    assert found["prompt_tokens"] == 16
    assert found["texts"] == [str(place / "text.txt")]
    assert found["manner"] == "greedy"
    assert "3 of 3" in done.output
    assert (place / "d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_without_a_text_the_reference_of_python_is_continued(
    place: Path, tiny_folder: Path
) -> None:
    given = [str(place / "out"), "--against", str(tiny_folder), "--draft", "--sampled", *SMALL]
    done = CliRunner().invoke(app, ["bench", *given, "--draft-tokens", "2"])
    assert done.exit_code == 0, done.output
    assert "python-reference" in done.output


@pytest.mark.parametrize(
    ("given", "status", "told"),
    [
        (["--draft"], 2, "--draft needs --against"),
        (["--prompts", "3"], 2, "mean nothing without --draft"),
        (["--draft", "--against", "DENSE", "--draft-tokens", "0"], 2, "at least one token"),
        (["--draft", "--against", "DENSE", "--batch", "2"], 2, "one text at a time"),
        (["--draft", "--against", "DENSE", "--length", "16,32"], 2, "one length"),
        (["--draft", "--against", "DENSE", "--length", "120"], 1, "the longest prompt that works"),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: list[str], status: int, told: str, place: Path, tiny_folder: Path
) -> None:
    typed = [str(tiny_folder) if each == "DENSE" else each for each in given]
    done = CliRunner().invoke(app, ["bench", str(place / "out"), *typed])
    assert done.exit_code == status
    assert told in " ".join(done.output.split())
