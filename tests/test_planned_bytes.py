"""What a plan says of disk is what is written: packed bases, GGUF files, files made of folders."""

from pathlib import Path
from typing import Any

import pytest

import ghostlayers
from conftest import make_tiny_llama
from gguf_models import family, with_a_merge, write
from ghostlayers import pipeline
from ghostlayers.checkpoint.output import Output
from ghostlayers.recipe import RunOptions
from packers import pack_folder
from test_gguf_copy import MIXED, made

OPTIONS = RunOptions(dtype="float32", device="cpu")
GIVEN: dict[str, Any] = {
    "windows": 4, "fit_windows": 4, "held_out_windows": 1, "sequence_length": 64,
    "options": OPTIONS,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries of packed formats warn a lot


@pytest.fixture(scope="module")
def bases(byte_tokenizer: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """A base of every kind."""
    folder = tmp_path_factory.mktemp("bases")
    found: dict[str, Path] = {}
    for name, types in (("plain.gguf", None), ("mixed.gguf", MIXED)):
        (folder / name).mkdir()
        found[name] = made("llama", byte_tokenizer, folder / name, types)
    found["folder"] = with_a_merge(write(family("llama"), byte_tokenizer, folder / "folder"))
    for scheme in ("gptq", "awq"):
        small = make_tiny_llama(
            hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
        )
        write(small.half(), byte_tokenizer, folder / scheme)
        pack_folder(folder / scheme, scheme)
        found[scheme] = folder / scheme
    return found


CASES = [
    *(("plain.gguf", repair, "small.gguf") for repair in ("none", "refit:1", "magnitude")),
    *(("mixed.gguf", repair, "small.gguf") for repair in ("none", "refit:2", "magnitude")),
    *(("gptq", repair, "small") for repair in ("none", "refit:1", "refit:2", "magnitude", "ghost")),
    *(("awq", repair, "small") for repair in ("none", "refit:1")),
    ("folder", "refit:1", "small"),
    ("folder", "refit:1", "small.gguf"),
    ("gptq", "refit:1", "small.gguf"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "repair", "name"), CASES)
def test_planned_bytes_are_those_that_are_written(
    base: str, repair: str, name: str, bases: dict[str, Path], some_text: list[str], tmp_path: Path
) -> None:
    out = tmp_path / name
    output = Output(folder=out, pre_tokenizer=None if base.endswith(".gguf") else "gpt-2")
    if output.file is None:
        output = Output(folder=out)
    choices = {**GIVEN, "remove": "2-3", "repair": repair}
    planned = pipeline.plan(str(bases[base]), output=output, **choices).lines[-1]
    pruned = ghostlayers.prune(str(bases[base]), data=some_text, output=output, **choices)
    if output.is_file:
        pruned.save_gguf(out, pre_tokenizer=output.pre_tokenizer)
        size = out.stat().st_size
    else:
        pruned.save(out)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert planned.disk == pytest.approx(size, rel=0.1)
