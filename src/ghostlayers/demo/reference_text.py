"""Text that every CPython carries: the language reference behind ``help()``, 465 kB of English.

Topics quote each other (the one on assignment holds the one on augmented assignment), so topics
that share a paragraph are kept together when the text is split.
"""

import importlib
from collections import defaultdict

from ghostlayers.text.corpora import Corpus

HELD_OUT_SHARE = 0.2
SHARED_PARAGRAPH = 60
"""Characters from which a common paragraph ties two topics together."""


def split_topics() -> tuple[Corpus, Corpus]:
    """Calibration and held-out text that share no topic and no paragraph."""
    topics: dict[str, str] = dict(importlib.import_module("pydoc_data.topics").topics)
    groups = group_topics(topics)
    total = sum(map(len, topics.values()))
    held_out: list[str] = []
    size = 0
    for group in sorted(groups, key=lambda group: (sum(len(topics[n]) for n in group), group)):
        if size >= HELD_OUT_SHARE * total:
            break
        held_out.extend(group)
        size += sum(len(topics[name]) for name in group)
    apart = set(held_out)
    calibration = tuple(topics[name] for name in sorted(topics) if name not in apart)
    source = "pydoc_data.topics of the running Python"
    return (
        Corpus("python-reference", calibration, source=source),
        Corpus("python-reference-held-out", tuple(topics[n] for n in sorted(apart)), source=source),
    )


def group_topics(topics: dict[str, str]) -> list[tuple[str, ...]]:
    """Topics tied together by common paragraphs, as connected components."""
    leader = {name: name for name in topics}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}
    for name, text in topics.items():
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= SHARED_PARAGRAPH:
                leader[find(name)] = find(first_with.setdefault(key, name))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in topics:
        groups[find(name)].append(name)
    return [tuple(sorted(group)) for group in groups.values()]
