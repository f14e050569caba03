"""Text that the dense model writes: what is asked, what is kept, and how it is trained on."""

import copy
import dataclasses
import itertools
import json
import math
import operator
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ghostlayers
from conftest import make_byte_tokenizer
from ghostlayers.cli.app import app
from ghostlayers.errors import (
    CorpusError,
    DependencyError,
    ModelError,
    OutputError,
    RecipeError,
    ResumeError,
)
from ghostlayers.healing.completions import chat_windows
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.engine import Engine
from ghostlayers.healing.positions import draw_positions
from ghostlayers.healing.text import read_text
from ghostlayers.healing.trained import prepare, recording
from ghostlayers.merged import TRIED
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import text_view
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.recipe.writing import WritingRecipe
from ghostlayers.statistics.slerp import slerp
from ghostlayers.text.chats import prompt_of, split_answer
from ghostlayers.text.corpora import load_corpus
from ghostlayers.text.rows import turns_in
from ghostlayers.writing import authors, composing
from ghostlayers.writing.authors import Author, generate
from ghostlayers.writing.composing import batches_of, compose
from ghostlayers.writing.faults import LONGEST_PERIOD, REPEATS, fault_of, loops, speaks_of_itself
from ghostlayers.writing.orders import Order, read_orders
from ghostlayers.writing.writing import draft_for, write_data

TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STOP = 0


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def dense(trained_llama: Any, chat_tokenizer: Any) -> DenseModel:
    return DenseModel(trained_llama, chat_tokenizer)


def says(answers: dict[str, str | None], tokenizer: Any) -> Author:
    """An author that answers a prompt by the first key found in it; None never ends."""

    def write(prompts: Any, new: int, temperature: float, seed: int) -> list[list[int]]:
        del temperature, seed
        found = []
        for prompt in prompts:
            text = tokenizer.decode(list(prompt))
            answer = next(answer for key, answer in answers.items() if key in text)
            ids = tokenizer("never" if answer is None else answer, add_special_tokens=False)[
                "input_ids"
            ]
            found.append(ids[:new] if answer is None else [*ids, STOP])
        return found

    return Author("words", tokenizer, 4096, frozenset([STOP]), 2, {"model": "words"}, write)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# What is wrong with a text


def loops_literally(ids: list[int]) -> bool:
    return any(
        len(ids) >= REPEATS * period and ids[-REPEATS * period :] == ids[-period:] * REPEATS
        for period in range(1, LONGEST_PERIOD + 1)
    )


def test_loops_are_those_of_the_literal_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in range(200)]
    for period, times in itertools.product((1, 2, 31, 32, 33), (3, 4, 5)):
        cases.append([9, *(list(range(period)) * times)])
        cases.append([*(list(range(period)) * times), 99])
    found = [loops(ids) for ids in cases]
    assert found == [loops_literally(ids) for ids in cases]
    assert {True, False} == set(found)
    assert loops(list(range(32)) * 4)
    assert not loops(list(range(33)) * 4)
    assert not loops([1, 2] * 3)


@pytest.mark.parametrize(
    "text",
    [
        "The reference answer says 4.",
        "Here is my response: four.",
        "This, in my own words, is four.",
        "Four.\nUser: and five?",
        "Four <|im_end|> and more",
        "Four<end_of_turn>",
        "Sure, here it is: four",
        "### Response\nfour",
    ],
)
def test_words_about_the_task_are_found(text: str) -> None:
    assert speaks_of_itself(text, "What is 2 + 2?")
    assert not speaks_of_itself(text, f"A text to translate: {text}")
    assert fault_of(text, [1, 2, 3], "What is 2 + 2?", ended=True) == "meta"
    assert fault_of(text, [1, 2, 3], None, ended=False) is None  # of a continuation


@pytest.mark.parametrize(
    "text", ["Four.", "The correct answer is 4.", "user: root\nsystem: linux", "a < b | c > d"]
)
def test_plain_answers_are_kept(text: str) -> None:
    assert fault_of(text, [1, 2, 3], "What is 2 + 2?", ended=True) is None


def test_what_is_empty_or_breaks_off_is_told() -> None:
    assert fault_of(" \n", [5], "?", ended=True) == "empty"
    assert fault_of("Four", [1, 2], "?", ended=False) == "unfinished"
    assert fault_of("aaaa", [5] * 4, None, ended=False) == "loop"


# What is asked


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
         "Q", "A"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "Q", None),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
         "Q", "A"),
        ({"prompt": "Q", "completion": "A"}, "Q", "A"),
        ({"prompt": "Q", "response": "A"}, "Q", "A"),
        ({"prompt": "Q", "answer": "A"}, "Q", "A"),
        ({"question": "Q", "answer": "A"}, "Q", "A"),
        ({"instruction": "Q", "output": "A"}, "Q", "A"),
        ({"prompt": "Q", "answer": ""}, "Q", None),
        ({"prompt": "Tell me of Q"}, "Tell me of Q", None),
    ],
)  # fmt: skip
def test_prompts_are_read_in_every_form(
    row: dict[str, Any], question: str, answer: str | None, tmp_path: Path, chat_tokenizer: Any
) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [row] * 2)
    orders = read_orders(WritingRecipe(prompts=path), chat_tokenizer)
    assert len(orders) == 2
    (turn,) = orders[0].turns or ()
    assert turn == {"role": "user", "content": question}
    shown = chat_tokenizer.decode(list(orders[0].ids))
    if answer is None:
        assert orders[0].reference is None
        assert shown == f"<user>{question}\n<assistant>"
    else:
        assert orders[0].reference == {"role": "assistant", "content": answer}
        assert question in shown
        assert f"Answer given:\n{answer}" in shown
        assert shown.endswith("<assistant>")


def test_a_row_has_its_answer_in_any_of_the_columns(tmp_path: Path, chat_tokenizer: Any) -> None:
    rows = [{"prompt": "Q", "answer": "A"}, {"prompt": "Q", "response": "B"}, {"prompt": "Q"}]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    orders = read_orders(WritingRecipe(prompts=path), chat_tokenizer)
    found = [order.reference and order.reference["content"] for order in orders]
    assert found == ["A", "B", None]


def test_a_model_without_a_template_is_refused(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Q", "answer": "A"}])
    with pytest.raises(CorpusError, match="no template for chats"):
        read_orders(WritingRecipe(prompts=path), byte_tokenizer)


def test_prefixes_are_windows_of_the_text(some_text: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(some_text))
    recipe = WritingRecipe(prefixes=str(tmp_path / "text.txt"), rows=12, prefix_tokens=16)
    tokenizer = make_byte_tokenizer(bos=True)
    orders = read_orders(recipe, tokenizer)
    text = (tmp_path / "text.txt").read_text()
    assert len({order.ids for order in orders}) == 12
    assert all(order.ids[0] == tokenizer.bos_token_id for order in orders)
    assert all(tokenizer.decode(list(order.ids[1:])) in text for order in orders)
    assert sum(order.greedy for order in orders) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "got neither"),
        ({"prompts": "a", "prefixes": "b"}, "got both"),
        ({"prompts": "a", "greedy": 1.5}, "between 0 and 1"),
        ({"prompts": "a", "temperature": -1.0}, "between 0.01 and 100"),
        ({"prompts": "a", "temperature": 1e-300}, "between 0.01 and 100"),
        ({"prompts": "a", "temperature": 101.0}, "between 0.01 and 100"),
        ({"prompts": "a", "rows": 0}, "'rows' must lie"),
        ({"prompts": "a", "new_tokens": 0}, "'new_tokens' must lie"),
        ({"prompts": "a", "seed": -1}, "'seed' must lie"),
        ({"prompts": "a", "grredy": 0.1}, "greedy"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        WritingRecipe.from_dict(given)


# What is written


def test_greedy_words_are_those_of_a_literal_loop_whatever_stands_beside(dense: DenseModel) -> None:
    """Padding at the left changes nothing: each prompt as if it were alone."""
    tokenizer = dense.tokenizer
    texts = ["The", "The farmer carries", "Part 3. The old teacher", "x"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = generate(dense, prompts, 12, 0.0, 0, frozenset())
    for prompt, got in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = dense.network(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        assert got == ids[len(prompt) :]
    stop = found[1][5]
    stopped = generate(dense, prompts, 12, 0.0, 0, frozenset([stop]))
    for whole, cut in zip(found, stopped, strict=True):
        assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_what_is_drawn_follows_the_models_own_distribution(dense: DenseModel) -> None:
    """At temperature 1, with no top-k, whatever the model's settings say."""
    prompt = dense.tokenizer("The f")["input_ids"]
    with torch.no_grad():
        p = dense.network(torch.tensor([prompt])).logits[0, -1].softmax(-1).double()
    settings = dense.network.generation_config
    before = settings.top_k, settings.repetition_penalty
    settings.top_k, settings.repetition_penalty = 2, 5.0
    try:
        state = torch.random.get_rng_state()
        drawn = generate(dense, [prompt] * 3000, 1, 1.0, 7, frozenset())
        assert torch.equal(state, torch.random.get_rng_state())
    finally:
        settings.top_k, settings.repetition_penalty = before
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(p))
    off = (counts - 3000 * p).abs() / (3000 * p * (1 - p)).sqrt().clamp_min(1.0)
    assert float(off.max()) < 5
    assert int((counts > 0).sum()) > 2


def test_what_is_no_good_falls_back_to_the_reference(tmp_path: Path, chat_tokenizer: Any) -> None:
    answers = {
        "q-good": "Fine words.",
        "q-meta": "In the reference answer it is 4.",
        "q-loop": "no no no no no no no",
        "q-empty": "",
        "q-long": None,
    }
    rows = [{"prompt": f"q{name[1:]}", "answer": f"known {name}"} for name in answers]
    alone = [{"prompt": f"{name} alone", "answer": ""} for name in answers]
    path = write_rows(tmp_path / "prompts.jsonl", [*rows, *alone])
    recipe = WritingRecipe(prompts=path, new_tokens=400)
    written = compose(says(answers, chat_tokenizer), recipe, read_orders(recipe, chat_tokenizer))
    assert written.sources == {"dense": 2, "reference": 4, "dropped": 4}
    assert written.faults == {"empty": 2, "loop": 2, "meta": 2, "unfinished": 2}
    first, *others = written.rows[:5]
    assert first == {
        "messages": [
            {"role": "user", "content": "q-good"},
            {"role": "assistant", "content": "Fine words."},
        ],
        "from": "dense",
    }
    assert [row["messages"][-1]["content"] for row in others] == [
        f"known {name}" for name in list(answers)[1:]
    ]
    assert [row["from"] for row in written.rows] == ["dense", *["reference"] * 4, "dense"]


def test_too_long_and_shapeless_chats_keep_their_reference(
    tmp_path: Path, chat_tokenizer: Any
) -> None:
    answer = {"role": "assistant", "content": "A"}
    rows = [
        {"messages": [{"role": "user", "content": "q" * 5000}, answer]},
        {"messages": [answer]},
        {"messages": [{"role": "user", "content": "q"}, answer]},
    ]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    recipe = WritingRecipe(prompts=path)
    written = compose(
        says({"q": "Yes"}, chat_tokenizer), recipe, read_orders(recipe, chat_tokenizer)
    )
    assert written.faults == {"form": 1, "long": 1}
    assert [row["from"] for row in written.rows] == ["reference", "reference", "dense"]


def test_nothing_good_is_said(tmp_path: Path, chat_tokenizer: Any) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q", "answer": ""}] * 3)
    recipe = WritingRecipe(prompts=path)
    orders = read_orders(recipe, chat_tokenizer)
    with pytest.raises(CorpusError, match=r"nothing .* can be kept \(3 empty\)"):
        compose(says({"q": ""}, chat_tokenizer), recipe, orders)


def test_batches_are_alike_in_length_and_in_how_they_are_drawn() -> None:
    lengths = [5, 1, 9, 3, 7, 2]
    orders = [Order((1,) * n, greedy=n > 5) for n in lengths]
    orders.append(Order((), fault="form"))
    assert batches_of(orders, 2) == [[4, 2], [1, 5], [3, 0]]


def test_continuations_begin_with_their_prefix(
    dense: DenseModel, some_text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(some_text))
    out = tmp_path / "out.jsonl"
    written = ghostlayers.write_data(
        dense, out, prefixes=str(tmp_path / "text.txt"), rows=10, prefix_tokens=24, new_tokens=20,
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == list(written.rows)
    assert {row["from"] for row in rows} == {"dense"}
    text = (tmp_path / "text.txt").read_text()
    assert all(row["text"][:24] in text and 24 < len(row["text"]) <= 44 for row in rows)
    again = load_corpus(str(out), use="calibration")
    assert list(again.documents) == [row["text"] for row in rows]


# Interruptions, and what is in the way


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def prefixes(some_text: list[str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("\n\n".join(some_text))
    return {
        "prefixes": str(tmp_path / "text.txt"), "rows": 9, "prefix_tokens": 20, "new_tokens": 12,
        "options": RunOptions(batch_size=3),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    dense: DenseModel,
    prefixes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torn: bool,
) -> None:
    write_data(dense, tmp_path / "whole.jsonl", **prefixes)
    wanted = (tmp_path / "whole.jsonl").read_bytes()
    add, calls = composing.Draft.add, []

    def kill(self: Any, batch: Any) -> None:
        calls.append(1)
        add(self, batch)
        raise Killed

    out = tmp_path / "out.jsonl"
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(composing.Draft, "add", kill)
            with pytest.raises(Killed):
                write_data(dense, out, **prefixes)
        assert not out.exists()
    if torn:
        kept = draft_for(out).read_bytes()
        draft_for(out).write_bytes(kept[:-7])
        monkeypatch.setattr(composing.Draft, "add", lambda *given: (calls.append(1), add(*given)))
    write_data(dense, out, **prefixes)
    assert len(calls) == 3 + (2 if torn else 0)
    assert out.read_bytes() == wanted
    left = sorted(each.name for each in tmp_path.iterdir())
    assert left == ["out.jsonl", "text.txt", "whole.jsonl"]


@pytest.mark.slow
def test_a_draft_of_another_request_is_refused(
    dense: DenseModel, prefixes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(composing, "_gather", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            write_data(dense, out, **prefixes)
    kept = draft_for(out).read_bytes()
    with pytest.raises(ResumeError, match="another request"):
        write_data(dense, out, **prefixes, seed=1)
    assert draft_for(out).read_bytes() == kept
    write_data(dense, out, **prefixes, seed=1, restart=True)
    with pytest.raises(OutputError, match="exists already"):
        write_data(dense, out, **prefixes)
    write_data(dense, out, **prefixes, overwrite=True)


@pytest.mark.slow
def test_an_offloaded_model_writes_the_same(
    trained_llama: Any, chat_tokenizer: Any, prefixes: dict[str, Any], tmp_path: Path
) -> None:
    trained_llama.save_pretrained(tmp_path / "dense")
    chat_tokenizer.save_pretrained(tmp_path / "dense")
    found = []
    for offload in ("none", "disk"):
        options = RunOptions(offload=offload, batch_size=3)
        choices = {**prefixes, "options": options, "greedy": 1.0}
        out = tmp_path / f"{offload}.jsonl"
        found.append(write_data(tmp_path / "dense", out, **choices).rows)
    assert found[0] == found[1]


def test_somebody_elses_file_in_the_place_of_a_draft_is_left(
    dense: DenseModel, prefixes: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    draft_for(out).write_text("my notes\nof today\n")
    with pytest.raises(ResumeError, match="another request"):
        write_data(dense, out, **prefixes)
    assert draft_for(out).read_text() == "my notes\nof today\n"


# The command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_the_command_writes_and_counts(
    trained_llama: Any, chat_tokenizer: Any, tmp_path: Path, some_text: list[str]
) -> None:
    trained_llama.save_pretrained(tmp_path / "dense")
    chat_tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(some_text))
    out = tmp_path / "out.jsonl"
    command = (
        "write-data", tmp_path / "dense", "--prefixes", tmp_path / "text.txt", "-o", out,
        "--rows", 5, "--new-tokens", 10,
    )  # fmt: skip
    done = run(*command)
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "by the dense model" in words
    assert "Not kept of what the model wrote: none." in words
    assert len(out.read_text().splitlines()) == 5
    again = run(*command)
    assert again.exit_code == 1
    assert "exists" in again.output
    neither = run("write-data", tmp_path / "dense", "-o", tmp_path / "new.jsonl")
    assert neither.exit_code == 2
    assert "got neither" in neither.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"command: write-data\nmodel: {tmp_path / 'dense'}\nprefixes: {tmp_path / 'text.txt'}\n"
        f"output: {tmp_path / 'same.jsonl'}\nrows: 5\nnew-tokens: 10\n"
    )
    same = run("run", recipe)
    assert same.exit_code == 0, same.output
    assert (tmp_path / "same.jsonl").read_bytes() == out.read_bytes()
    itself = run(*command[:2], "--prompts", out, "-o", out, "--overwrite")
    assert itself.exit_code == 1
    assert len(out.read_text().splitlines()) == 5


# vLLM


def test_vllm_is_asked_by_name_and_its_words_end_as_ours(
    tmp_path: Path, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Engine:
        llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=4096))

        def __init__(self, name: str, **given: Any) -> None:
            asked.append((name, given))

        def get_tokenizer(self) -> Any:
            return chat_tokenizer

        def generate(self, prompts: Any, how: Any, use_tqdm: bool) -> Any:
            del use_tqdm
            asked.extend(
                (prompt["prompt_token_ids"], h) for prompt, h in zip(prompts, how, strict=True)
            )
            ids = chat_tokenizer("Fine.")["input_ids"]
            one = types.SimpleNamespace(token_ids=ids, finish_reason="stop")
            return [types.SimpleNamespace(outputs=[one]) for _ in prompts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(authors, "find_spec", lambda name: name == "vllm")
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q", "answer": "a"}] * 2)
    written = write_data("org/model", tmp_path / "out.jsonl", prompts=path, engine="vllm")
    assert [row["messages"][-1]["content"] for row in written.rows] == ["Fine."] * 2
    (name, _), *prompts = asked
    assert name == "org/model"
    assert [how["temperature"] for _, how in prompts] == [0.0, 0.0]
    assert len({how["seed"] for _, how in prompts}) == 2


def test_vllm_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authors, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install vllm"):
        write_data("org/model", tmp_path / "out.jsonl", prompts="p.jsonl", engine="vllm")
    assert not authors.takes_vllm(WritingRecipe(prompts="p"), "org/model", RunOptions())


# Answers alone


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """Chats of which one ends in a question, and one has two answers."""
    rows: list[list[dict[str, str]]] = []
    for number in range(30):
        question = {"role": "user", "content": f"Who carries lamp {number}?"}
        answer = {"role": "assistant", "content": f"The farmer {number % 7} carries it by hand."}
        rows.append([question, answer])
    rows.append([*rows[0], {"role": "user", "content": "Why?"}])
    rows.append([*rows[1], *rows[2]])
    return write_rows(tmp_path / "chats.jsonl", [{"messages": turns} for turns in rows])


def test_only_the_last_answer_counts(chats: str, chat_tokenizer: Any) -> None:
    """Characters are tokens here, so what counts can be read back."""
    corpus = load_corpus(chats, use="calibration", turns=True)
    written, windows, counts = chat_windows(corpus, chat_tokenizer, sequence_length=40)
    assert len(written.documents) == 31
    chats_of = [turns_in(document) or [] for document in corpus.documents]
    marks = ""
    for turns in chats_of:
        if turns[-1]["role"] != "assistant":
            continue
        for turn in turns[:-1]:
            marks += "." * len(f"<{turn['role']}>{turn['content']}\n")
        marks += "." * len("<assistant>") + "x" * len(f"{turns[-1]['content']}\n") + ".."
    text = written.joined() + "\n\n"
    assert len(marks) == len(text)
    wanted = [
        (text[start : start + 40], marks[start : start + 40])
        for start in range(0, len(text) - 39, 40)
        if "x" in marks[start + 1 : start + 40]
    ]
    found = [
        (chat_tokenizer.decode(ids), "".join("x" if each else "." for each in row))
        for ids, row in zip(windows.input_ids, counts.tolist(), strict=True)
    ]
    assert found == wanted


def test_a_window_begins_with_bos_which_counts_for_nothing(chats: str) -> None:
    tokenizer = make_byte_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    corpus = load_corpus(chats, use="calibration", turns=True)
    written, windows, counts = chat_windows(corpus, tokenizer, sequence_length=40)
    assert set(windows.input_ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert not bool(counts[:, 0].any())
    assert tokenizer.bos_token not in written.documents[0]


def test_a_template_that_hides_where_an_answer_begins_is_refused(
    chats: str, chat_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.name_or_path = "some/model"
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(CorpusError, match=r"template of 'some/model' does not tell.*--completions"):
        split_answer(tokenizer, [{"role": "user", "content": "Q"}] * 2)
    corpus = load_corpus(chats, use="calibration", turns=True)
    with pytest.raises(CorpusError, match="does not tell"):
        chat_windows(corpus, tokenizer, sequence_length=40)


def test_what_is_asked_and_answered_is_the_whole_chat(chat_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert split_answer(chat_tokenizer, turns) == ("<user>Q\n<assistant>", "A\n")
    assert prompt_of(chat_tokenizer, turns[:1]) == "<user>Q\n<assistant>"


PRUNE = {"windows": 8, "sequence_length": 64, "held_out_windows": 2, "remove": "3-4"}
SMALL = {"sequence_length": 48, "held_out_windows": 3, "step_tokens": 96}


@pytest.fixture(scope="module")
def pruned(trained_llama: Any, chat_tokenizer: Any, some_text: list[str]) -> Any:
    return ghostlayers.prune(
        trained_llama, tokenizer=chat_tokenizer, data=some_text, repair="ghost", **PRUNE
    )


def cut_of(pruned: Any) -> CutModel:
    return CutModel.of(pruned.dense, text_view(pruned.model), pruned.spans, pruned.record)


@pytest.mark.slow
@pytest.mark.parametrize("known_head", [True, False])
@pytest.mark.parametrize("kind", ["ce", "kl", "kl+ce"])
def test_weighted_gradients_are_those_of_a_literal_loop(
    pruned: Any, kind: Any, known_head: bool
) -> None:
    cut = cut_of(pruned)
    torch.manual_seed(3)
    ids = torch.randint(3, 200, (3, 14))
    positions = draw_positions(range(3), 14, 0.7, 0)
    weights = torch.rand(positions.shape) * (torch.rand(positions.shape) < 0.6)
    weights[1] = 0.0
    trained = prepare(cut, HealingRecipe(), ("operator", "suffix"))
    with recording(trained):
        engine = Engine(trained, kind)
        if not known_head:
            engine.head = None
        lesson = dataclasses.replace(engine.teach(ids, positions), weights=weights)
        loss = engine.learn(lesson, float(weights.sum()))
    student, teacher = copy.deepcopy(trained.network), cut.dense.network
    for each in student.parameters():
        each.requires_grad_(True)
    wanted = torch.zeros(())
    for row, column in itertools.product(range(3), range(positions.shape[1])):
        place, weight = positions[row, column], weights[row, column]
        log_q = student(input_ids=ids[row : row + 1]).logits[0, place].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(input_ids=ids[row : row + 1]).logits[0, place].log_softmax(-1)
        if "kl" in kind:
            wanted = wanted + weight * (log_p.exp() * (log_p - log_q)).sum()
        if "ce" in kind:
            wanted = wanted - weight * log_q[ids[row, place + 1]]
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    own = dict(student.named_parameters())
    for name, master in trained.masters.items():
        want = own[name].grad / weights.sum()  # type: ignore[operator]
        got = torch.zeros_like(want) if master.grad is None else master.grad
        assert float((got - want).norm()) <= 1e-3 * float(want.norm()) + 1e-7, name


def test_healing_on_answers_learns_by_them_alone(
    pruned: Any, chats: str, some_text: list[str], tmp_path: Path
) -> None:
    """One step of the whole run is one step of the literal mean over answers' tokens."""
    (tmp_path / "held.txt").write_text("\n\n".join(some_text))
    choices = {
        **SMALL, "data": chats, "held_out": str(tmp_path / "held.txt"), "loss": "ce",
        "completions": True, "positions": 1.0, "tokens": "96", "train": "operator",
    }  # fmt: skip
    recipe, cut = HealingRecipe(**choices), cut_of(pruned)
    text = read_text(cut.dense, recipe, 2)
    assert text.counts is not None
    assert 0 < int(text.counts.sum()) < text.counts.numel()
    healed = ghostlayers.heal(pruned, **choices)
    assert healed.outcome.steps == 1
    logits = cut.network(input_ids=text.input_ids).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(2, text.input_ids[:, 1:, None])[:, :, 0]
    literal = -chosen[text.counts[:, 1:]].mean()
    assert healed.outcome.training_losses[0] == pytest.approx(float(literal), rel=1e-4)


def test_answers_of_a_text_without_chats_are_refused(pruned: Any, some_text: list[str]) -> None:
    recipe = HealingRecipe(completions=True, **SMALL)
    with pytest.raises(RecipeError, match="the training text holds none"):
        read_text(pruned.dense, recipe, 4, some_text)


def test_plain_text_beside_chats_counts_as_a_whole(
    pruned: Any, chats: str, some_text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "plain.txt").write_text("\n\n".join(some_text))
    mix = f"{chats}:0.5,{tmp_path / 'plain.txt'}:0.5"
    text = read_text(pruned.dense, HealingRecipe(completions=True, data=mix, **SMALL), 20)
    assert text.counts is not None
    whole = text.counts.all(dim=1)
    assert int(whole.sum()) == 10
    tokenizer = pruned.dense.tokenizer
    plain = " ".join((tmp_path / "plain.txt").read_text().split())
    for ids, every in zip(text.input_ids, whole.tolist(), strict=True):
        words = " ".join(tokenizer.decode(ids).split())
        assert (words in plain) is every


# The preset


def test_a_preset_fills_in_what_is_not_given() -> None:
    plain = HealingRecipe.from_dict({"preset": "self-data-distillation"})
    assert (plain.rank, plain.parts, plain.loss) == (8, ("lora",), "ce")
    assert plain.rates["lora"] == 1e-4
    assert plain.completions
    own = HealingRecipe(rank=4).changed(
        {"preset": "self-data-distillation", "loss": "kl", "completions": False}
    )
    assert (own.rank, own.loss, own.completions, own.modules) == (4, "kl", False, "q_proj,v_proj")
    assert HealingRecipe.from_dict(own.to_dict()) == own
    with pytest.raises(RecipeError, match="Did you mean 'self-data-distillation'"):
        HealingRecipe.from_dict({"preset": "self-distillation"})


def test_only_the_projections_that_are_named_change(pruned: Any, some_text: list[str]) -> None:
    choices = {**SMALL, "tokens": "300", "preset": "self-data-distillation", "completions": False}
    healed = ghostlayers.heal(pruned, data=some_text, **choices)
    before = dict(pruned.model.named_parameters())
    trained = prepare(cut_of(pruned), healed.recipe, ("lora",))
    assert {name.rpartition(".")[2] for name in trained.adapted} == {"q_proj", "v_proj"}
    assert {each.shape[0] for n, each in trained.masters.items() if "lora_A" in n} == {8}
    names = {f"{name}.weight" for name in trained.adapted}
    changed = {n for n, p in healed.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= names
    assert changed or not healed.better
    with pytest.raises(RecipeError, match=r"called 'r_proj'.*q_proj"):
        ghostlayers.heal(pruned, data=some_text, **{**choices, "modules": "r_proj"})


@pytest.mark.slow
def test_the_command_says_what_its_preset_chooses(
    pruned: Any, trained_llama: Any, chat_tokenizer: Any, chats: str, tmp_path: Path
) -> None:
    trained_llama.save_pretrained(tmp_path / "dense")
    chat_tokenizer.save_pretrained(tmp_path / "dense")
    pruned.save(tmp_path / "cut")
    done = run(
        "heal", tmp_path / "cut", "--against", tmp_path / "dense", "-o", tmp_path / "out",
        "--data", chats, "--preset", "self-data-distillation", "--rank", 4, "--tokens", 300,
        "--sequence-length", 48, "--held-out-windows", 3, "--keep-worse",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "Self-Data Distillation, arXiv:2410.09982" in words
    assert "rank 4 (not 8)" in words
    assert "modules 'q_proj,v_proj'," in words
    recipe = ghostlayers.inspect(tmp_path / "out")["healing"]["recipe"]
    assert (recipe["preset"], recipe["rank"]) == ("self-data-distillation", 4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--completions --" in card


# Text that the dense model writes for a run


@pytest.fixture
def mixed(some_text: list[str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "real.txt").write_text("\n\n".join(some_text))
    return {**SMALL, "data": f"@dense:0.5,{tmp_path / 'real.txt'}:0.5", "train": "operator"}


def test_the_dense_model_writes_its_share(pruned: Any, mixed: dict[str, Any]) -> None:
    recipe = HealingRecipe(**mixed)
    text = read_text(pruned.dense, recipe, 20)
    real, own = text.corpora
    assert own.name == "@dense"
    assert [round(share, 3) for share in text.shares] == [0.5, 0.5]
    assert len(text.input_ids) == 20
    joined, decode = real.joined(), pruned.dense.tokenizer.decode
    begins = [document[:24] for document in own.documents]
    trained = [decode(ids) for ids in text.input_ids]
    assert sum(window in joined for window in trained) >= 10
    assert all(any(window.startswith(each) for window in trained) for each in begins)
    held_out = [decode(ids) for ids in text.held_out.input_ids]
    assert len(held_out) == 3
    assert all(window in joined for window in held_out)  # real text alone is measured on
    assert text.held_out_name == real.name


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"tokens": "960"}, {"minutes": 0.02}])
def test_a_run_killed_while_it_writes_or_trains_goes_on(
    pruned: Any,
    mixed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: dict[str, Any],
) -> None:
    keep, add, written = tmp_path / "kept", composing.Draft.add, []

    def kill(self: Any, batch: Any) -> None:
        add(self, batch)
        written.append(batch)
        if len(written) == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(composing.Draft, "add", kill)
        with pytest.raises(Killed):
            ghostlayers.heal(pruned, keep=keep, recipe=HealingRecipe(**mixed, **budget))
        kept = (keep / "written.jsonl").read_text().splitlines()
        healed = ghostlayers.heal(pruned, keep=keep, recipe=HealingRecipe(**mixed, **budget))
    own = healed.outcome.text.corpora[1]
    texts = [text for line in kept[1:] for text, fault in json.loads(line) if not fault]
    assert texts
    assert all(any(text in document for document in own.documents) for text in texts)
    if "tokens" in budget:  # a time may hold fewer steps than text is written for
        whole = ghostlayers.heal(pruned, recipe=HealingRecipe(**mixed, **budget))
        assert whole.outcome.text.corpora[1].sha256() == own.sha256()
        for one, other in zip(healed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, other)
    healed.save(tmp_path / "out")
    assert not keep.exists()


@pytest.mark.parametrize("data", ["@dense", "@dense:0.2,@dense:0.3,a.txt:0.5"])
def test_nothing_to_go_on_from_is_refused(data: str) -> None:
    with pytest.raises(RecipeError, match="stands once, beside corpora"):
        HealingRecipe(data=data)


# Two healed checkpoints


def literal_slerp(first: Any, second: Any, t: float) -> torch.Tensor:
    """The formula, a number at a time."""
    a, b = first.flatten().tolist(), second.flatten().tolist()
    dot, lengths = math.fsum(map(operator.mul, a, b)), math.hypot(*a) * math.hypot(*b)
    theta = math.acos(min(1.0, max(-1.0, dot / lengths))) if lengths else 0.0
    if math.sin(theta) < 1e-4:
        found = [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    else:
        left, right = math.sin((1 - t) * theta), math.sin(t * theta)
        found = [(left * x + right * y) / math.sin(theta) for x, y in zip(a, b, strict=True)]
    return torch.tensor(found).reshape(first.shape)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_the_formula(t: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    for first, second in ((a, b), (a, 3 * a), (a, a + 1e-6), (a, -a), (a, 0 * a), (0 * a, 0 * a)):
        torch.testing.assert_close(slerp(first, second, t), literal_slerp(first, second, t))
    arc = slerp(a / a.norm(), b / b.norm(), t)
    assert float(arc.norm()) == pytest.approx(1.0, abs=1e-5)  # the chord's middle is shorter


@pytest.fixture(scope="module")
def healed_twice(
    tmp_path_factory: pytest.TempPathFactory,
    pruned: Any,
    trained_llama: Any,
    chat_tokenizer: Any,
    some_text: list[str],
) -> Path:
    folder = tmp_path_factory.mktemp("twice")
    trained_llama.save_pretrained(folder / "dense")
    chat_tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("\n\n".join(some_text))
    for seed in (1, 2):
        choices = {**SMALL, "tokens": "600", "seed": seed, "train": "operator+suffix"}
        ghostlayers.heal(pruned, data=some_text, **choices).save(folder / f"healed-{seed}")
    pruned.save(folder / "cut")
    return folder


def merge(folder: Path, t: float | None, **changes: Any) -> Any:
    recipe = HealingRecipe(
        held_out=str(folder / "text.txt"), sequence_length=48, held_out_windows=4
    )
    given = {"first": folder / "healed-1", "second": folder / "healed-2", **changes}
    return ghostlayers.merge(**given, against=folder / "dense", recipe=recipe, t=t)


def test_every_weight_of_a_merged_model_lies_between(healed_twice: Path, tmp_path: Path) -> None:
    made = merge(healed_twice, 0.3)
    parents = [
        dict(AutoModelForCausalLM.from_pretrained(healed_twice / f"healed-{n}").named_parameters())
        for n in (1, 2)
    ]
    moved = 0
    for name, each in made.model.named_parameters():
        first, second = parents[0][name].detach(), parents[1][name].detach()
        torch.testing.assert_close(each, literal_slerp(first, second, 0.3), rtol=1e-4, atol=1e-6)
        moved += not torch.equal(first, second)
    assert moved > 10
    assert made.save(tmp_path / "merged").identical
    record = ghostlayers.inspect(tmp_path / "merged")
    row = record["merged"]
    assert [Path(each["checkpoint"]).name for each in row["parents"]] == ["healed-1", "healed-2"]
    assert all(each["healing"]["trained"] == ["operator", "suffix"] for each in row["parents"])
    assert "healing" not in record
    assert (row["kept"], row["t"]) == ("merged", 0.3)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "`healed-1` and `healed-2`, were merged" in card
    assert "0.3 of the way" in card


@pytest.mark.slow
def test_the_best_of_both_and_what_lies_between_is_kept(healed_twice: Path) -> None:
    made = merge(healed_twice, None)
    assert sorted(t for _, t in made.losses) == [0.0, *TRIED, 1.0]
    best = min(made.losses, key=lambda each: made.losses[each].kl_nats)
    assert (made.kept, made.t) == best
    worse = merge(healed_twice, None, second=healed_twice / "cut")  # not healed at all
    least = min(worse.losses, key=lambda each: worse.losses[each].kl_nats)
    assert (worse.kept, worse.t) == least
    ends = {who: sums.kl_nats for (who, _), sums in worse.losses.items()}
    assert ends["first"] < ends["second"]
    again = merge(healed_twice, None, first=healed_twice / "cut", second=healed_twice / "healed-1")
    assert again.losses["second", 1.0].kl_nats == pytest.approx(ends["first"])


def test_a_parent_that_is_better_alone_is_kept(
    healed_twice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostlayers.merged.slerp", lambda a, b, t: a * 5)
    made = merge(healed_twice, None)
    assert made.kept in ("first", "second")
    number = 1 if made.kept == "first" else 2
    parent = AutoModelForCausalLM.from_pretrained(healed_twice / f"healed-{number}")
    for one, other in zip(made.model.parameters(), parent.parameters(), strict=True):
        assert torch.equal(one, other)
    assert made.record["healing"] == made.cut.record["healing"]


@pytest.mark.slow
def test_what_is_not_of_one_cut_is_refused(
    healed_twice: Path,
    trained_llama: Any,
    chat_tokenizer: Any,
    some_text: list[str],
    tmp_path: Path,
) -> None:
    others = {"remove": {**PRUNE, "remove": "2-3"}, "repair": {**PRUNE, "repair": "joint:x+z"}}
    for name, choices in others.items():
        ghostlayers.prune(
            trained_llama,
            tokenizer=chat_tokenizer,
            data=some_text,
            **{"repair": "ghost", **choices},
        ).save(tmp_path / name)
    with pytest.raises(ModelError, match=r"\[3, 5\), the other \[2, 4\)"):
        merge(healed_twice, 0.5, second=tmp_path / "remove")
    with pytest.raises(ModelError, match="repaired by 'ghost', the other by 'joint:x"):
        merge(healed_twice, 0.5, second=tmp_path / "repair")


@pytest.mark.slow
def test_the_command_merges(healed_twice: Path, tmp_path: Path) -> None:
    command = (
        "merge", healed_twice / "healed-1", healed_twice / "healed-2", "--against",
        healed_twice / "dense", "-o", tmp_path / "out", "--held-out", healed_twice / "text.txt",
        "--sequence-length", 48, "--held-out-windows", 4,
    )  # fmt: skip
    done = run(*command, "--slerp", "0.5")
    assert done.exit_code == 0, done.output
    assert "at 0.5 of the way" in " ".join(done.output.split())
    shown = run("inspect", tmp_path / "out")
    assert "Merged healed-1 (first) and healed-2 (second)" in " ".join(shown.output.split())
    again = run(*command)
    assert again.exit_code == 1
    assert "exists" in again.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"command: merge\nfirst: {healed_twice / 'healed-1'}\nsecond: {healed_twice / 'healed-2'}\n"
        f"against: {healed_twice / 'dense'}\noutput: {tmp_path / 'same'}\nslerp: 0.5\n"
        f"held-out: {healed_twice / 'text.txt'}\nsequence-length: 48\nheld-out-windows: 4\n"
    )
    same = run("run", recipe)
    assert same.exit_code == 0, same.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "same")]
    assert weights[0] == weights[1]
    wrong = run(*command, "--overwrite", "--slerp", "2")
    assert wrong.exit_code == 2
    assert "expected 'auto' or a share" in " ".join(wrong.output.split())
    without = run(*command[:-6], "--overwrite")
    assert without.exit_code == 2
    assert "--held-out TEXT" in without.output
