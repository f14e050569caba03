"""What is measured of texts: every metric against its definition, transcribed slowly."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostlayers.statistics.writing import (
    agreement_length,
    distinct,
    loop_start,
    repeated_ngrams,
    rouge_1,
    say_the_same,
    words_of,
)

TEXTS = st.lists(st.integers(0, 3), max_size=40)
WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=12)


@given(TEXTS, st.integers(1, 5))
def test_repetition_is_the_share_of_ngrams_seen_before(tokens: list[int], n: int) -> None:
    seen: list[list[int]] = []
    again = total = 0
    for start in range(len(tokens) - n + 1):
        gram = tokens[start : start + n]
        again += gram in seen
        total += 1
        seen.append(gram)
    assert repeated_ngrams(tokens, n) == pytest.approx(again / total if total else 0.0)


def loop_by_definition(tokens: list[int], period: int, repeats: int) -> int | None:
    """The first place from which all that follows has a short period, often enough."""
    for start in range(len(tokens)):
        rest = tokens[start:]
        for p in range(1, period + 1):
            if len(rest) >= p * repeats and all(rest[i] == rest[i % p] for i in range(len(rest))):
                return start
    return None


@given(TEXTS, st.integers(1, 6), st.integers(2, 4))
def test_a_loop_is_found_as_defined(tokens: list[int], period: int, repeats: int) -> None:
    assert loop_start(tokens, period, repeats) == loop_by_definition(tokens, period, repeats)


@given(st.integers(0, 30), st.integers(1, 16), st.integers(3, 5), st.integers(0, 15))
def test_a_planted_loop_begins_where_it_was_planted(
    before: int, period: int, repeats: int, more: int
) -> None:
    """No token stands twice before the loop or within a turn of it; the last turn may break off."""
    healthy, turn = list(range(before)), list(range(100, 100 + period))
    tokens = healthy + turn * repeats + turn[: more % period]
    assert loop_start(tokens) == before
    assert loop_start([*tokens, -1]) is None
    assert loop_start(healthy + turn * 2) is None


@given(TEXTS, TEXTS)
def test_agreement_ends_at_the_first_difference(tokens: list[int], others: list[int]) -> None:
    length = 0
    while length < min(len(tokens), len(others)) and tokens[length] == others[length]:
        length += 1
    assert agreement_length(tokens, others) == length
    assert agreement_length(tokens, tokens) == len(tokens)


@given(WORDS, WORDS)
def test_rouge_is_the_mean_of_recall_and_precision(words: list[str], others: list[str]) -> None:
    shared = sum(min(words.count(w), others.count(w)) for w in "abcdefgh")
    recall, precision = (shared / len(text) if text else 0.0 for text in (others, words))
    both = recall + precision
    assert rouge_1(words, others) == pytest.approx(2 * recall * precision / both if both else 0.0)


def same_by_definition(words: list[str], others: list[str]) -> bool:
    most = max(len(words), len(others))
    if most <= 5:
        return len([w for w in set(words) if w in others]) >= most / 2
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others)) > 0.458


@given(WORDS, WORDS)
def test_texts_are_the_same_as_defined(words: list[str], others: list[str]) -> None:
    assert say_the_same(words, others) == same_by_definition(words, others)
    assert say_the_same(words, others) == say_the_same(others, words)


@given(st.integers(0, 10_000))
def test_classes_are_those_of_a_greedy_partition(seed: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randint(0, 9))) for _ in range(10)]
    firsts: list[str] = []
    for text in texts:
        for first in firsts:
            if same_by_definition(text.split(), first.split()):
                break
        else:
            firsts.append(text)
    assert distinct(texts) == len(firsts)


def test_classes_by_hand() -> None:
    assert distinct(["Yes.", "yes", "No"]) == 2
    assert distinct(["The cat sat on the old mat", "A dog ran over that long hill"]) == 2
    assert distinct(["The cat sat on the old mat", "the cat sat on the new mat today"]) == 1
    assert distinct([]) == 0
    assert words_of("It's 3 o'clock, Ärger!") == ["it", "s", "3", "o", "clock", "ärger"]
