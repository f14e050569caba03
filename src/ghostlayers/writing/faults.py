"""What is wrong with a written text, so that nothing is trained on it."""

import re
from collections.abc import Sequence

from ghostlayers.statistics.writing import loop_start

LONGEST_PERIOD, REPEATS = 32, 4
"""A text loops if it ends in so many repetitions of so many tokens at most."""

META = (
    r"\b(?:reference|given|provided|supplied|original) (?:answer|response|solution)s?\b",
    r"\b(?:answer|response|solution) (?:given|provided|supplied|above|below)\b",
    r"\bmy(?: own)? (?:answer|response|reply|wording|manner)\b",
    r"\byour(?: own)? (?:answer|response)\b",
    r"\bin (?:my|your) own (?:words|manner|style)\b",
    r"\b(?:as|per) (?:instructed|requested|your instructions?)\b",
    r"\b(?:restated|rephrased|reworded|paraphrased)\b",
    r"^\W*(?:your turn|sure\W+here)\b",
    r"<\|[^|>]{0,40}\|?>|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>",
    r"^\W*(?-i:User|Human|Assistant|System) ?:",
    r"^#{2,} ?(?:instruction|response|input|user|assistant)\b",
)
"""Words about the task instead of an answer, and marks of turns; lines are looked at one by one."""

_META = tuple(re.compile(phrase, re.IGNORECASE | re.MULTILINE) for phrase in META)


def loops(ids: Sequence[int]) -> bool:
    """Whether the last tokens are one stretch, again and again."""
    return loop_start(ids, LONGEST_PERIOD, REPEATS) is not None


def speaks_of_itself(text: str, asked: str) -> bool:
    """Whether an answer has words about the task that were not in what was asked.

    Args:
        text: the answer.
        asked: the prompt and the reference answer, whose own words are no sign of anything.
    """
    known = asked.lower()
    phrases = (match[0].strip().lower() for phrase in _META for match in phrase.finditer(text))
    return any(words not in known for words in phrases)


def fault_of(text: str, ids: Sequence[int], asked: str | None, *, ended: bool) -> str | None:
    """What is wrong with a text; None if nothing is.

    Args:
        text: what was written.
        ids: its tokens, without the one that ended it.
        asked: see `speaks_of_itself`; None of a continuation, which may break off and say anything.
        ended: whether the model ended it.
    """
    if not text.strip():
        return "empty"
    if loops(ids):
        return "loop"
    if asked is None:
        return None
    if not ended:
        return "unfinished"
    return "meta" if speaks_of_itself(text, asked) else None
