"""Texts that people have, and files that are none."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from faults.kinds.commands import CUT, evaluate, prune
from faults.materials import Place, Plan

SENTENCE = "The river carries the letter near the old bridge. "


def make(place: Place, index: int) -> Plan:
    """Some text, some command."""
    rng = place.rng
    place.take("tied", "text.txt")
    names = list(FILES)
    name = names[index % len(names)]
    ending, write, must = FILES[name]
    path = place.inputs / f"data{ending}"
    write(path, rng)
    plan = evaluate("in/tied") if rng.random() < 0.5 else prune("in/tied")
    plan.arguments = [
        f"in/{path.name}" if each == "in/text.txt" else each for each in plan.arguments
    ]
    plan.truth, plan.drop, plan.label, plan.must = None, [], f"text: {name}", must
    assert CUT
    return plan


def _bytes(content: bytes) -> Callable[[Path, Random], object]:
    return lambda path, rng: path.write_bytes(content)


def _rows(*rows: object) -> Callable[[Path, Random], object]:
    text = "".join(json.dumps(row) + "\n" for row in rows) * 40
    return lambda path, rng: path.write_text(text)


def _noise(path: Path, rng: Random) -> None:
    path.write_bytes(rng.randbytes(20_000))


def _broken_lines(path: Path, rng: Random) -> None:
    lines = [json.dumps({"text": SENTENCE * 3}) for _ in range(60)]
    broken = rng.randrange(60)
    lines[broken] = lines[broken][: rng.randrange(5, 40)]
    path.write_text("\n".join(lines) + "\n")


def _chat(*names: str) -> dict[str, object]:
    turns = [{names[1]: "user", names[2]: SENTENCE * 2}, {names[1]: "assistant", names[2]: "Yes."}]
    return {"id": "0c9f" * 8, names[0]: turns}


FILES: dict[str, tuple[str, Callable[[Path, Random], object], str]] = {
    "plain": (".txt", _bytes(SENTENCE.encode() * 400), "succeed"),
    "empty": (".txt", _bytes(b""), "refuse"),
    "blank": (".txt", _bytes(b" \n\n \t" * 3), "refuse"),
    "too short": (".txt", _bytes(b"word"), "refuse"),
    "noise": (".txt", _noise, "refuse"),
    "one line": (".txt", _bytes(SENTENCE.encode() * 20_000), "succeed"),
    "NUL": (".txt", _bytes(b"\0" * 20_000), "either"),
    "NULs within": (".txt", _bytes((SENTENCE.encode() + b"\0") * 400), "either"),
    "a mark at the beginning": (".txt", _bytes(b"\xef\xbb\xbf" + SENTENCE.encode() * 400),
                                "either"),
    "UTF-16": (".txt", _bytes((SENTENCE * 400).encode("utf-16")), "refuse"),
    "Latin-1": (".txt", _bytes(("Café " * 2000).encode("latin-1")), "refuse"),
    "capital ending": (".TXT", _bytes(SENTENCE.encode() * 400), "succeed"),
    "lines of JSON": (".jsonl", _rows({"text": SENTENCE * 3}), "succeed"),
    "identifiers alone": (".jsonl", _rows({"id": "0c9f" * 8}), "refuse"),
    "numbers alone": (".jsonl", _rows({"n": 1}), "refuse"),
    "lists": (".jsonl", _rows([1, 2]), "refuse"),
    "a broken line": (".jsonl", _broken_lines, "either"),
    "conversations, no template": (".jsonl", _rows(_chat("conversations", "from", "value")),
                                   "either"),
    "messages, no template": (".jsonl", _rows(_chat("messages", "role", "content")), "either"),
    "prompt and completion": (".jsonl", _rows({"prompt": SENTENCE, "completion": "Yes."}),
                              "either"),
    "two columns of text": (".jsonl", _rows({"title": "A", "body": SENTENCE * 3}), "either"),
    "null": (".jsonl", _rows({"text": None}), "refuse"),
    "hostile name of a column": (".jsonl", _rows({"\x1b[31m[/x]": 1, "n": 2}), "refuse"),
    "JSON": (".json", _bytes(json.dumps([{"text": SENTENCE * 3}] * 40).encode()), "succeed"),
    "JSON that is cut": (".json", _bytes(b'[{"text": "a'), "refuse"),
    "deep JSON": (".json", _bytes(b"[" * 100_000), "refuse"),
    "table": (".csv", _bytes(b"text,label\n" + b'"' + SENTENCE.encode() * 3 + b'",1\n' * 60),
              "either"),
    "table of numbers": (".csv", _bytes(b"a,b\n" + b"1,2\n" * 60), "refuse"),
    "parquet that is none": (".parquet", _bytes(b"PAR1nothing"), "refuse"),
    "arrow that is none": (".arrow", _bytes(b"ARROW1nothing"), "refuse"),
    "gzip that is none": (".txt.gz", _bytes(b"nothing"), "refuse"),
    "zstandard that is none": (".jsonl.zst", _bytes(b"nothing"), "refuse"),
    "a pointer of git-lfs": (".parquet", _bytes(b"version https://git-lfs.github.com/spec/v1\n"
                                               b"oid sha256:" + b"0" * 64 + b"\nsize 99\n"),
                             "refuse"),
    "a pipe": (".txt", lambda path, rng: __import__("os").mkfifo(path), "refuse"),
    "a link to zeros": (".txt", lambda path, rng: path.symlink_to("/dev/zero"), "refuse"),
    "a link to nowhere": (".txt", lambda path, rng: path.symlink_to("nowhere"), "refuse"),
    "a link to itself": (".txt", lambda path, rng: path.symlink_to(path.name), "refuse"),
    "an empty folder": ("", lambda path, rng: path.mkdir(), "refuse"),
    "a folder of odds and ends": ("", lambda path, rng: (path.mkdir(),
                                  (path / "a.py").write_text("x = 1")), "refuse"),
}  # fmt: skip
