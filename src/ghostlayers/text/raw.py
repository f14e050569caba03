"""Files as bytes and as UTF-8 text: what may be opened, decompression, stretches that end well."""

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from ghostlayers.errors import CorpusError

MAX_LINE = 1 << 24
"""Bytes of one line, or of one value, that are read at once."""

WHOLE = 4_000_000
"""Characters of a source that are read whole: a few seconds of tokenising."""

BLOCK = 1 << 16
"""Bytes of a large text that are one document."""

_LOOK = 1 << 12
"""Bytes that are searched for a good place to end a block."""

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with UTF-16's
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of what is not UTF-8."""

_LFS = b"version https://git-lfs.github.com/spec/"

_KINDS = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def _open_zstandard(path: Path, mode: str) -> Any:
    reader = zstandard.ZstdDecompressor().stream_reader(
        path.open(mode), read_across_frames=True, closefd=True
    )
    return io.BufferedReader(cast(io.RawIOBase, reader), BLOCK)


COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
"""Endings of compressed files, and what reads them."""

DAMAGED = (zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What their readers raise."""


def check_regular(path: Path) -> None:
    """Refuse what is no plain file, and what stands for a file that is elsewhere.

    Raises:
        CorpusError: a pipe, device, socket, or a pointer of git-lfs; no permission.
    """
    try:
        mode = path.stat().st_mode
        kind = next((words for test, words in _KINDS.items() if test(mode)), None)
        if kind is not None:
            raise CorpusError(f"'{path}' is {kind}, not a file; write its text to a file first.")
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise CorpusError(f"cannot read '{path}': {error.strerror or error}.") from error
    if head == _LFS:
        raise CorpusError(
            f"'{path}' is a pointer of git-lfs, not the file itself; fetch it with 'git lfs pull'."
        )


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed by its ending."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") if opener is None else opener(path, "rb") as file:
        yield cast(IO[bytes], file)


def decode(data: bytes, offset: int = 0) -> str:
    """Bytes as UTF-8, with plain line ends; a byte order mark at the start of a file is dropped.

    Args:
        data: the bytes.
        offset: where in the file they lie.

    Raises:
        CorpusError: they are no UTF-8 text.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), None)
    if offset == 0 and mark is not None:
        coding = _MARKS[mark]
        raise CorpusError(f"it is {coding}; convert it first: iconv -f {coding} -t UTF-8")
    if b"\0" in data:
        raise CorpusError(
            f"byte {offset + data.index(0):,} is NUL, which no text has: a binary file, or one in "
            "UTF-16 or UTF-32; convert it to UTF-8 first"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"byte {offset + error.start:,} (0x{data[error.start]:02x}) is not UTF-8; convert it "
            "first, for example: iconv -f LATIN1 -t UTF-8"
        ) from error
    text = text.removeprefix("\ufeff") if offset == 0 else text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their places; of one that is longer than `MAX_LINE`, its beginning."""
    offset = 0
    while line := file.readline(MAX_LINE):
        yield offset, line
        offset += len(line)
        while not line.endswith(b"\n") and (line := file.readline(BLOCK)):
            offset += len(line)


def blocks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """A text in its blocks, each with its place: the same ones however it is read."""
    begin, nominal, data = 0, BLOCK, b""
    while True:
        data += file.read(nominal + _LOOK - begin - len(data))
        if begin + len(data) < nominal + _LOOK:  # the end
            last = _border(data[nominal - begin :]) if begin + len(data) > nominal else 0
            cut = nominal - begin + last if begin + len(data) > nominal else len(data)
            yield from ((begin, part) for part in (data[:cut],) if part)
            if data[cut:]:
                yield begin + cut, data[cut:]
            return
        cut = nominal - begin + _border(data[nominal - begin :])
        yield begin, data[:cut]
        begin, data, nominal = begin + cut, data[cut:], nominal + BLOCK


def block_at(file: IO[bytes], number: int, size: int) -> tuple[int, bytes]:
    """One block of `blocks`, by its number, read by itself."""
    nominal = number * BLOCK
    file.seek(nominal)
    data = file.read(BLOCK + _LOOK)
    first = _border(data[:_LOOK]) if number else 0
    last = len(data)
    if nominal + BLOCK < size:
        last = BLOCK + _border(data[BLOCK:])
    return nominal + first, data[first:last]


def _border(data: bytes) -> int:
    """Where a block may end: behind a blank line, a line or a word, or before a character."""
    for mark in (b"\n\n", b"\n", b" "):
        place = data.find(mark)
        if place >= 0:
            return place + len(mark)
    return next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
