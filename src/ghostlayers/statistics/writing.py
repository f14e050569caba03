"""What texts say of the model that wrote them: repetition, loops, agreement, variety.

Pure functions of tokens and words; no model.
"""

import re
from collections import Counter
from collections.abc import Sequence

LONGEST_PERIOD = 16
LEAST_REPEATS = 3
"""A text loops if it ends in at most so many tokens said at least so many times."""

SAME_ROUGE = 0.458
"""ROUGE-1 above which two texts say the same, where no judge is at hand (NoveltyBench)."""

FEW_WORDS = 5
"""Texts of at most so many words are compared by the share of words that they have in common."""


def repeated_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Seq-rep-n: the share of a text's n-grams that stood in it before, 0 to 1.

    1 - unique / total; 0 for a text of fewer than n tokens. Welleck et al., Neural Text Generation
    with Unlikelihood Training, arXiv:1908.04319.

    Args:
        tokens: the text.
        n: tokens of an n-gram.
    """
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop_start(
    tokens: Sequence[int], period: int = LONGEST_PERIOD, repeats: int = LEAST_REPEATS
) -> int | None:
    """Where the loop begins that a text ends in; None if it ends in none.

    A suffix has period p if each of its tokens equals the one p later. It is a loop if it holds p
    tokens at least ``repeats`` times; of several the one that begins first counts.

    Args:
        tokens: the text.
        period: the longest p that is looked for.
        repeats: how often p tokens must be said, the first time included; at least 2.

    Returns:
        The number of tokens before the loop.
    """
    starts = (_periodic_from(tokens, p, repeats) for p in range(1, period + 1))
    return min((start for start in starts if start is not None), default=None)


def _periodic_from(tokens: Sequence[int], p: int, repeats: int) -> int | None:
    start = max(len(tokens) - p, 0)
    while start > 0 and tokens[start - 1] == tokens[start - 1 + p]:
        start -= 1
    return start if len(tokens) - start >= p * repeats else None


def agreement_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Tokens before two texts differ for the first time; the shorter one's length if they do not.

    Args:
        tokens: a text.
        others: another.
    """
    pairs = zip(tokens, others, strict=False)
    differ = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(differ, min(len(tokens), len(others)))


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: the unigrams of ROUGE-1.

    Where words are not parted by spaces a sentence is one word, and texts seem to differ more.
    """
    return re.findall(r"\w+", text.lower())


def rouge_1(words: Sequence[str], others: Sequence[str]) -> float:
    """ROUGE-1: harmonic mean of the shares of either text's words that the other has, 0 to 1.

    Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004).

    Args:
        words: of a text.
        others: of another.
    """
    shared = (Counter(words) & Counter(others)).total()
    return 2 * shared / max(len(words) + len(others), 1)


def say_the_same(words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two texts count as one of NoveltyBench's classes (arXiv:2504.05228).

    Two texts of at most `FEW_WORDS` words do if they share half of the longer one's words, longer
    ones if their ROUGE-1 is above `SAME_ROUGE`.

    Args:
        words: of a text.
        others: of another.
    """
    longer = max(len(words), len(others))
    if longer <= FEW_WORDS:
        return 2 * len(set(words) & set(others)) >= longer
    return rouge_1(words, others) > SAME_ROUGE


def distinct(texts: Sequence[str]) -> int:
    """Distinct@k: into how many classes k samples fall, each joining the first class that fits.

    A class is known by its first text. More is not better by itself: noise is distinct, too.

    Args:
        texts: k answers to one prompt.
    """
    classes: list[list[str]] = []
    for words in map(words_of, texts):
        if not any(say_the_same(words, known) for known in classes):
            classes.append(words)
    return len(classes)
