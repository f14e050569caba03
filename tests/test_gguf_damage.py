"""GGUF files that are not what they say are refused by name, soon, and without much memory."""

import contextlib
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import gguf
import pytest

from faults.kinds import gguf_files
from faults.kinds.gguf_files import ODD, SOUND, WRONG
from ghostlayers.errors import GhostlayersError, ModelError
from ghostlayers.model.gguf_file import LONGEST_ARRAY, open_gguf
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions
from test_gguf_copy import made

HOW = RunOptions(dtype="float32", device="cpu")
SHOWN_LATER = {"a NaN", "an infinity"}
"""What is seen when it is computed with."""


@pytest.fixture(scope="module")
def sound(byte_tokenizer: Any, tmp_path_factory: Any) -> Path:
    return made("llama", byte_tokenizer, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def file(sound: Path, tmp_path: Path) -> Path:
    (tmp_path / "tied").mkdir()
    shutil.copy(sound.parent / "model" / "model.safetensors", tmp_path / "tied")
    return Path(shutil.copy(sound, tmp_path / "whole.gguf"))


def first_of(file: Path) -> str:
    """The file, or the first of several."""
    return str(file if file.exists() else file.with_name("whole-00001-of-00002.gguf"))


@pytest.mark.parametrize("name", [name for name in WRONG if name not in SHOWN_LATER])
def test_what_is_wrong_is_refused(name: str, file: Path) -> None:
    rng, began = random.Random(name), time.process_time()
    WRONG[name](file, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GhostlayersError) as refused:
        load_model(first_of(file), HOW, exact=True)
    assert str(refused.value).isprintable()
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_read(name: str, file: Path) -> None:
    SOUND[name](file, random.Random(0))
    assert load_model(first_of(file), HOW, exact=True).num_layers == 5


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("seed", range(12))
def test_what_is_odd_is_read_or_refused(name: str, seed: int, file: Path) -> None:
    ODD[name](file, random.Random(seed))
    with contextlib.suppress(GhostlayersError):  # any other error fails
        load_model(str(file), HOW, exact=True)


def test_the_library_itself_reads_what_the_campaign_writes(file: Path) -> None:
    """The campaign's own reader and writer are held to the library's."""
    before = gguf.GGUFReader(file)
    said = {key: field.contents() for key, field in before.fields.items()}
    held = {each.name: each.data.tobytes() for each in before.tensors}
    gguf_files.write(file.with_name("again.gguf"), gguf_files.read(file))
    after = gguf.GGUFReader(file.with_name("again.gguf"))
    assert {key: field.contents() for key, field in after.fields.items()} == said
    assert {each.name: each.data.tobytes() for each in after.tensors} == held


def test_arrays_may_be_as_long_as_vocabularies_are(file: Path) -> None:
    """A header may well name a million merges, but no array of every byte of a large file."""
    content = gguf_files.read(file)
    at = content.place("merges")
    one = gguf_files.struct.pack("<Q", 3) + b"t h"
    many = gguf_files._array(gguf_files.STRING, 50_000, one * 50_000)
    content.entries[at] = (content.entries[at][0], *many)
    gguf_files.write(file, content)
    assert len(open_gguf(file).parts.fields["tokenizer.ggml.merges"].data) == 50_000
    content.entries[at] = (content.entries[at][0], *gguf_files._array(0, LONGEST_ARRAY + 1))
    content.tensors.append(("zeros", [LONGEST_ARRAY], 24, b"\0" * (LONGEST_ARRAY + 64)))
    gguf_files.write(file, content)
    with pytest.raises(ModelError, match="names an array of 8388609 entries"):
        open_gguf(file)
