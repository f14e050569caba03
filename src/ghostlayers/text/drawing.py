"""Some of a text: its first documents, or some from anywhere, drawn by a seed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from random import Random

from ghostlayers.text import raw
from ghostlayers.text.sources import Document, Reader

_FILES = 16
"""Files of a folder that text is drawn from, for every `raw.WHOLE` characters of it."""


def take(documents: Iterable[Document], max_characters: int) -> tuple[list[Document], bool]:
    """Documents up to a number of characters, and whether they were all."""
    taken: list[Document] = []
    iterator = iter(chain.from_iterable(map(parts_of, documents)))
    count = 0
    for document in iterator:
        taken.append(document)
        count += len(document.text)
        if count >= max_characters:
            break
    return taken, not list(islice(iterator, 1))


def parts_of(document: Document) -> Iterator[Document]:
    """A document, in parts if it is very long."""
    text = document.text
    if len(text) <= raw.WHOLE:
        yield document
        return
    for begin in range(0, len(text), raw.BLOCK):
        part = text[begin : begin + raw.BLOCK]
        yield Document(part, document.continues or begin > 0, document.whole)


def draw(readers: Sequence[Reader], seed: int, characters: int) -> list[Document]:
    """Documents from anywhere in some files, from each as many as it is large."""
    random = _seeded(seed)
    numbers = _choose_files(readers, random, max(_FILES, _FILES * characters // raw.WHOLE))
    sizes = {number: readers[number].size() for number in numbers}
    drawn: list[Document] = []
    for number, size in sizes.items():
        share = math.ceil(characters * size / sum(sizes.values()))
        documents = readers[number].draw(_seeded(f"{seed} {number}"), share)
        parts = chain.from_iterable(_some_blocks(document, random, share) for document in documents)
        drawn.extend(take(parts, share)[0])
    random.shuffle(drawn)
    return drawn


def _seeded(seed: int | str) -> Random:
    """Random numbers that are the same on every machine."""
    return Random(seed)  # noqa: S311  nothing is secret


def _choose_files(readers: Sequence[Reader], random: Random, count: int) -> list[int]:
    """Some files, large ones rather than small ones, in order."""
    if len(readers) <= count:
        return list(range(len(readers)))
    keys = [
        (math.log(1.0 - random.random()) / max(1, reader.size()), number)
        for number, reader in enumerate(readers)
    ]
    return sorted(number for _, number in sorted(keys, reverse=True)[:count])


def _some_blocks(document: Document, random: Random, characters: int) -> list[Document]:
    """A document to draw from; of a very long one, some parts, so that it is not all there is."""
    parts = [part._replace(continues=False) for part in parts_of(document)]
    if len(parts) == 1:
        return parts
    random.shuffle(parts)
    return parts[: max(1, characters // (4 * raw.BLOCK))]
