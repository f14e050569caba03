"""GGUF files that are not what they say are refused by name, soon, and without much memory."""

import contextlib
import math
import random
import resource
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from faults.kinds import gguf_files
from faults.kinds.gguf_files import ODD, SOUND, WRONG
from ghostlayers.errors import GhostlayersError, ModelError
from ghostlayers.model.gguf_entries import SETTINGS, SPECIAL
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


NUMBERS = {
    "rope.freq_base": (0.0, -1.0), "attention.layer_norm_rms_epsilon": (-1.0,),
    "rope.scaling.factor": (-1.0,), "final_logit_softcapping": (-1.0,),
    "expert_weights_scale": (),
}  # fmt: skip


def refused_with(file: Path, key: str, value: tuple[int, bytes]) -> str:
    """What is said of a file with an entry of another type and bytes."""
    content = gguf_files.read(file)
    others = [entry for entry in content.entries if entry[0] != key]
    gguf_files.write(file, replace(content, entries=[*others, (key, *value)]))
    with pytest.raises(ModelError) as refused:
        open_gguf(file)
    return str(refused.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_header_are_numbers_within_their_bounds(name: str, file: Path) -> None:
    key = f"llama.{name}"
    for value in (*NUMBERS[name], math.inf, -math.inf, math.nan):
        said = refused_with(file, key, (6, struct.pack("<f", value)))
        assert f"{key}: expected a" in said, value


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_of_a_header_are_no_text(name: str, file: Path) -> None:
    value = (4, struct.pack("<I", 5)) if name.endswith("type") else (8, struct.pack("<Q", 1) + b"1")
    assert f"llama.{name}: expected a valid" in refused_with(file, f"llama.{name}", value)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_are_of_the_vocabulary(name: str, file: Path) -> None:
    key = f"tokenizer.ggml.{name}_token_id"
    values = [(4, struct.pack("<I", 99_999)), (5, struct.pack("<i", -1))]
    for value in (*values, (8, struct.pack("<Q", 1) + b"1")):
        assert f"{key}: expected the number of one of its" in refused_with(file, key, value)


@pytest.mark.parametrize("name", ["attn_q.scale", "attn_k.bias", "attn_q.weight"])
def test_rows_that_are_those_of_no_heads_are_told_by_tensor(name: str, file: Path) -> None:
    content = gguf_files.read(file)
    others = [tensor for tensor in content.tensors if tensor[0] != f"blk.0.{name}"]
    content.tensors = [*others, (f"blk.0.{name}", [1], 0, bytes(4))]
    gguf_files.write(file, content)
    with pytest.raises(ModelError, match=rf"'blk\.0\.{name}' has 1 rows, expected a multiple"):
        open_gguf(file)


def test_the_library_itself_reads_what_the_campaign_writes(file: Path) -> None:
    """The campaign's own reader and writer are held to the library's."""
    before = gguf.GGUFReader(file)
    said = {key: field.contents() for key, field in before.fields.items()}
    held = {each.name: each.data.tobytes() for each in before.tensors}
    gguf_files.write(file.with_name("again.gguf"), gguf_files.read(file))
    after = gguf.GGUFReader(file.with_name("again.gguf"))
    assert {key: field.contents() for key, field in after.fields.items()} == said
    assert {each.name: each.data.tobytes() for each in after.tensors} == held


@pytest.mark.slow
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
