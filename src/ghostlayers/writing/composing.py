"""Writing all that is ordered, batch by batch, into a draft that a killed run goes on with."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostlayers.calibration.journal import digest
from ghostlayers.errors import CorpusError, OutputError, ResumeError, counted
from ghostlayers.recipe.writing import WritingRecipe
from ghostlayers.runtime import progress
from ghostlayers.writing.authors import Author
from ghostlayers.writing.faults import fault_of
from ghostlayers.writing.orders import Order

Said = tuple[str, str | None]
"""A text, and what is wrong with it."""

Row = dict[str, Any]

DENSE, REFERENCE, DROPPED = "dense", "reference", "dropped"
"""Who a row is from, if it is kept."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        rows: what is kept, in the order of the text: ``messages`` of a chat or ``text``, and
            ``from``, who wrote it.
        sources: how many rows are ``dense``, ``reference`` or ``dropped``.
        faults: of what the dense model wrote and what is not kept: how many by reason.
    """

    rows: tuple[Row, ...]
    sources: Mapping[str, int]
    faults: Mapping[str, int]

    def lines(self) -> str:
        """The rows as JSON lines."""
        return "".join(f"{to_line(row)}\n" for row in self.rows)


def to_line(value: Any) -> str:
    """One line of JSON; half a surrogate pair, which no file can hold, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class Draft:
    """What is written so far: the request in the first line, and a line a batch.

    Attributes:
        path: of the file; None to keep nothing.
        request: all that the words depend on.
    """

    path: Path | None
    request: Mapping[str, Any]

    def begin(self) -> list[list[Said]]:
        """The batches that are there already; what a kill cut off is forgotten.

        Raises:
            ResumeError: they are of another request.
            OutputError: the file cannot be written.
        """
        if self.path is None:
            return []
        asked = to_line({"request": digest(json.dumps(self.request, sort_keys=True, default=str))})
        try:
            there = self.path.read_bytes() if self.path.exists() else b""
            *whole, torn = there.split(b"\n")
            if torn:  # a kill came in between
                os.truncate(self.path, len(there) - len(torn))
        except OSError as error:
            raise OutputError(f"cannot write '{self.path}': {error.strerror}.") from error
        if not whole:
            self._append(asked)
            return []
        try:
            first, *batches = (line.decode() for line in whole)
            done = [[(text, fault) for text, fault in json.loads(line)] for line in batches]
        except (ValueError, TypeError):
            first, done = "", []
        if first != asked:
            raise ResumeError(
                f"'{self.path}' holds what an interrupted run of another request wrote (another "
                "text, model, setting or version). Repeat that request to go on with it, begin "
                "anew with --restart, or choose another output."
            )
        return done

    def add(self, batch: Sequence[Said]) -> None:
        """Have the disk hold one more batch.

        Raises:
            OutputError: it cannot.
        """
        if self.path is not None:
            self._append(to_line(batch))

    def _append(self, line: str) -> None:
        assert self.path is not None
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write '{self.path}': {error.strerror}.") from error


def compose(
    author: Author,
    recipe: WritingRecipe,
    orders: Sequence[Order],
    *,
    batch_size: int = 0,
    draft: Path | None = None,
) -> Written:
    """Have a model write what is ordered, and keep what is good.

    Args:
        author: the model.
        recipe: how it writes.
        orders: what.
        batch_size: texts at a time; 0 chooses.
        draft: where every finished batch is kept: the same call goes on from it, and ends with
            the same rows.

    Raises:
        ResumeError: the draft is of another request.
        CorpusError: nothing that was written is any good.
    """
    orders = [_within(order, author.positions, recipe.most_tokens) for order in orders]
    size = batch_size or author.batch
    draft_file = Draft(draft, _request(author, recipe, orders, size))
    batches, done = batches_of(orders, size), draft_file.begin()
    said: dict[int, Said] = {}
    title = f"Writing {counted(sum(map(len, batches)), 'text')}"
    with progress.stage(title, sum(map(len, batches))) as advance:
        for number, batch in enumerate(batches):
            if number < len(done):
                texts = done[number]
            else:
                texts = _write(author, recipe, [orders[n] for n in batch], recipe.seed + number)
                draft_file.add(texts)
            said.update(zip(batch, texts, strict=True))
            advance(len(batch))
    return _gather(orders, said)


def _within(order: Order, positions: int | None, new_tokens: int) -> Order:
    """An order; with a fault, if the model has not so many positions."""
    if positions is None or len(order.ids) + new_tokens <= positions or order.fault:
        return order
    return Order(order.ids, order.turns, order.reference, order.greedy, fault="long")


def _request(
    author: Author, recipe: WritingRecipe, orders: Sequence[Order], size: int
) -> dict[str, Any]:
    asked = [digest(repr((order.ids, order.turns, order.reference))) for order in orders]
    return {
        "writing": recipe.to_dict(),
        "author": author.identity,
        "text": digest(*asked),
        "batch_size": size,
    }


def batches_of(orders: Sequence[Order], size: int) -> list[list[int]]:
    """Numbers of orders that are written together: alike in length, and all greedy or none."""
    batches: list[list[int]] = []
    for greedy in (True, False):
        own = [n for n, order in enumerate(orders) if order.greedy is greedy and not order.fault]
        own.sort(key=lambda n: len(orders[n].ids))  # the longest last: what it takes only falls
        batches += [own[start : start + size] for start in range(0, len(own), size)]
    return batches


def _write(author: Author, recipe: WritingRecipe, batch: Sequence[Order], seed: int) -> list[Said]:
    heat = 0.0 if batch[0].greedy else recipe.heat
    sequences = author.write([order.ids for order in batch], recipe.most_tokens, heat, seed % 2**63)
    return [_read(author, order, ids) for order, ids in zip(batch, sequences, strict=True)]


def _read(author: Author, order: Order, ids: Sequence[int]) -> Said:
    """What an author's tokens say, and what is wrong with that."""
    ended = bool(ids) and ids[-1] in author.stops
    own = list(ids[:-1] if ended else ids)
    text = str(author.tokenizer.decode(own, skip_special_tokens=True))
    fault = fault_of(text, own, order.asked, ended=ended)
    if fault is not None:
        return "", fault
    if order.turns is None:
        whole = str(author.tokenizer.decode([*order.ids, *own], skip_special_tokens=True))
        return whole.strip("\ufffd"), None  # halves of characters, where a window was cut
    return text.strip(), None


def _gather(orders: Sequence[Order], said: Mapping[int, Said]) -> Written:
    rows: list[Row] = []
    sources: Counter[str] = Counter({DENSE: 0, REFERENCE: 0, DROPPED: 0})
    faults: Counter[str] = Counter()
    for number, order in enumerate(orders):
        text, fault = said.get(number, ("", order.fault))
        faults.update([fault] if fault else [])
        row = _row(order, None if fault else text)
        sources[DROPPED if row is None else row["from"]] += 1
        rows += [] if row is None else [row]
    if not rows:
        raise CorpusError(
            f"nothing of what was to be written can be kept ({faults_in_words(faults)}). Take "
            "another model or prompts, or allow more tokens (--new-tokens)."
        )
    return Written(tuple(rows), dict(sources), dict(sorted(faults.items())))


def _row(order: Order, text: str | None) -> Row | None:
    """A row of the file; None where nothing is good."""
    if text is not None and order.turns is None:
        return {"text": text, "from": DENSE}
    if text is not None:
        answer = {"role": "assistant", "content": text}
        return {"messages": [*(order.turns or ()), answer], "from": DENSE}
    if order.reference is None:
        return None
    return {"messages": [*(order.turns or ()), order.reference], "from": REFERENCE}


def faults_in_words(faults: Mapping[str, int]) -> str:
    """Counts by reason, in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(faults.items())) or "none"
