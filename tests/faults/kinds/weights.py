"""Weights that are not those of the model: names, shapes, types, numbers, bytes."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from faults.kinds.commands import any_of
from faults.materials import Place, Plan

Tensors = dict[str, tuple[str, list[int], bytes]]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I64": 8, "U8": 1, "BOOL": 1}


def read(path: Path) -> Tensors:
    """A safetensors file, without the library."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (each["dtype"], each["shape"], body[slice(*each["data_offsets"])])
        for name, each in header.items()
    }


def write(path: Path, tensors: Tensors) -> None:
    """The other way."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (kind, shape, content) in tensors.items():
        end = start + len(content)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def make(place: Place, index: int) -> Plan:
    """A model with something wrong in its weights, under some command."""
    rng = place.rng
    model = place.take(rng.choice(["tied", "tied", "untied"]), "text.txt")
    file = model / "model.safetensors"
    names = list(DAMAGES)
    name = names[index % len(names)]
    label = DAMAGES[name](file, rng) or name
    return any_of(place, f"in/{model.name}", f"{name}: {label}" if label != name else name)


def _renamed(change: Callable[[str], str]) -> Callable[[Path, Random], None]:
    def damage(file: Path, rng: Random) -> None:
        write(file, {change(name): each for name, each in read(file).items()})

    return damage


def _one(change: Callable[[Tensors, str, Random], object]) -> Callable[[Path, Random], str]:
    """Change one tensor, whichever."""

    def damage(file: Path, rng: Random) -> str:
        tensors = read(file)
        name = rng.choice(sorted(tensors))
        change(tensors, name, rng)
        write(file, tensors)
        return name

    return damage


def _flip_in_name(tensors: Tensors, name: str, rng: Random) -> None:
    at = rng.randrange(len(name))
    tensors[name[:at] + chr(ord(name[at]) ^ 1) + name[at + 1 :]] = tensors.pop(name)


def _cut_rows(tensors: Tensors, name: str, rng: Random) -> None:
    kind, shape, content = tensors[name]
    row = len(content) // shape[0]
    tensors[name] = (kind, [shape[0] - 1, *shape[1:]], content[:-row])


def _transpose(tensors: Tensors, name: str, rng: Random) -> None:
    name = name if len(tensors[name][1]) == 2 else "model.embed_tokens.weight"
    kind, shape, content = tensors[name]
    turned = np.frombuffer(content, np.uint32).reshape(shape).T
    tensors[name] = (kind, [*turned.shape], turned.tobytes())


def _add_dimension(tensors: Tensors, name: str, rng: Random) -> None:
    kind, shape, content = tensors[name]
    tensors[name] = (kind, [1, *shape], content)


def _number(value: float) -> Callable[[Tensors, str, Random], None]:
    def change(tensors: Tensors, name: str, rng: Random) -> None:
        kind, shape, content = tensors[name]
        values = np.frombuffer(content, np.float32).copy()
        values[rng.randrange(len(values))] = value
        tensors[name] = (kind, shape, values.tobytes())

    return change


def _as_type(kind: str) -> Callable[[Tensors, str, Random], None]:
    """The same bytes under another type."""

    def change(tensors: Tensors, name: str, rng: Random) -> None:
        _, shape, content = tensors[name]
        size = SIZES[kind]
        count = int(np.prod(shape)) * size
        tensors[name] = (kind, shape, (content * 2)[:count])

    return change


def _copy_other(tensors: Tensors, name: str, rng: Random) -> None:
    tensors[f"{name}_copy"] = tensors[name]


def _swap_layers(file: Path, rng: Random) -> None:
    """A layer too many: the config says one less than the files."""
    tensors = read(file)
    last = {n.replace("layers.4.", "layers.5."): e for n, e in tensors.items() if "layers.4." in n}
    write(file, {**tensors, **last})


def _without_layer(file: Path, rng: Random) -> None:
    number = rng.randrange(5)
    write(file, {n: e for n, e in read(file).items() if f"layers.{number}." not in n})


def _own_head(file: Path, rng: Random) -> None:
    tensors = read(file)
    kind, shape, content = tensors["model.embed_tokens.weight"]
    values = np.frombuffer(content, np.float32) * np.float32(1.1) + np.float32(0.01)
    write(file, {**tensors, "lm_head.weight": (kind, shape, values.tobytes())})


def _without_head(file: Path, rng: Random) -> None:
    tensors = read(file)
    tensors.pop("lm_head.weight", None)
    write(file, tensors)
    config = file.parent / "config.json"
    config.write_text(config.read_text().replace('embeddings": true', 'embeddings": false'))


def _truncate(file: Path, rng: Random) -> str:
    length = rng.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(length)
    return f"after {length} bytes"


def _flip_in_header(file: Path, rng: Random) -> str:
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    at = rng.randrange(8 + length)
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"byte {at}"


def _pointer(file: Path, rng: Random) -> None:
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{'0' * 64}\nsize {file.stat().st_size}\n"
    )


def _beside(name: str) -> Callable[[Path, Random], None]:
    """A second file of weights that claims the same names."""

    def damage(file: Path, rng: Random) -> None:
        (file.parent / name).write_bytes(file.read_bytes())

    return damage


def _shards(file: Path, rng: Random) -> str:
    """Two shards and an index, one of whose entries is wrong."""
    tensors = read(file)
    names = sorted(tensors)
    parts = (names[::2], names[1::2])
    where = {}
    for number, part in enumerate(parts):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        write(file.parent / shard, {name: tensors[name] for name in part})
        where.update(dict.fromkeys(part, shard))
    file.unlink()
    what = rng.choice(["a shard is missing", "an entry is missing", "an entry is wrong", "none"])
    if what == "a shard is missing":
        (file.parent / "model-00002-of-00002.safetensors").unlink()
    elif what == "an entry is missing":
        del where[names[0]]
    elif what == "an entry is wrong":
        where[names[0]] = "../elsewhere.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    return what


def _pop(tensors: Tensors, name: str, rng: Random) -> None:
    del tensors[name]


DAMAGES: dict[str, Callable[[Path, Random], str | None]] = {
    "nothing at all": lambda file, rng: None,
    "module. before every name": _renamed("module.{}".format),
    "base_model.model. before every name": _renamed("base_model.model.{}".format),
    "no model. before any name": _renamed(lambda name: name.removeprefix("model.")),
    "names of another family": _renamed(lambda name: name.replace("model.layers", "transformer.h")),
    "a name is missing": _one(_pop),
    "a bit of a name flipped": _one(_flip_in_name),
    "a tensor too many": _one(_copy_other),
    "a row is missing": _one(_cut_rows),
    "a matrix is transposed": _one(_transpose),
    "a dimension too many": _one(_add_dimension),
    "a NaN": _one(_number(float("nan"))),
    "an infinity": _one(_number(float("inf"))),
    "a huge number": _one(_number(3e38)),
    "integers": _one(_as_type("I8")),
    "another type, F64": _one(_as_type("F64")),
    "truth values": _one(_as_type("BOOL")),
    "a layer more than the config says": _swap_layers,
    "a layer is missing": _without_layer,
    "a head of its own under a config that says tied": _own_head,
    "no head under a config that says untied": _without_head,
    "cut short": _truncate,
    "a bit of the header flipped": _flip_in_header,
    "a pointer of git-lfs": _pointer,
    "empty": lambda file, rng: file.write_bytes(b"") and None,
    "a second file with the same names": _beside("model-00001-of-00001.safetensors"),
    "shards": _shards,
    "no weights": lambda file, rng: file.unlink(),
}
