"""Corpora: files, folders, hub names, columns, limits, and every way they can be unreadable."""

import itertools
import json
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostlayers.errors import CorpusError
from ghostlayers.text.corpora import Corpus, document_hash, load_corpus
from ghostlayers.text.rows import choose_text


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test of corpora went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def read(data, **more):
    return load_corpus(data, use="calibration", **more)


def message(data, **more):
    with pytest.raises(CorpusError) as caught:
        read(data, **more)
    return str(caught.value)


# Files and folders


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("naïve\n\nsecond paragraph\n", encoding="utf-8")
    assert read(path) == Corpus(
        name=str(path), documents=("naïve\n\nsecond paragraph\n",), source=str(path)
    )


def test_a_jsonl_file_is_one_document_a_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "thrée"}])
    assert read(path).documents == ("one", "", "thrée")


def test_a_parquet_file_is_one_document_a_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", None, "three"], "id": [1, 2, 3]})
    assert read(str(path)).documents == ("one", "", "three")


@pytest.mark.parametrize("name", ["part[12].jsonl", "part*.jsonl", "part?.jsonl"])
def test_a_name_that_looks_like_a_pattern_is_one_file(tmp_path, name):
    write_jsonl(tmp_path / name, [{"text": "the one"}])
    write_jsonl(tmp_path / "part1.jsonl", [{"text": "another one"}])
    assert read(tmp_path / name).documents == ("the one",)


def test_a_folder_is_all_its_readable_files_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}, {"text": "three"}])
    (tmp_path / "a.txt").write_text("one")
    write_parquet(tmp_path / "c.parquet", {"text": ["four"]})
    (tmp_path / "notes.md").write_text("not read")
    corpus = read(tmp_path)
    assert corpus.documents == ("one", "two", "three", "four")
    assert corpus.complete


def test_a_folder_without_readable_files_is_refused(tmp_path):
    (tmp_path / "notes.rst").write_text("x")
    assert message(tmp_path).startswith(f"folder '{tmp_path}' holds no file in .txt, ")


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "notes.rst"
    path.write_text("x")
    assert message(path).startswith(f"cannot read '{path}': expected a file in .txt, ")


def test_documents_in_memory_keep_their_order():
    corpus = read(["one", "two"], separator=" ")
    assert (corpus.name, corpus.source) == ("documents in memory", "in memory")
    assert corpus.joined() == "one two"


def test_a_corpus_is_returned_as_it_is():
    corpus = Corpus("mine", ("one",))
    assert read(corpus) is corpus


@pytest.mark.parametrize(("separator", "joined"), [("\n\n", "a\n\nb"), (" ", "a b"), ("", "ab")])
def test_the_separator_joins_documents(tmp_path, separator, joined):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    assert read(path, separator=separator).joined() == joined


def test_the_hash_of_a_corpus_depends_on_the_separator():
    hashes = {read(["a", "b"], separator=separator).sha256() for separator in (" ", "\n", "")}
    assert len(hashes) == 3


# Columns


@pytest.mark.parametrize(
    ("row", "wanted", "column"),
    [
        ({"text": "a", "title": "b"}, None, "text"),
        ({"id": 1, "body": "a b"}, None, "body"),
        ({"text": "a", "title": "b"}, "title", "title"),
        ({"id": "one", "body": "a"}, "id", "id"),
    ],
    ids=["text", "only column of strings", "named", "named, an identifier"],
)
def test_the_text_column_is_chosen(row, wanted, column):
    assert choose_text([row], wanted, "a.jsonl").columns == (column,)


@pytest.mark.parametrize("row", [{"body": "a b", "title": "c d", "id": 1}, {"id": 1, "year": 2}])
def test_an_ambiguous_text_column_is_refused(tmp_path, row):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert message(path) == (
        f"cannot tell which column of '{path}' holds the text: expected 'text' or a single column "
        f"of strings, got {', '.join(row)}. Name it with --text-column."
    )


def test_a_missing_text_column_is_refused_with_a_suggestion(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "a", "title": "b"}])
    assert message(path, text_column="contents") == (
        f"'{path}' has no column 'contents'. Did you mean 'content'? Known: content, title."
    )


def test_the_named_column_is_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "title": ["c", "d"]})
    assert read(path, text_column="title").documents == ("c", "d")


def test_an_empty_first_text_does_not_change_the_column(tmp_path):
    rows = [{"text": None, "url": "first address"}, {"text": "a", "url": "second address"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(path).documents == ("", "a")


# Names


def test_an_unknown_name_suggests_a_near_one():
    assert message("wikitxt2") == (
        "no corpus and no file is called 'wikitxt2'. Did you mean 'wikitext2'? "
        "Known: c4, pg19, ptb, sec, slimpajama, wikitext2. Or give a .txt, .jsonl or .parquet "
        "file, or a data set on the hub as name:config:split."
    )


def test_a_missing_file_is_refused_without_a_suggestion(tmp_path):
    assert message(tmp_path / "zzz.txt") == (
        f"no corpus and no file is called '{tmp_path / 'zzz.txt'}'. "
        "Known: c4, pg19, ptb, sec, slimpajama, wikitext2. Or give a .txt, .jsonl or .parquet "
        "file, or a data set on the hub as name:config:split."
    )


def test_ptb_is_explained():
    assert message("ptb") == (
        "'ptb' cannot be loaded by name: its copy on the hub is a script, which current versions "
        "of datasets refuse to run. Give a plain file of its sentences with --separator ' ', for "
        "example ptb.test.parquet or ptb.test.txt."
    )


# Files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.parquet", b"PAR1 and then nothing of use", "parquet"),
        ("a.jsonl", b'{"text": "cut o', "json"),
        ("a.txt", b"\xff\xfe not utf-8", "text"),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n', "json"),
    ],
    ids=["corrupt parquet", "cut jsonl", "invalid UTF-8", "invalid UTF-8 in jsonl"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content, kind):
    path = tmp_path / name
    path.write_bytes(content)
    assert message(path).startswith(f"cannot read '{path}' as {kind}: ")


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"document {i}" for i in range(500)]})
    path.write_bytes(path.read_bytes()[:-100])
    assert message(path).startswith(f"cannot read '{path}' as parquet: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\n\t"), ("a.jsonl", '{"text": ""}\n'), ("a.jsonl", "")],
)
def test_a_file_without_text_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert message(path) == f"corpus '{path}' holds no text."


@pytest.mark.parametrize("documents", [[], ["", "  \n"]])
def test_documents_without_text_are_refused(documents):
    assert message(documents) == "corpus 'documents in memory' holds no text."


def test_documents_that_are_no_text() -> None:
    assert "number 1 is None, of type NoneType" in message(["a", None])


# The hub


def fake_hub(monkeypatch, rows):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    fake_hub(monkeypatch, ConnectionError("Couldn't reach the hub.\nA second line."))
    assert message("wikitext2") == (
        "corpus 'wikitext2' is Salesforce/wikitext (wikitext-2-raw-v1, train) on the Hugging Face "
        "hub, which could not be read: Couldn't reach the hub. Check the connection, or give a "
        "local .txt, .jsonl or .parquet file."
    )


def test_a_connection_that_breaks_while_reading_is_the_same_error(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    fake_hub(monkeypatch, rows())
    assert "could not be read: reset by peer." in message("c4")


def test_an_error_without_a_message_is_named_by_its_type(monkeypatch):
    fake_hub(monkeypatch, TimeoutError())
    assert "could not be read: TimeoutError." in message("c4")


@pytest.mark.parametrize(
    ("name", "use", "path", "config", "split"),
    [
        ("c4", "calibration", "allenai/c4", "en", "train"),
        ("c4", "evaluation", "allenai/c4", "en", "validation"),
        ("wikitext2", "calibration", "Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("wikitext2", "evaluation", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ],
)
def test_a_hub_corpus_is_streamed_from_the_right_split(monkeypatch, name, use, path, config, split):
    calls = fake_hub(monkeypatch, [{"text": "one"}, {"text": "two"}])
    corpus = load_corpus(name, use=use)
    assert calls == [((path, config), {"split": split, "streaming": True})]
    assert corpus.documents == ("one", "two")
    assert corpus.source == f"{path} {config} {split}"
    assert corpus.complete


def test_an_endless_hub_corpus_stops_at_the_limit(monkeypatch):
    served = itertools.count()
    fake_hub(monkeypatch, ({"text": f"{next(served):010d}"} for _ in itertools.count()))
    corpus = read("c4", max_characters=25)
    assert corpus.documents == ("0000000000", "0000000001", "0000000002")
    assert not corpus.complete
    assert next(served) <= 4


# Limits


def test_reading_files_stops_at_the_limit(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0123456789"}] * 5)
    (tmp_path / "b.parquet").write_bytes(b"never opened")
    corpus = read(tmp_path, max_characters=25)
    assert corpus.documents == ("0123456789",) * 3
    assert not corpus.complete


def test_a_limit_reached_at_the_end_of_a_file_leaves_the_next_one_unread(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.txt").write_text("unread")
    corpus = read(tmp_path, max_characters=10)
    assert corpus.documents == ("0123456789",)
    assert not corpus.complete


def test_text_that_ends_at_the_limit_is_complete(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "0123456789"}] * 3)
    assert read(path, max_characters=30).complete


# Hashes


@pytest.mark.parametrize("same", ["a b", "  a b", "a b\n\n", "\t a b \n"])
def test_white_space_around_a_document_does_not_change_its_hash(same):
    assert document_hash(same) == document_hash("a b")


@pytest.mark.parametrize("other", ["a  b", "A b", "a", "a b."])
def test_any_other_change_does(other):
    assert document_hash(other) != document_hash("a b")


def test_unpaired_surrogates_can_be_hashed():
    assert len(document_hash("\ud800 broken")) == 16
    assert len(read(["\ud800 broken"]).sha256()) == 64
