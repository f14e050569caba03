"""Windows: what they hold, who they belong to, and which of them are drawn."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghostlayers import preparation
from ghostlayers.errors import CorpusError, WindowError
from ghostlayers.recipe import Recipe
from ghostlayers.runtime.progress import shown_by
from ghostlayers.text import corpora, raw, token_streams, tokenizing
from ghostlayers.text.corpora import Corpus, document_hash
from ghostlayers.text.tokens import (
    check_sequence_length,
    draw_windows,
    make_windows,
    tokenize,
    uses_bos,
)

BOS = 1


@pytest.fixture
def corpus(some_text):
    return Corpus("some text", tuple(some_text))


def ids_of(tokenizer, corpus):
    return tokenizer(corpus.joined(), add_special_tokens=False, verbose=False)["input_ids"]


# What windows hold


@pytest.mark.parametrize("length", [2, 50, 64])
def test_windows_do_not_overlap_and_rebuild_the_text(byte_tokenizer, corpus, length):
    windows = make_windows(corpus, byte_tokenizer, sequence_length=length)
    text = corpus.joined()
    assert windows.input_ids.shape == (len(text) // length, length)
    assert byte_tokenizer.decode(windows.input_ids.flatten()) == text[: len(windows) * length]
    assert len(text) - windows.input_ids.numel() < length


def test_windows_with_bos_rebuild_the_text_too(bos_tokenizer, corpus):
    windows = make_windows(corpus, bos_tokenizer, sequence_length=64)
    text = corpus.joined()
    assert len(windows) == len(text) // 63
    assert bos_tokenizer.decode(windows.input_ids[:, 1:].flatten()) == text[: len(windows) * 63]


def test_windows_with_bos_hold_one_token_less_of_text(bos_tokenizer, corpus):
    windows = make_windows(corpus, bos_tokenizer, sequence_length=64)
    assert windows.input_ids.shape[1] == windows.sequence_length == 64
    assert (windows.input_ids[:, 0] == BOS).all()


def test_bos_is_never_doubled(bos_tokenizer, corpus):
    assert bos_tokenizer("a")["input_ids"][0] == BOS
    windows = make_windows(corpus, bos_tokenizer, sequence_length=64)
    assert int((windows.input_ids == BOS).sum()) == len(windows)


def test_the_first_windows_come_first(byte_tokenizer, corpus):
    every = make_windows(corpus, byte_tokenizer, sequence_length=64)
    few = make_windows(corpus, byte_tokenizer, sequence_length=64, count=5)
    assert torch.equal(few.input_ids, every.input_ids[:5])
    assert (len(few), few.available) == (5, len(every))


def test_more_first_windows_than_there_are_gives_all(byte_tokenizer, corpus):
    windows = make_windows(corpus, byte_tokenizer, sequence_length=64, count=10**6)
    assert len(windows) == windows.available


def test_split_windows_rejoin(byte_tokenizer, corpus):
    windows = make_windows(corpus, byte_tokenizer, sequence_length=64, count=10, seed=0)
    first, others = windows.split_at(7)
    assert (len(first), len(others)) == (7, 3)
    assert torch.equal(torch.cat([first.input_ids, others.input_ids]), windows.input_ids)
    assert torch.equal(windows.first(7).input_ids, first.input_ids)


# Whether windows start with BOS


@pytest.mark.parametrize(
    ("policy", "adds_bos", "expected"),
    [("auto", True, True), ("auto", False, False), ("always", True, True), ("never", True, False)],
)
def test_bos_policy(policy, adds_bos, expected, byte_tokenizer, bos_tokenizer, corpus):
    tokenizer = bos_tokenizer if adds_bos else byte_tokenizer
    windows = make_windows(corpus, tokenizer, sequence_length=64, bos=policy)
    assert windows.bos is expected
    assert bool((windows.input_ids[:, 0] == BOS).all()) is expected
    words = "BOS before each window" if expected else "no BOS"
    assert windows.describe_bos() == words


def test_always_needs_such_a_token(byte_tokenizer):
    with pytest.raises(WindowError) as caught:
        uses_bos(byte_tokenizer, "always")
    assert str(caught.value) == (
        "the tokenizer has no beginning-of-sequence token; use --bos auto."
    )


def test_auto_ignores_a_token_that_the_tokenizer_does_not_add(byte_tokenizer):
    class Named:
        bos_token_id = BOS

        def __call__(self, *args, **kwargs):
            return byte_tokenizer(*args, **kwargs)

    assert not uses_bos(Named(), "auto")
    assert uses_bos(Named(), "always")


# Random windows


def positions(windows, every):
    """Where in the text each window lies, found by its content."""
    place = {tuple(row): index for index, row in enumerate(every.input_ids.tolist())}
    assert len(place) == len(every), "the test's windows must all differ"
    return [place[tuple(row)] for row in windows.input_ids.tolist()]


def test_the_same_seed_draws_the_same_windows(byte_tokenizer, corpus):
    one, two = (
        make_windows(corpus, byte_tokenizer, sequence_length=64, count=20, seed=3) for _ in "ab"
    )
    assert torch.equal(one.input_ids, two.input_ids)
    assert one.documents == two.documents


def test_another_seed_draws_others(byte_tokenizer, corpus):
    one, two = (
        make_windows(corpus, byte_tokenizer, sequence_length=64, count=20, seed=seed)
        for seed in (3, 4)
    )
    assert not torch.equal(one.input_ids, two.input_ids)


def test_drawing_does_not_touch_the_global_generator(byte_tokenizer, corpus):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_windows(corpus, byte_tokenizer, sequence_length=64, count=20, seed=3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_window_is_drawn_twice(byte_tokenizer, corpus, seed):
    every = make_windows(corpus, byte_tokenizer, sequence_length=64)
    drawn = make_windows(corpus, byte_tokenizer, sequence_length=64, count=len(every), seed=seed)
    places = positions(drawn, every)
    assert sorted(places) == list(range(len(every)))
    assert places != sorted(places)


# Which documents they touch


def touched(corpus, starts, length):
    """Documents whose characters (their separator included) meet any of the windows."""
    hashes, begin = [], 0
    for document in corpus.documents:
        end = begin + len(document) + len(corpus.separator)
        if any(begin < start + length and start < end for start in starts):
            hashes.append(document_hash(document))
        begin = end
    return tuple(hashes)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_exactly_the_touched_documents_are_named(
    byte_tokenizer, bos_tokenizer, corpus, seed, adds_bos
):
    tokenizer = bos_tokenizer if adds_bos else byte_tokenizer
    every = make_windows(corpus, tokenizer, sequence_length=64)
    drawn = make_windows(corpus, tokenizer, sequence_length=64, count=8, seed=seed)
    body = 63 if adds_bos else 64
    starts = [index * body for index in positions(drawn, every)]
    assert drawn.documents == touched(corpus, starts, body)
    assert 0 < len(drawn.documents) < len(corpus.documents)


def test_the_first_windows_name_the_first_documents(byte_tokenizer):
    corpus = Corpus("short", ("a" * 10, "b" * 10, "c" * 10), "")
    windows = make_windows(corpus, byte_tokenizer, sequence_length=5, count=3)
    assert windows.documents == (document_hash("a" * 10), document_hash("b" * 10))


def test_a_dropped_rest_belongs_to_no_window(byte_tokenizer):
    corpus = Corpus("short", ("a" * 10, "b" * 9), "")
    windows = make_windows(corpus, byte_tokenizer, sequence_length=10)
    assert windows.documents == (document_hash("a" * 10),)


def test_blank_documents_are_nobodys(byte_tokenizer):
    corpus = Corpus("gaps", ("a" * 10, "   ", "", "b" * 10))
    windows = make_windows(corpus, byte_tokenizer, sequence_length=2)
    assert windows.documents == (document_hash("a" * 10), document_hash("b" * 10))


def test_equal_documents_are_named_once(byte_tokenizer):
    corpus = Corpus("twins", ("a" * 10, "a" * 10))
    windows = make_windows(corpus, byte_tokenizer, sequence_length=5)
    assert windows.documents == (document_hash("a" * 10),)


def test_a_tokenizer_without_offsets_names_all_documents(byte_tokenizer, corpus):
    class Slow:
        is_fast = False
        bos_token_id = None

        def __call__(self, text, *, return_offsets_mapping=False, **kwargs):
            assert not return_offsets_mapping
            return byte_tokenizer(text, **kwargs)

    windows = make_windows(corpus, Slow(), sequence_length=64, count=2)
    assert windows.documents == tuple(map(document_hash, corpus.documents))


def test_every_token_belongs_to_the_document_it_begins_in(byte_tokenizer):
    corpus = Corpus("two", ("ab", "c"), "--")
    stream = tokenize(corpus, byte_tokenizer)
    assert stream.ids.tolist() == ids_of(byte_tokenizer, corpus)
    assert stream.owners.tolist() == [0, 0, 0, 0, 1]


# Refusals


def test_text_without_tokens_is_refused(byte_tokenizer):
    with pytest.raises(CorpusError) as caught:
        make_windows(Corpus("nothing", ("",)), byte_tokenizer, sequence_length=4)
    assert str(caught.value) == "the tokenizer makes no tokens of corpus 'nothing'."


def test_text_shorter_than_a_window_is_refused(byte_tokenizer):
    with pytest.raises(WindowError) as caught:
        make_windows(Corpus("short", ("abc",)), byte_tokenizer, sequence_length=4)
    assert str(caught.value) == (
        "corpus 'short' has 3 tokens, less than one window of 4; give more text or a shorter "
        "--sequence-length."
    )


def test_fewer_random_windows_than_asked_are_refused(byte_tokenizer):
    corpus = Corpus("short", ("a" * 100,))
    with pytest.raises(WindowError) as caught:
        make_windows(corpus, byte_tokenizer, sequence_length=10, count=11, seed=0)
    assert str(caught.value) == (
        "corpus 'short' gives 10 windows of 10 tokens, 11 are needed; give more text, fewer "
        "--windows, or a shorter --sequence-length."
    )


def test_all_random_windows_may_be_asked_for(byte_tokenizer):
    corpus = Corpus("short", ("a" * 100,))
    assert len(make_windows(corpus, byte_tokenizer, sequence_length=10, count=10, seed=0)) == 10


def test_windows_beyond_the_positions_are_refused_with_the_longest_that_works():
    with pytest.raises(WindowError) as caught:
        check_sequence_length(SimpleNamespace(max_position_embeddings=128), 129)
    assert str(caught.value) == (
        "windows of 129 tokens exceed the model's 128 positions; the longest that works is "
        "--sequence-length 128."
    )


@pytest.mark.parametrize("length", [1, 0, -3])
def test_windows_that_predict_nothing_are_refused(length):
    with pytest.raises(WindowError) as caught:
        check_sequence_length(SimpleNamespace(max_position_embeddings=128), length)
    assert str(caught.value) == (f"a window of {length} tokens predicts nothing; use at least 2.")


@pytest.mark.parametrize(("positions", "length"), [(128, 128), (128, 2), (None, 10**6)])
def test_windows_that_fit_pass(positions, length):
    check_sequence_length(SimpleNamespace(max_position_embeddings=positions), length)


def test_a_config_without_positions_takes_any_length():
    check_sequence_length(SimpleNamespace(), 10**6)


# Sampling


def drawn(
    corpus: Corpus, tokenizer: Any, sampling: str, seed: int = 0, **more: Any
) -> tuple[Any, Any]:
    wanted = {"sequence_length": 32, "count": 6, "held_out": 2, **more}
    return draw_windows(corpus, tokenizer, seed=seed, sampling=sampling, **wanted)


@pytest.fixture
def pages(some_text: list[str]) -> Corpus:
    """Documents of many lengths, some shorter than a window."""
    return Corpus("pages", tuple(text[: 5 + 23 * i] for i, text in enumerate(some_text)))


@pytest.mark.parametrize("sampling", ["grid", "random", "single-document"])
@pytest.mark.parametrize("seed", range(5))
def test_held_out_windows_share_no_token_with_the_others(
    pages: Corpus, byte_tokenizer: Any, sampling: str, seed: int
) -> None:
    numbered = Corpus("n", tuple(f"{i:06d}" for i in range(900)), separator="\n")
    corpus = pages if sampling == "single-document" else numbered
    calibration, held_out = drawn(corpus, byte_tokenizer, sampling, seed)
    assert calibration.input_ids.shape == (6, 32)
    assert held_out.input_ids.shape == (2, 32)
    again = drawn(corpus, byte_tokenizer, sampling, seed)
    assert torch.equal(again[0].input_ids, calibration.input_ids)
    assert torch.equal(again[1].input_ids, held_out.input_ids)
    if sampling != "single-document":
        lines = [set(byte_tokenizer.decode(row).split("\n")[1:-1]) for row in held_out.input_ids]
        for row in calibration.input_ids:
            mine = set(byte_tokenizer.decode(row).split("\n")[1:-1])
            assert not any(mine & line for line in lines)


@pytest.mark.parametrize("seed", range(5))
def test_every_window_of_a_single_document_lies_in_one(
    pages: Corpus, byte_tokenizer: Any, seed: int
) -> None:
    calibration, held_out = drawn(pages, byte_tokenizer, "single-document", seed)
    owners = []
    for row in [*calibration.input_ids, *held_out.input_ids]:
        inside = [i for i, text in enumerate(pages.documents) if byte_tokenizer.decode(row) in text]
        owners.append(inside)
        assert inside
    names = {document_hash(pages.documents[i]) for row in owners for i in row}
    assert set(calibration.documents) <= names
    assert len(calibration.documents) == 8  # each window from a document of its own


@pytest.mark.slow
def test_random_offsets_are_not_those_of_a_grid(pages: Corpus, byte_tokenizer: Any) -> None:
    stream = tokenize(pages, byte_tokenizer)
    calibration, held_out = drawn(pages, byte_tokenizer, "random", count=40)
    starts = {
        start
        for row in calibration.input_ids
        for start in range(len(stream.ids) - 31)
        if torch.equal(stream.ids[start : start + 32], row)
    }
    assert {start % 32 for start in starts} != {0}
    border = int(0.9 * len(stream.ids))
    assert max(starts) + 32 <= border or min(starts) + 32 <= border
    assert len(held_out) == 2


def test_windows_to_spare_are_taken_as_far_as_the_text_goes(
    pages: Corpus, byte_tokenizer: Any
) -> None:
    whole = len(make_windows(pages, byte_tokenizer, sequence_length=32))
    _, held_out = drawn(pages, byte_tokenizer, "grid", spare=5)
    assert len(held_out) == 7
    _, held_out = drawn(pages, byte_tokenizer, "grid", spare=10**6)
    assert len(held_out) == whole - 6


@pytest.mark.parametrize(
    ("sampling", "what"),
    [
        ("grid", r"gives \d+ windows of 32 tokens, 1000002 are needed"),
    ],
)
def test_too_short_a_text_says_what_it_has(
    pages: Corpus, byte_tokenizer: Any, sampling: str, what: str
) -> None:
    with pytest.raises(WindowError, match=what):
        drawn(pages, byte_tokenizer, sampling, count=10**6)


def test_documents_serve_again_where_there_are_too_few(pages: Corpus, byte_tokenizer: Any) -> None:
    long = [text for text in pages.documents if len(byte_tokenizer(text)["input_ids"]) > 32]
    calibration, held_out = drawn(pages, byte_tokenizer, "single-document", count=200, held_out=30)
    assert (len(calibration), len(held_out)) == (200, 30)

    def owners(windows: Any) -> set[str]:
        texts = [byte_tokenizer.decode(row) for row in windows.input_ids]
        return {text for text in long if any(part in text for part in texts)}

    assert not any(
        byte_tokenizer.decode(row) in byte_tokenizer.decode(other)
        for row in held_out.input_ids
        for other in calibration.input_ids
    )
    assert owners(calibration) | owners(held_out) == set(long)


@pytest.mark.parametrize(("held_out", "what"), [(0, "one is needed"), (2, "two are needed")])
def test_documents_that_are_all_short_are_refused(
    byte_tokenizer: Any, held_out: int, what: str
) -> None:
    short = Corpus("short", ("x" * 20, "y" * 30) + ("z" * 90,) * bool(held_out))
    with pytest.raises(WindowError, match=rf"has {bool(held_out):d} documents longer .* {what}"):
        drawn(short, byte_tokenizer, "single-document", held_out=held_out)


def test_random_offsets_need_room_for_held_out_windows(byte_tokenizer: Any) -> None:
    short = Corpus("short", ("x" * 200,))
    with pytest.raises(WindowError, match="the last 20 of them for held-out windows"):
        drawn(short, byte_tokenizer, "random")
    calibration, held_out = drawn(short, byte_tokenizer, "random", held_out=0)
    assert (len(calibration), len(held_out)) == (6, 0)


@pytest.mark.parametrize("sampling", ["grid", "random", "single-document"])
def test_every_sampling_knows_a_beginning_of_sequence(
    pages: Corpus, bos_tokenizer: Any, sampling: str
) -> None:
    calibration, held_out = drawn(pages, bos_tokenizer, sampling)
    assert calibration.bos
    for windows in (calibration, held_out):
        assert windows.input_ids.shape[1] == 32
        assert set(windows.input_ids[:, 0].tolist()) == {1}


# Large sources


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so low that small sources are large ones."""
    for module in (raw, preparation):
        monkeypatch.setattr(module, "WHOLE", 3000)
    monkeypatch.setattr(corpora, "DRAWN", 3000)
    monkeypatch.setattr(raw, "BLOCK", 1024)
    monkeypatch.setattr(raw, "_LOOK", 128)
    monkeypatch.setattr(tokenizing, "PIECE", 500)
    monkeypatch.setattr(tokenizing, "OVERLAP", 100)


@pytest.fixture
def numbered() -> list[str]:
    """Documents of which any stretch of a window's length occurs once."""
    return [" ".join(f"{n}.{k:02d}" for k in range(60)) for n in range(1000, 1400)]


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents))
    else:
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def calibrate(path: Path, tokenizer: Any, **choices: Any) -> tuple[Corpus, Any, Any]:
    wanted = {"windows": 6, "held_out_windows": 3, "sequence_length": 32, "layers": 1, **choices}
    rows = SimpleNamespace(weight=torch.empty(len(tokenizer), 1))
    model = SimpleNamespace(get_input_embeddings=lambda: rows)
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, network=model)
    return preparation.read_calibration(loaded, Recipe(**wanted), path)


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("sampling", ["grid", "random", "single-document"])
@pytest.mark.parametrize("seed", range(3))
def test_windows_of_a_large_source(
    tmp_path: Path, small_bounds: None, numbered: list[str], byte_tokenizer: Any, ending: str,
    sampling: Any, seed: int,
) -> None:  # fmt: skip
    path = write(tmp_path / f"a{ending}", numbered)
    corpus, calibration, held_out = calibrate(path, byte_tokenizer, seed=seed, sampling=sampling)
    again = calibrate(path, byte_tokenizer, seed=seed, sampling=sampling)
    assert torch.equal(calibration.input_ids, again[1].input_ids)
    assert torch.equal(held_out.input_ids, again[2].input_ids)
    assert (len(calibration), calibration.available, corpus.complete) == (6, None, False)
    whole = "\n\n".join(numbered)
    texts = [byte_tokenizer.decode(row) for row in calibration.input_ids]
    others = [byte_tokenizer.decode(row) for row in held_out.input_ids]
    drawn = corpus.joined()
    assert all(text in drawn for text in texts + others)
    inside = [text for text in texts + others if text in whole]
    assert len(inside) > 0.7 * len(texts + others)  # the rest cross a joint of drawn documents
    words = [set(text.split(" ")[1:-1]) for text in texts]
    for text in others:
        assert not any(set(text.split(" ")[1:-1]) & mine for mine in words)
    assert calibration.preview == texts[0][:200]
    assert set(calibration.documents) <= set(map(document_hash, corpus.documents))


def test_another_seed_draws_other_documents(
    tmp_path: Path, small_bounds: None, numbered: list[str], byte_tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl", numbered)
    one, two = (set(calibrate(path, byte_tokenizer, seed=seed)[1].documents) for seed in (0, 1))
    assert len(one & two) < 0.4 * len(one)


def test_more_is_drawn_until_the_windows_are_full(
    tmp_path: Path, small_bounds: None, byte_tokenizer: Any
) -> None:
    texts = ["x" * 20 + str(n) for n in range(1000)]
    texts[::100] = [f"{n} " * 40 for n in range(10)]
    path = write(tmp_path / "a.jsonl", texts)
    _, calibration, held_out = calibrate(path, byte_tokenizer, sampling="single-document")
    assert len(calibration) == 6
    assert len(held_out) >= 3
    with pytest.raises(WindowError, match="has 0 documents longer"):
        calibrate(write(path, texts[1:50]), byte_tokenizer, sampling="single-document")


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_the_first_windows_of_a_large_source_are_those_of_the_whole(
    tmp_path: Path, small_bounds: None, numbered: list[str], byte_tokenizer: Any, ending: str
) -> None:
    path = write(tmp_path / f"a{ending}", numbered)
    common: Any = {"separator": "\n\n", "text_column": None, "sequence_length": 50, "bos": "auto"}
    corpus, few = preparation.read_evaluation(path, byte_tokenizer, max_windows=9, **common)
    every_corpus, every = preparation.read_evaluation(
        path, byte_tokenizer, max_windows=None, **common
    )
    assert (corpus.complete, few.available) == (False, None)
    assert (every_corpus.complete, every.available) == (True, len(every))
    assert torch.equal(few.input_ids, every.input_ids[:9])
    assert byte_tokenizer.decode(every.input_ids.flatten()) in "\n\n".join(numbered)
    assert few.documents == every.documents[: len(few.documents)]
    assert sum(map(len, corpus.documents)) < 5000


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_what_served_as_calibration_is_known_in_evaluation(
    tmp_path: Path, small_bounds: None, numbered: list[str], byte_tokenizer: Any, ending: str
) -> None:
    path = write(tmp_path / f"a{ending}", numbered)
    _, calibration, _ = calibrate(path, byte_tokenizer)
    _, every = preparation.read_evaluation(
        path, byte_tokenizer, separator="\n\n", text_column=None, sequence_length=32,
        max_windows=None, bos="auto",
    )  # fmt: skip
    assert set(calibration.documents) <= set(every.documents)


def test_a_bar_is_shown_where_tokenising_takes_long(
    byte_tokenizer: Any, corpus: Corpus, small_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[list[Any]] = []

    class Watched:
        @contextlib.contextmanager
        def stage(self, description: str, total: int) -> Iterator[Any]:
            stages.append([description, total, 0])

            def advance(units: int = 1) -> None:
                stages[-1][2] += units

            yield advance

    with shown_by(Watched()):
        tokenize(corpus, byte_tokenizer)
    assert stages == []
    monkeypatch.setattr(token_streams, "SHOWN_FROM", 1000)
    with shown_by(Watched()):
        tokenize(corpus, byte_tokenizer)
    ((description, total, done),) = stages
    assert (description, total) == ("Tokenising the text", sum(map(len, corpus.documents)))
    assert 0.9 * total < done <= total
