"""Killed before any step on the disk, what stays quantised is there whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostlayers
from conftest import make_tiny_llama
from ghostlayers.checkpoint import gguf_copy, saving
from ghostlayers.checkpoint.gguf_copy import GgufCut, cut_gguf, write_gguf_cut
from ghostlayers.checkpoint.gguf_encoding import fallback_named
from ghostlayers.checkpoint.proof import Verification
from ghostlayers.errors import OutputError
from ghostlayers.model.gguf_file import open_gguf
from ghostlayers.runtime.locks import holding
from ghostlayers.spans import Span, kept_layers
from ghostlayers.surgery import removal
from kills import kills
from packers import pack_folder
from test_gguf_copy import HOW, MIXED, made, opened

SPLIT = 45_000
"""Bytes of a part: three of them."""


@pytest.fixture(scope="module")
def cut(byte_tokenizer: Any, tmp_path_factory: Any) -> GgufCut:
    dense = opened(made("llama", byte_tokenizer, tmp_path_factory.mktemp("base"), MIXED))
    spans = (Span(2, 4),)
    pruned = removal.prune_layers(dense, spans)
    return cut_gguf(dense, pruned, kept_layers(spans, 5), fallback_named("Q8_0"))


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model computes is proved elsewhere, and changes no disk."""
    nothing = Verification(True, 0.0, 0)
    monkeypatch.setattr(gguf_copy, "_prove_model", lambda *_: nothing)
    torch.set_num_threads(1)


def save(
    cut: GgufCut, out: Path, split: int, name: str = "new", *, overwrite: bool = False
) -> None:
    with holding(out, f"request of {name}", replace=overwrite):
        write_gguf_cut(cut, out, {"name": name}, split=split, overwrite=overwrite)


def held(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name[0] != "."}


def is_read(files: dict[str, bytes], place: Path) -> bool:
    """Whether somebody who names the first file gets a model."""
    first = next((name for name in files if "-of-" not in name or "-00001-" in name), None)
    if first is None:
        return False
    open_gguf(place / first)
    return True


def emptied(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


@pytest.mark.slow
@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("split", [0, SPLIT])
def test_a_new_file_is_there_whole_or_not_at_all(cut: GgufCut, split: int, tmp_path: Path) -> None:
    place = tmp_path / "place"
    out, count, published = place / "small.gguf", 0, 0
    emptied(place)
    save(cut, out, split)
    whole = held(place)
    assert len(whole) == (3 if split else 1)
    for _ in kills(lambda: emptied(place), lambda: save(cut, out, split)):
        count += 1
        files = held(place)
        assert files.items() <= whole.items()
        assert is_read(files, place) is (files == whole)
        if files:
            published += 1
            with pytest.raises(OutputError, match="exists already"):
                save(cut, out, split, "another")
        save(cut, out, split)
        assert held(place) == whole
        assert len(list(place.iterdir())) == len(whole)
    assert count > 8
    assert published
    with pytest.raises(OutputError, match="exists already"):
        save(cut, out, split)


@pytest.mark.slow
@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("split", [0, SPLIT])
def test_files_that_are_replaced_are_the_old_or_the_new_ones(
    cut: GgufCut, split: int, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    out, count = place / "small.gguf", 0

    def prepare() -> None:
        emptied(place)
        save(cut, out, split, "old")

    prepare()
    old = held(place)
    save(cut, out, split, overwrite=True)
    new = held(place)
    assert old.keys() == new.keys()
    assert old != new
    for _ in kills(prepare, lambda: save(cut, out, split, overwrite=True)):
        count += 1
        files = held(place)
        if files not in (old, new):  # then nobody takes them for a model
            assert split
            assert not is_read(files, place)
        with holding(out):  # what any next command does first
            assert held(place) in (old, new)
        save(cut, out, split, overwrite=True)
        assert held(place) == new
        assert len(list(place.iterdir())) == len(new)
    assert count > 8


@pytest.mark.usefixtures("unproved")
def test_parts_that_cannot_get_their_names_leave_the_old_ones(
    cut: GgufCut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small.gguf"
    save(cut, out, SPLIT, "old")
    old, real = held(tmp_path), Path.replace

    def full(self: Path, target: Path) -> Path:
        if target == out.with_name("small-00002-of-00003.gguf") and self.suffix == ".gguf":
            assert out.with_name("small-00003-of-00003.gguf").exists()  # it came before
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OutputError, match="No space left"):
            save(cut, out, SPLIT, overwrite=True)
    assert held(tmp_path) == old
    assert len(list(tmp_path.iterdir())) == len(old)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_packed_folder_is_there_whole_or_not_at_all(
    byte_tokenizer: Any, some_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, place = tmp_path / "base", tmp_path / "place"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    make_tiny_llama(**sizes).half().save_pretrained(base)
    byte_tokenizer.save_pretrained(base)
    pack_folder(base, "gptq")
    pruned = ghostlayers.prune(
        str(base), data=some_text, remove="2", repair="refit:1", windows=2, fit_windows=2,
        held_out_windows=1, sequence_length=64, options=HOW,
    )  # fmt: skip
    monkeypatch.setattr(saving, "verify_packed", lambda *_: Verification(True, 0.0, 0))
    torch.set_num_threads(1)
    out, count, published = place / "small", 0, 0

    def write(request: str = "this") -> None:
        with holding(out, request):
            pruned.save(out)

    def bits() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir()}

    emptied(place)
    write()
    whole = bits()
    for _ in kills(lambda: emptied(place), write):
        count += 1
        if out.exists():
            published += 1
            assert bits() == whole
            with pytest.raises(OutputError, match="exists already"):
                write("another")
        write()
        assert bits() == whole
        assert [path.name for path in place.iterdir()] == ["small"]
    assert count > 12
    assert published
