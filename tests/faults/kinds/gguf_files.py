"""GGUF files that are not what they say: entries, tensors, sizes, types, parts, bytes."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import gguf
import numpy as np

from faults.kinds.commands import EVAL, TEXT
from faults.kinds.weights import _pointer, _truncate
from faults.materials import QUICK, Place, Plan

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
U32, STRING, ARRAY = 4, 8, 9
HUGE = 1 << 60
MODEL = "in/whole.gguf"


@dataclass
class File:
    """A file, without the library.

    Attributes:
        entries: key, type and the bytes of the value.
        tensors: name, sizes, type and bytes.
        counts: what the header says of both, where that is not true.
    """

    entries: list[tuple[str, int, bytes]]
    tensors: list[tuple[str, list[int], int, bytes]]
    counts: tuple[int, int] | None = None

    def place(self, key: str) -> int:
        """Where an entry stands."""
        return next(i for i, each in enumerate(self.entries) if each[0].endswith(key))


def read(path: Path) -> File:
    """A whole, sound file."""
    data = path.read_bytes()
    at = 24

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0])

    def value(kind: int) -> None:
        if kind == STRING:
            take(number("Q"))
        elif kind == ARRAY:
            inner, count = number("I"), number("Q")
            for _ in range(count):
                value(inner)
        else:
            take(SIZES[kind])

    tensors, entries = struct.unpack("<QQ", data[8:24])
    said, infos = [], []
    for _ in range(entries):
        key, kind = take(number("Q")).decode(), number("I")
        start = at
        value(kind)
        said.append((key, kind, data[start:at]))
    for _ in range(tensors):
        name = take(number("Q")).decode()
        sizes = [number("Q") for _ in range(number("I"))]
        infos.append((name, sizes, number("I"), number("Q")))
    body = data[-(-at // 32) * 32 :]
    ends = [*(info[3] for info in infos[1:]), len(body)]
    return File(
        said, [(*info[:3], body[info[3] : end]) for info, end in zip(infos, ends, strict=True)]
    )


def write(path: Path, file: File) -> None:
    """The other way."""
    tensors, entries = file.counts or (len(file.tensors), len(file.entries))
    out = b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)
    for key, kind, content in file.entries:
        out += (
            struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<I", kind) + content
        )
    start, bodies = 0, b""
    for name, sizes, kind, content in file.tensors:
        out += struct.pack("<Q", len(name.encode())) + name.encode()
        out += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, start)
        bodies += content + b"\0" * (-len(content) % 32)
        start = len(bodies)
    path.write_bytes(out + b"\0" * (-len(out) % 32) + bodies)


Damage = Callable[[Path, Random], str | None]


def _entry(key: str, change: Callable[[int, bytes], tuple[int, bytes]]) -> Damage:
    def damage(path: Path, rng: Random) -> str:
        file = read(path)
        at = file.place(key)
        name, kind, content = file.entries[at]
        file.entries[at] = (name, *change(kind, content))
        write(path, file)
        return name

    return damage


def _added(key: str, value: int) -> Damage:
    def damage(path: Path, rng: Random) -> None:
        file = read(path)
        file.entries.append((key, U32, struct.pack("<I", value)))
        write(path, file)

    return damage


def _number(key: str, value: int) -> Damage:
    return _entry(key, lambda *_: (U32, struct.pack("<I", value)))


def _array(inner: int, length: int, content: bytes = b"") -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", inner, length) + content


def _nested(depth: int) -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 0, 0)


def _drop_entry(path: Path, rng: Random) -> str:
    file = read(path)
    gone = file.entries.pop(rng.randrange(len(file.entries)))
    write(path, file)
    return gone[0]


def _without(key: str) -> Damage:
    def damage(path: Path, rng: Random) -> None:
        file = read(path)
        del file.entries[file.place(key)]
        write(path, file)

    return damage


def _twice(path: Path, rng: Random) -> str:
    file = read(path)
    file.entries.append(rng.choice(file.entries))
    write(path, file)
    return file.entries[-1][0]


def _fewer_tokens(path: Path, rng: Random) -> str:
    """One token less than there are, in one of the lists."""
    file = read(path)
    at = file.place(rng.choice([".tokens", ".token_type"]))
    name, kind, content = file.entries[at]
    inner, count = struct.unpack("<IQ", content[:12])
    last = SIZES[inner] if inner in SIZES else 8 + len(_last_string(content[12:]))
    file.entries[at] = (name, kind, struct.pack("<IQ", inner, count - 1) + content[12:-last])
    write(path, file)
    return name


def _last_string(content: bytes) -> bytes:
    found = b""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found, content = content[8 : 8 + length], content[8 + length :]
    return found


def _tensor(change: Callable[[File, int, Random], object]) -> Damage:
    def damage(path: Path, rng: Random) -> str:
        file = read(path)
        at = rng.randrange(len(file.tensors))
        name = file.tensors[at][0]
        change(file, at, rng)
        write(path, file)
        return name

    return damage


def _replace(file: File, at: int, **changes: object) -> None:
    name, sizes, kind, content = file.tensors[at]
    old = {"name": name, "sizes": sizes, "kind": kind, "content": content}
    file.tensors[at] = tuple({**old, **changes}.values())  # type: ignore[assignment]


def _flip_name(file: File, at: int, rng: Random) -> None:
    name = file.tensors[at][0]
    place = rng.randrange(len(name))
    _replace(file, at, name=name[:place] + chr(ord(name[place]) ^ 1) + name[place + 1 :])


def _rows(file: File, at: int, rng: Random) -> None:
    _, sizes, _, content = file.tensors[at]
    less = [*sizes[:-1], sizes[-1] - 1]
    _replace(file, at, sizes=less, content=content[: 4 * int(np.prod(less))])


def _turned(file: File, at: int, rng: Random) -> None:
    at = next(i for i, each in enumerate(file.tensors) if "ffn_down" in each[0])
    _replace(file, at, sizes=file.tensors[at][1][::-1])


def _flat(file: File, at: int, rng: Random) -> None:
    _replace(file, at, sizes=[int(np.prod(file.tensors[at][1])), 1])


def _sized(*sizes: int) -> Damage:
    return _tensor(lambda file, at, rng: _replace(file, at, sizes=list(sizes)))


def _weight(value: float) -> Damage:
    def change(file: File, at: int, rng: Random) -> None:
        numbers = np.frombuffer(file.tensors[at][3], np.float32).copy()
        numbers[rng.randrange(int(np.prod(file.tensors[at][1])))] = value
        _replace(file, at, content=numbers.tobytes())

    return _tensor(change)


def _counts(tensors: int | None, entries: int | None) -> Damage:
    def damage(path: Path, rng: Random) -> None:
        file = read(path)
        file.counts = (
            len(file.tensors) if tensors is None else tensors,
            len(file.entries) if entries is None else entries,
        )
        write(path, file)

    return damage


def _without_layer(path: Path, rng: Random) -> str:
    file, number = read(path), rng.randrange(5)
    file.tensors = [each for each in file.tensors if not each[0].startswith(f"blk.{number}.")]
    write(path, file)
    return f"layer {number}"


def _flip_in_header(path: Path, rng: Random) -> str:
    content = bytearray(path.read_bytes())
    end = content.index(b"blk.4.attn_q") + 40
    at = rng.choice([rng.randrange(400), rng.randrange(end - 2000, end), rng.randrange(end)])
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"byte {at}"


MIX = {
    "attn_q": "Q8_0",
    "attn_k": "Q4_0",
    "ffn_up": "Q5_1",
    "ffn_gate": "F16",
}


def _mixed(path: Path, rng: Random) -> None:
    """Several types in every layer."""
    file = read(path)
    for at, (name, sizes, _, content) in enumerate(file.tensors):
        kind = next((gguf.GGMLQuantizationType[t] for part, t in MIX.items() if part in name), None)
        if kind is not None:
            numbers = np.frombuffer(content, np.float32)[: int(np.prod(sizes))]
            packed = gguf.quantize(numbers.reshape(sizes[::-1]), kind)
            _replace(file, at, kind=int(kind), content=packed.tobytes())
    write(path, file)


def in_parts(path: Path) -> None:
    """A sound model in two files, in the place of its one."""
    _split("", "parts")(path, Random(0))


def _split(wrong: str, stem: str = "whole") -> Damage:
    """Two files of one model, something about which is wrong."""

    def damage(path: Path, rng: Random) -> None:
        file = read(path)
        half = len(file.tensors) // 2
        count = len(file.tensors)
        for number, tensors in enumerate((file.tensors[:half], file.tensors[half:])):
            split = [
                ("split.no", 2, struct.pack("<H", number)),
                ("split.count", 2, struct.pack("<H", 3 if wrong == "count" else 2)),
                ("split.tensors.count", 5, struct.pack("<i", count + (wrong == "tensors"))),
            ]
            entries = file.entries if number == 0 else file.entries[:1]
            part = path.with_name(f"{stem}-0000{number + 1}-of-00002.gguf")
            write(part, File([*entries, *split], file.tensors[:1] if wrong == "twice" else tensors))
        if wrong == "missing":
            part.unlink()
        if wrong == "swapped":
            first = part.with_name(f"{stem}-00001-of-00002.gguf")
            a, b = first.read_bytes(), part.read_bytes()
            first.write_bytes(b), part.write_bytes(a)
        path.unlink()

    return damage


SOUND: dict[str, Damage] = {
    "nothing at all": lambda path, rng: None,
    "written anew": lambda path, rng: write(path, read(path)),
    "several types in a layer": _mixed,
    "two files": _split(""),
}
WRONG: dict[str, Damage] = {
    "2^60 entries of an array": _entry("token_type", lambda *_: _array(0, HUGE)),
    "2^60 strings": _entry("tokens", lambda *_: _array(STRING, HUGE)),
    "2^60 arrays": _entry("tokens", lambda *_: _array(ARRAY, HUGE)),
    "more entries than bytes": _entry("token_type", lambda *_: _array(5, 1 << 30)),
    "a string of 2^60 bytes": _entry("pre", lambda *_: (STRING, struct.pack("<Q", HUGE))),
    "arrays in arrays": _entry("token_type", lambda *_: _nested(20_000)),
    "2^60 tensors": _counts(HUGE, None),
    "2^60 entries": _counts(None, HUGE),
    "no tensors": _counts(0, None),
    "a tensor of 2^60 numbers": _sized(HUGE),
    "a tensor of 2^30 by 2^30": _sized(1 << 30, 1 << 30),
    "a tensor of 2^32 by 2^32": _sized(1 << 32, 1 << 32),
    "a tensor of no numbers": _sized(0, 16),
    "a tensor of 2^20 dimensions": _tensor(
        lambda file, at, rng: _replace(file, at, sizes=[1] * (1 << 20))
    ),
    "2^31 layers": _number("block_count", 1 << 31),
    "2^31 channels": _number("embedding_length", 1 << 31),
    "2^31 words": _number("vocab_size", 1 << 31),
    "2^31 heads": _number("head_count", 1 << 31),
    "no heads": _number("head_count", 0),
    "a layer less": _number("block_count", 4),
    "a layer more": _number("block_count", 6),
    "an MLP of 2^31": _number("feed_forward_length", 1 << 31),
    "heads a layer, too few": _entry("head_count_kv", lambda *_: _array(5, 2, b"\1\0\0\0" * 2)),
    "MLPs a layer, too many": _entry(
        "feed_forward_length", lambda *_: _array(5, 7, b"\x80\0\0\0" * 7)
    ),
    "layers are words": _entry("block_count", lambda *_: (STRING, struct.pack("<Q", 1) + b"5")),
    "layers are a fraction": _entry("block_count", lambda *_: (6, struct.pack("<f", 5.5))),
    "another family": _entry(
        "architecture", lambda *_: (STRING, struct.pack("<Q", 7) + b"granite")
    ),
    "a family of nobody": _entry(
        "architecture", lambda *_: (STRING, struct.pack("<Q", 3) + b"xyz")
    ),
    "a family with control characters": _entry(
        "architecture", lambda *_: (STRING, struct.pack("<Q", 4) + b"\x1b[2J")
    ),
    "an alignment of 3": _added("general.alignment", 3),
    "a token less": _fewer_tokens,
    "an entry twice": _twice,
    "no epsilon": _without("norm_rms_epsilon"),
    "no number of heads": _without("head_count"),
    "no length": _without("context_length"),
    "a name twice": _tensor(lambda file, at, rng: file.tensors.append(file.tensors[at])),
    "a tensor is missing": _tensor(lambda file, at, rng: file.tensors.pop(at)),
    "a tensor too many": _tensor(
        lambda file, at, rng: file.tensors.append(("blk.0.extra.weight", *file.tensors[at][1:]))
    ),
    "a bit of a name flipped": _tensor(_flip_name),
    "a row is missing": _tensor(_rows),
    "a matrix is turned": _tensor(_turned),
    "a matrix is flat": _tensor(_flat),
    "another type": _tensor(lambda file, at, rng: _replace(file, at, kind=1)),
    "a type of nobody": _tensor(lambda file, at, rng: _replace(file, at, kind=4711)),
    "a NaN": _weight(float("nan")),
    "an infinity": _weight(float("inf")),
    "a layer is missing": _without_layer,
    "cut short": _truncate,
    "a pointer of git-lfs": _pointer,
    "empty": lambda path, rng: path.write_bytes(b"") and None,
    "weights of another format": lambda path, rng: (
        path.write_bytes((path.parent / "tied" / "model.safetensors").read_bytes()) and None
    ),
    "one of two files is missing": _split("missing"),
    "two files, swapped": _split("swapped"),
    "two files of three": _split("count"),
    "two files, one tensor short": _split("tensors"),
    "two files with the same tensor": _split("twice"),
}
ODD: dict[str, Damage] = {
    "a bit of the header flipped": _flip_in_header,
    "an entry is missing": _drop_entry,
    "a huge number": _weight(3e38),
}
"""What may well be the same model, or another one."""

DAMAGES = {**SOUND, **WRONG, **ODD, **{f"{name}, again": each for name, each in ODD.items()}}


def _commands(model: str) -> list[Plan]:
    cut = ["prune", model, "-d", TEXT, *QUICK, "--remove", "2-3", "--dtype", "float32"]
    bare = [*cut, "--repair", "none"]
    dense = ["eval", model, *EVAL, "--device", "cpu", "--dtype", "float32"]
    return [
        Plan(dense, "", truth=model),
        Plan([*bare, "-o", "out.gguf"], "", truth=model, drop=[2, 3], made="out.gguf"),
        Plan([*cut, "-o", "out.gguf"], "", truth=model),
        Plan([*bare, "-o", "out.gguf", "--gguf-split", "1M"], "", truth=model),
        Plan([*bare, "-o", "out"], "", truth=model, drop=[2, 3]),
    ]


def make(place: Place, index: int) -> Plan:
    """A file with something wrong in it, under some command."""
    path = place.take("whole.gguf", "text.txt", "tied").with_name("whole.gguf")
    names = list(DAMAGES)
    name = names[index % len(names)]
    found = DAMAGES[name](path, place.rng)
    model = MODEL if path.exists() else "in/whole-00001-of-00002.gguf"
    plan = place.rng.choice(_commands(model))
    plan.label = f"{name}: {found}" if found else name
    plan.must = "succeed" if name in SOUND else "refuse" if name in WRONG else "either"
    plan.seconds = 40.0
    return plan
