"""Sources of text: every format gives the same documents, chats, draws, bounds, hostile files."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_byte_tokenizer, make_documents
from ghostlayers.errors import CorpusError
from ghostlayers.text import corpora, raw
from ghostlayers.text.corpora import Corpus, load_corpus
from ghostlayers.text.rows import is_identifier

DOCUMENTS = [
    "one, with a comma",
    "",
    'two "quoted"\nand a second line',
    "trois é 三 🙂",
    "the last",
]
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a test of corpora went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so low that small sources are large ones."""
    monkeypatch.setattr(raw, "WHOLE", 4000)
    monkeypatch.setattr(corpora, "DRAWN", 2000)
    monkeypatch.setattr(raw, "BLOCK", 512)
    monkeypatch.setattr(raw, "_LOOK", 64)


def read(data: Any, **more: Any) -> Corpus:
    return load_corpus(data, use=more.pop("use", "calibration"), **more)


def message(data: Any, **more: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        read(data, **more)
    return str(caught.value)


# Formats


def as_jsonl(documents: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)
    ).encode()


def as_csv(documents: list[str], comma: str = ",") -> bytes:
    cells = ['"' + document.replace('"', '""') + '"' for document in documents]
    rows = [f"{i}{comma}{cell}" for i, cell in enumerate(cells)]
    return "\n".join([f"id{comma}text", *rows, ""]).encode()


def as_parquet(documents: list[str]) -> bytes:
    out = io.BytesIO()
    table = pa.table({"id": list(range(len(documents))), "text": documents})
    pq.write_table(table, out, row_group_size=2)
    return out.getvalue()


def as_arrow(documents: list[str], opened: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    out = io.BytesIO()
    table = pa.table({"text": documents})
    with opened(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


PLAIN: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": as_jsonl,
    "a.ndjson": as_jsonl,
    "a.JSONL": as_jsonl,
    "lines.json": as_jsonl,
    "array.json": lambda d: json.dumps([{"text": text} for text in d]).encode(),
    "pretty.json": lambda d: json.dumps([{"text": text} for text in d], indent=2).encode(),
    "strings.json": lambda d: json.dumps(d).encode(),
    "one-line.json": lambda d: json.dumps({"n": 1, "rows": [{"text": e} for e in d]}).encode(),
    "inside.json": lambda d: json.dumps({"data": [{"text": e} for e in d]}, indent=1).encode(),
    "bom.jsonl": lambda d: b"\xef\xbb\xbf" + as_jsonl(d),
    "crlf.jsonl": lambda d: as_jsonl(d).replace(b"\n", b"\r\n"),
    "a.csv": as_csv,
    "a.tsv": lambda d: as_csv(d, "\t"),
    "bom.csv": lambda d: b"\xef\xbb\xbf" + as_csv(d),
}
TABLES: dict[str, Callable[[list[str]], bytes]] = {
    "a.parquet": as_parquet,
    "a.PARQUET": as_parquet,
    "stream.arrow": as_arrow,
    "file.arrow": lambda d: as_arrow(d, pa.ipc.new_file),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: (
        zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])
    ),
}


@pytest.mark.parametrize("name", [*PLAIN, *TABLES])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes({**PLAIN, **TABLES}[name](DOCUMENTS))
    corpus = read(path)
    assert corpus.documents == tuple(DOCUMENTS)
    assert corpus.complete


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_compressed_files_give_the_same_documents(tmp_path: Path, name: str, packed: str) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(PACKED[packed](PLAIN[name](DOCUMENTS)))
    assert read(path).documents == tuple(DOCUMENTS)


@pytest.mark.parametrize("packed", ["", *PACKED])
@pytest.mark.parametrize("ending", [".txt", ".TXT", ".text", ".md"])
def test_text_is_one_document(tmp_path: Path, ending: str, packed: str) -> None:
    path = tmp_path / f"my, text+notes{ending}{packed}"
    path.write_bytes(PACKED.get(packed, bytes)(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa9\n"))
    assert read(path).documents == ("one\n\ntwo é\n",)


@pytest.mark.parametrize("name", [*PLAIN, *TABLES])
def test_every_format_is_drawn_from(tmp_path: Path, small: None, name: str) -> None:
    documents = [f"document {number} " + "word " * (number % 40) for number in range(400)]
    path = tmp_path / name
    path.write_bytes({**PLAIN, **TABLES}[name](documents))
    drawn = read(path, seed=3, max_characters=3000)
    again = read(path, seed=3, max_characters=3000)
    other = read(path, seed=4, max_characters=3000)
    assert drawn == again
    assert drawn.documents != other.documents
    assert not drawn.complete
    assert len(set(drawn.documents)) == len(drawn.documents)
    assert set(drawn.documents) <= set(documents)
    assert 3000 <= sum(map(len, drawn.documents)) < 3400
    places = [documents.index(document) for document in drawn.documents]
    assert min(places) < 150
    assert max(places) > 250


def test_a_saved_data_set_is_read_and_drawn_from(tmp_path: Path, small: None) -> None:
    documents = [f"document {number} " + "word " * 10 for number in range(200)]
    made = datasets.Dataset.from_dict({"text": documents}).filter(
        lambda row: "9" not in row["text"]
    )
    plain = [document for document in documents if "9" not in document]
    made.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one").documents == tuple(plain)
    drawn = read(tmp_path / "one", seed=0, max_characters=2000)
    assert len(set(drawn.documents)) == len(drawn.documents)
    assert set(drawn.documents) < set(plain)


def test_a_saved_dictionary_gives_the_split_for_the_use(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both").documents == ("train",)
    assert read(tmp_path / "both", use="evaluation").documents == ("test",)
    odd = datasets.DatasetDict({"a": splits["train"], "b": splits["test"]})
    odd.save_to_disk(tmp_path / "odd")
    assert "holds the splits a, b; expected train for calibration" in message(tmp_path / "odd")


def test_folders_within_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "deep" / "x.txt").write_text("two")
    (tmp_path / "c.jsonl").write_bytes(as_jsonl(["three"]))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    corpus = read(tmp_path)
    assert corpus.documents == ("one", "two", "three")
    assert corpus.source == f"{tmp_path} (1 .jsonl, 1 .parquet, 2 .txt)"


def test_patterns_name_files(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        (tmp_path / name).write_text(name)
    assert read(str(tmp_path / "a*.txt")).documents == ("a1.txt", "a2.txt")
    assert "matches" in message(str(tmp_path / "c*.txt"))


def test_a_plus_sign_in_a_name_joins_nothing(tmp_path: Path) -> None:
    (tmp_path / "c++.txt").write_text("abc")
    (tmp_path / "d.txt").write_text("def")
    joined = f"{tmp_path / 'c++.txt'}+{tmp_path / 'd.txt'}"
    assert read(joined).documents == ("abc", "def")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("allenai/c4:en:train", ("allenai/c4", "en", "train")),
        ("squad::validation", ("squad", None, "validation")),
        ("owner/name:config", ("owner/name", "config", "train")),
    ],
)
def test_a_data_set_on_the_hub_is_named_in_full(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]
) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((path, config, split, streaming))
        return [{"url": "https://a.b/c", "body": "the text"}] * 3

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(name).documents == ("the text",) * 3
    assert calls == [(*asked, True)]


def test_local_files_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(DOCUMENTS))
    assert read(path).documents == tuple(DOCUMENTS)


# Which column


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("id", ["a text"], True),
        ("doc_id", ["x"], True),
        ("URL", ["x"], True),
        ("name", ["6f1c0e9a7b3d4c5e8f90", "0e9a7b3d4c5e8f906f1c"], True),
        ("name", ["123e4567-e89b-12d3-a456-426614174000"], True),
        ("name", ["https://a.org/b?c", "ftp://x"], True),
        ("name", ["2024-01-02T03:04:05Z", "12.5"], True),
        ("name", ["conv_00123", "sharegpt-17"], True),
        ("name", ["wiki", "slug-of-words", "docs/readme.md", "a@b.org"], True),
        ("name", ["Jan 5, 2020", "12/31/2020 5:00 PM", "(555) 123-4567"], True),
        ("name", ["QUJD" * 12 + "\n" + "REVG" * 12], True),
        ("name", ["a word", "b"], False),
        ("name", ["wiki", 'He said: "yes".'], False),
        ("name", ["你好世界"], False),
        ("name", ["one sentence of 2024"], False),
        ("paid", ["he paid"], False),
        ("name", [""], False),
    ],
)
def test_identifiers_are_told_from_text(name: str, values: list[str], expected: bool) -> None:
    assert is_identifier(name, values) is expected


def test_identifiers_are_never_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "abc-17", "uuid": "x"}\n' * 3)
    assert "holds no text that can be told from identifiers" in message(path)
    path.write_text('{"id": "abc-17", "story": "Once upon a time."}\n')
    assert read(path).documents == ("Once upon a time.",)


@pytest.mark.parametrize(
    "row",
    [
        {"topic": "The weather", "dialogue": [{"speaker": "a", "said": "It rains all day."}]},
        {"title": "A short title", "doc": {"body": "and here is all the text of it"}},
        {"source": "from the wiki", "input_ids": list(range(50))},
        {"messages": '[{"role": "user", "content": "a chat as one string"}]'},
    ],
)
def test_a_title_is_not_the_text(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    assert "cannot tell which column" in message(path)


def test_what_lies_beside_the_text_is_no_text(tmp_path: Path) -> None:
    row = {"content": "Here it is.", "tags": ["a"], "vector": [0.5] * 99, "meta": {"n": 1}}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    assert read(path).documents == ("Here it is.",) * 3


@pytest.mark.parametrize("sign", [";", "\t", "|", ","])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_tables_are_parted_by_the_sign_in_their_first_line(
    tmp_path: Path, sign: str, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(f"id{sign}sentence1\n1{sign}The fox ran.\n")
    assert read(path).documents == ("The fox ran.",)


@pytest.mark.parametrize("more", ["x", '["c d"]', "\n\n[1]"])
def test_nothing_stands_behind_an_array(tmp_path: Path, more: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'["a b", "c d"]{more}')
    assert "more stands behind it" in message(path)


# Chats


TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a1", "messages": TURNS},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        {"prompt": "hello", "completion": "hi"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "hello", "input": "", "output": "hi"},
        {"instruction": "hello", "output": "hi", "category": "talk of the day"},
        {"messages": [{**turn, "content": [{"text": turn["content"]}]} for turn in TURNS]},
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_chats_go_through_the_template(tmp_path: Path, row: dict[str, Any], ending: str) -> None:
    tokenizer = make_byte_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    path = tmp_path / f"a{ending}"
    if ending == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    corpus = read(path, tokenizer=tokenizer)
    assert corpus.documents == ("<user>hello\n<assistant>hi\n",)


def test_an_instruction_has_its_input_below(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    assert read(path, tokenizer=tokenizer).documents == ("<user>Add.\n\n1 2\n<assistant>3\n",)


def test_a_chat_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    said = message(path, tokenizer=make_byte_tokenizer(bos=False))
    assert "the model's tokenizer has no template" in said
    assert "--text-column" in said


@pytest.mark.parametrize("turns", [[{"x": 1}], [{"role": 1, "content": "a"}], [{"role": "user"}]])
def test_what_is_no_turn_is_refused_by_line(tmp_path: Path, turns: list[Any]) -> None:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "a.jsonl"
    rows = [{"messages": TURNS}, {"messages": turns}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "line 2: a turn must" in message(path, tokenizer=tokenizer)


def test_a_template_that_refuses_is_our_error(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    assert "line 1: the model's chat template refuses a chat: roles must alternate" in message(
        path, tokenizer=tokenizer
    )


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "text".encode("utf-16"), "it is UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), "byte 1 is NUL"),
        ("a.txt", b"some text\0", "byte 9 is NUL"),
        ("a.txt", "naïve".encode("latin-1"), "byte 2 (0xef) is not UTF-8"),
        ("a.txt", b"x" * 100_000 + b"\xff", "byte 100,000 (0xff) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: "),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: expected an object"),
        ("a.json", b'[{"text": "a"}, {"text": ', "item 2: "),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "item 1: expected a comma"),
        ("a.json", b"[" * 100_000, "item 1: "),
        ("a.csv", b"text\n\"open", "line 2: unexpected end of data"),
        ("a.csv", b"This is a sentence.\nAnother one.\n", "the first line names no columns"),
        ("a.csv", b"17,hello there\n18,and you\n", "the first line names no columns"),
        ("a.csv", b"text\na,b\n", "line 2: 2 values for 1 columns"),
        ("a.txt.gz", b"no gzip", "as text: "),
        ("a.jsonl.zst", b"no zstandard", "as json: "),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "as text: "),
        ("a.arrow", b"no arrow", "as arrow: "),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = message(path)
    assert said in text
    assert str(path) in text


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    assert message(pipe) == f"'{pipe}' is a pipe, not a file; write its text to a file first."
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    assert "is a device, not a file" in message(tmp_path / "zero.txt")
    assert message("/dev/zero").startswith("'/dev/zero' is a device")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.txt"))
        assert "is a socket" in message(tmp_path / "s.txt")
    assert "no corpus and no file" in message("a\0b")
    assert "no corpus's name" in message("a" * 300)


@QUICK
@given(st.binary(max_size=300), st.sampled_from([*PLAIN, "a.txt", *TABLES, "a.txt.gz", "a.xz"]))
def test_no_bytes_raise_anything_but_our_error(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for seed in (None, 0):
        try:
            read(path, seed=seed)
        except CorpusError as error:
            said = str(error)
            assert str(path) in said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "messages", "prompt", "from", "id"]), inner)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@QUICK
@given(st.lists(JSON, max_size=4), st.booleans())
def test_no_rows_raise_anything_but_our_error(tmp_path: Path, rows: list[Any], lines: bool) -> None:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    try:
        read(path, tokenizer=tokenizer)
    except CorpusError as error:
        said = str(error)
        assert str(path) in said


@QUICK
@given(st.text(alphabet=string.printable + "é\x1b", max_size=200), st.sampled_from([",", "\t"]))
def test_no_table_raises_anything_but_our_error(tmp_path: Path, data: str, comma: str) -> None:
    path = tmp_path / ("a.csv" if comma == "," else "a.tsv")
    path.write_bytes(f"text{comma}b\n{data}".encode())
    try:
        read(path)
    except CorpusError as error:
        said = str(error)
        assert str(path) in said


# Cost


class Counted:
    """A file that counts the bytes read of it."""

    def __init__(self, file: Any) -> None:
        self.file, self.count = file, 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.count += len(data)
        return data

    def readline(self, size: int = -1) -> bytes:
        data: bytes = self.file.readline(size)
        self.count += len(data)
        return data

    def seek(self, place: int) -> int:
        return int(self.file.seek(place))

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("size", [20_000, 200_000])
def test_what_is_read_does_not_grow_with_the_file(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, ending: str, size: int
) -> None:
    documents = make_documents(size // 300)
    path = tmp_path / f"a{ending}"
    path.write_bytes(as_jsonl(documents) if ending == ".jsonl" else "\n\n".join(documents).encode())
    opened: list[Counted] = []

    def count(path: Path) -> Counted:
        opened.append(Counted(path.open("rb")))
        return opened[-1]

    monkeypatch.setattr(raw, "open_bytes", count)
    corpus = read(path, seed=1, max_characters=2000)
    assert not corpus.complete
    assert sum(file.count for file in opened) < 19_000


def test_only_some_files_of_a_folder_are_opened(tmp_path: Path, small: None) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}.jsonl").write_bytes(as_jsonl([f"{number} " + "word " * 200]))
    drawn = read(tmp_path, seed=0, max_characters=2000)
    assert 2 <= len({document.split()[0] for document in drawn.documents}) <= 16
    assert read(tmp_path, seed=0, max_characters=2000) == drawn


def test_of_a_long_line_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "MAX_LINE", 1000)
    path = tmp_path / "a.jsonl"
    long = "é\n" * 2000
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in (long, "short"))
    )
    corpus = read(path)
    assert len(corpus.documents) == 2
    assert long.startswith(corpus.documents[0])
    assert len(corpus.documents[0]) > 300
    assert not corpus.complete
    path.write_text(json.dumps({"text": "a", "numbers": list(range(2000))}) + "\n")
    assert "line 1: a value is cut off; it is longer than" in message(path)


# Blocks of a large text


@QUICK
@given(
    st.text(alphabet="ab é三\n\n  ", min_size=1, max_size=4000),
    st.booleans(),
)
def test_blocks_are_the_text_however_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, written: str, packed: bool
) -> None:
    data = written.encode()
    blocks = list(raw.blocks(io.BytesIO(data)))
    assert b"".join(part for _, part in blocks) == data
    alone = [
        raw.block_at(io.BytesIO(data), number, len(data))
        for number in range(-(-len(data) // raw.BLOCK))
    ]
    assert [block for block in alone if block[1]] == blocks
    for begin, part in blocks:
        assert written.encode()[begin : begin + len(part)].decode("utf-8")


def test_a_large_text_is_read_as_it_is(tmp_path: Path, small: None) -> None:
    whole = "\n\n".join(make_documents(60))
    path = tmp_path / "a.txt"
    path.write_text(whole)
    corpus = read(path)
    assert len(corpus.documents) > 10
    assert corpus.joined() == whole
    drawn = read(path, seed=0, max_characters=2000)
    assert set(drawn.documents) < set(corpus.documents)  # so that hashes tell what served twice


def test_commas_and_plus_signs_join_what_is_no_file(tmp_path: Path) -> None:
    for name in ("a, b.txt", "c+d.txt"):
        (tmp_path / name).write_text(name)
    names = [str(tmp_path / "a, b.txt"), "c4", str(tmp_path / "c+d.txt")]
    assert corpora.split_names(",".join(names), ",") == names
    assert corpora.split_names("+".join(names), "+") == names
    assert corpora.split_names(names[0], ",") == names[:1]
