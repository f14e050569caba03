"""Rows that are not what they seem: names given twice, names that change, values that are no text.

Tables and lines are generated. What would be read wrongly is refused by name, in a short message.
"""

import codecs
import json
import string
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_byte_tokenizer
from ghostlayers.errors import CorpusError, listed, suggest
from ghostlayers.text import raw
from ghostlayers.text.corpora import Corpus, load_corpus

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
LONGEST = 2000
"""Characters that a message may have, whatever is in a file."""

names = st.text(string.ascii_lowercase, min_size=1, max_size=6)


def read(data: Any, **more: Any) -> Corpus:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATE
    return load_corpus(data, use="calibration", tokenizer=tokenizer, **more)


def message(data: Any, **more: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        read(data, **more)
    assert len(str(caught.value)) < LONGEST
    return str(caught.value)


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Names given twice


def write_table(folder: Path, ending: str, columns: list[str]) -> Path:
    """A table of two rows, in which every cell is a text of its own."""
    path = folder / f"a{ending}"
    cells = [[f"cell {row} {place}" for row in range(2)] for place in range(len(columns))]
    table = pa.Table.from_arrays(list(map(pa.array, cells)), names=columns)
    if ending == ".parquet":
        pq.write_table(table, path)
    elif ending == ".csv":
        lines = [columns, *zip(*cells, strict=True)]
        path.write_text("".join(",".join(line) + "\n" for line in lines))
    elif ending == ".jsonl":
        rows = zip(*cells, strict=True)
        objects = [zip(columns, row, strict=True) for row in rows]
        pairs = [[f'"{name}": "{value}"' for name, value in row] for row in objects]
        path.write_text("".join(f"{{{', '.join(row)}}}\n" for row in pairs))
    else:
        opened = pa.ipc.new_stream if ending == ".stream.arrow" else pa.ipc.new_file
        with opened(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("ending", [".parquet", ".stream.arrow", ".file.arrow", ".csv", ".jsonl"])
@QUICK
@given(others=st.lists(names, max_size=4), twice=names, first=st.integers(0, 4))
def test_a_name_given_twice_is_refused(
    tmp_path: Path, ending: str, others: list[str], twice: str, first: int
) -> None:
    columns = [name for name in dict.fromkeys(others) if name not in {twice, "text"}]
    columns = ["text", *columns]
    assert read(write_table(tmp_path, ending, columns)).documents == ("cell 0 0", "cell 1 0")
    columns = [name for name in columns if name != twice]
    columns.insert(min(first, len(columns)), twice)
    path = write_table(tmp_path, ending, [*columns, twice])
    for seed in (None, 0):
        said = message(path, seed=seed)
        assert f"are called '{twice}'" in said
        assert str(path) in said


def test_a_key_given_twice_within_a_turn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (
        '{"messages": [{"role": "user", "content": "a b", "content": "c d"}]}\n',
        '[{"text": "a", "text": "b"}]',
        '{\n"data": [{"text": "a", "text": "b"}]}',
    ):
        path.write_text(text)
        assert "two values are called" in message(path)


# Names that change


@QUICK
@given(
    before=st.integers(1, 20),
    other=names.filter(lambda name: name not in {"text", "messages"}),
    alternate=st.booleans(),
    value=st.sampled_from(["one word more", "word", ["a"], {"b": "c"}]),
)
def test_a_row_without_the_column_that_has_text_is_refused(
    tmp_path: Path, before: int, other: str, alternate: bool, value: Any
) -> None:
    rows = [{"text": f"text {number}"} for number in range(before)]
    rows += [{f"my{other}": value}, *([rows[0]] if alternate else [])] * 3
    path = write_lines(tmp_path / "a.jsonl", *rows)
    said = message(path)
    assert f"line {before + 1}: the row has no 'text'" in said
    assert f"got my{other}." in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("first", "then", "lacks"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "reply": "b"}, "completion"),
        ({"prompt": "a", "completion": "b"}, {"text": "a b"}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"text": "a b"}, "messages"),
        ({"content": "a b", "id": 1}, {"text": "a b", "id": 2}, "content"),
    ],
)
def test_chats_whose_names_change_are_refused(
    tmp_path: Path, first: Any, then: Any, lacks: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[first] * 12, then)
    assert f"line 13: the row has no '{lacks}'" in message(path)


def test_a_chat_may_have_any_of_its_names_in_any_row(tmp_path: Path) -> None:
    plain = {"instruction": "a", "output": "b"}
    more = {"instruction": "a", "input": "c", "response": "d"}
    path = write_lines(tmp_path / "a.jsonl", *[plain] * 12, more, {"instruction": "a"})
    assert read(path).documents[11:] == (
        "<user>a\n<assistant>b\n",
        "<user>a\n\nc\n<assistant>d\n",
        "<user>a\n<assistant>\n",
    )


@pytest.mark.parametrize(
    "row", [{"text": None, "title": "a b"}, {"id": "a b"}, {}, {"year": 5, "title": ""}]
)
def test_a_row_that_says_it_has_no_text_has_none(tmp_path: Path, row: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a b"}, row, {"text": "c d"})
    assert read(path).documents == ("a b", "", "c d")


def test_rows_behind_what_is_wanted_are_not_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[{"text": "a b"}] * 20, {"body": "c d"})
    assert len(read(path, max_characters=30).documents) == 10


def test_a_row_of_the_hub_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a b"}] * 9 + [{"body": "c d"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert "row 10: the row has no 'text'" in message("owner/name:config:train")


# Values that are no text


@QUICK
@given(
    value=st.integers() | st.floats(allow_nan=False) | st.booleans(),
    make=st.sampled_from(
        [
            lambda value: {"text": value},
            lambda value: {"prompt": value, "completion": "a"},
            lambda value: {"question": "is it", "answer": value},
            lambda value: {"prompt": "is it", "response": value},
            lambda value: {"messages": [{"role": "user", "content": value}]},
            lambda value: {"messages": [{"role": "user", "content": [{"text": value}]}]},
        ]
    ),
)
def test_numbers_and_truth_values_are_no_text(tmp_path: Path, value: Any, make: Any) -> None:
    kind = "truth values" if isinstance(value, bool) else "numbers"
    said = message(write_lines(tmp_path / "a.jsonl", make(value)))
    assert f"holds {kind}, not text" in said
    assert "completion" not in said
    assert "line 1" in said


def test_a_named_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [0, 1], "text": ["a", "b"]}), tmp_path / "a.parquet")
    assert "row 1: column 'n' holds numbers" in message(tmp_path / "a.parquet", text_column="n")


def test_what_tables_write_for_nothing_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n{"text": NaN}\n{"text": null}\n')
    assert read(path).documents == ("a b", "", "")


# Codings


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("coding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl"])
@QUICK
@given(text=st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_a_byte_order_mark_tells_the_coding(
    tmp_path: Path, order: str, coding: str, ending: str, text: str
) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(f"\ufefft{text}".encode(f"{coding}-{order}"))
    assert f"it is {coding}; convert it first: iconv -f {coding} -t UTF-8" in message(path)


def test_the_mark_of_utf_8_is_dropped() -> None:
    assert raw.decode(codecs.BOM_UTF8 + b"a") == "a"


# Folders


@QUICK
@given(
    word=st.sampled_from(["license", "LICENCE", "ReadMe", "notice", "copying", "Changelog"]),
    tail=st.sampled_from(["", "-2.0", "_en", ".old"]),
    ending=st.sampled_from([".txt", ".md", ".text", ".txt.gz"]),
)
def test_licences_and_the_like_are_no_text_of_a_folder(
    tmp_path: Path, word: str, tail: str, ending: str
) -> None:
    folder = tmp_path / f"{word}{tail}{ending}-folder"
    folder.mkdir(exist_ok=True)
    about = folder / f"{word}{tail}{ending}"
    about.write_text("about the others")
    assert "can be named themselves" in message(folder)
    (folder / "CITATION.cff").write_text("title: it")
    (folder / "licensed.txt").write_text("one")
    write_lines(folder / "readme.jsonl", {"text": "two"})
    assert read(folder).documents == ("one", "two")
    if not ending.endswith(".gz"):
        assert read(about).documents == ("about the others",)
        assert read(f"{folder}/{word}*").documents[0] == "about the others"


# Short messages


@QUICK
@given(st.lists(st.text(max_size=99), max_size=40), st.integers(1, 12))
def test_lists_of_names_are_short(given_names: list[str], most: int) -> None:
    said = listed(given_names, most)
    assert len(said) <= 62 * most + 20
    left = len(given_names) - most
    assert said.endswith(f"and {left} more") if left > 0 else said.count(", ") >= left + most - 1


@pytest.mark.parametrize("name", ["{}", "{}" + "x" * 900, "id_{}"])
@pytest.mark.parametrize("value", [1, "a b", "x", ["a"], {"a": 1}])
def test_messages_are_short_however_many_columns_there_are(
    tmp_path: Path, name: str, value: Any
) -> None:
    row = {name.format(number): value for number in range(2000)}
    path = write_lines(tmp_path / "a.jsonl", row)
    assert "and 1,988 more" in message(path)
    assert "and 1,988 more" in message(path, text_column="content" * 2000)
    for messages in ([row], [{"role": "user", "content": row}]):
        assert "more" in message(write_lines(path, {"messages": messages}))
    write_lines(path, {"text": "a b"}, row)
    if name.startswith("{") and value != 1:
        assert "and 1,988 more" in message(path)


def test_near_names_are_told_among_many() -> None:
    known = ["zcontent", *(f"n{number}" for number in range(5000))]
    assert suggest("contents", known, 12).startswith("Did you mean 'zcontent'? Known: n0, n1")
