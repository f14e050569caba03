"""The code in the documentation runs, or says why it is not run here.

Blocks of a page run in order in one folder, where ``HuggingFaceTB/SmolLM2-135M`` is a small random
Llama and ``c4`` a small text; `documented` says what else is made smaller. Commands of blocks that
are not run are read by the real command line.
"""

import functools
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import ghostlayers
from conftest import make_documents, make_tiny_llama
from documented import (
    CALLS,
    PAGES,
    ROOT,
    Block,
    blocks_of,
    ours,
    outputs_of,
    smaller_code,
    smaller_command,
)
from ghostlayers.cli import app
from ghostlayers.cli.app import command_named
from ghostlayers.cli.parameters import Parameters
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.launchers import alone

BLOCKS = {page: blocks_of(page) for page in PAGES}
MODEL_NAMES = ("HuggingFaceTB/SmolLM2-135M", "smollm2")

pytestmark = pytest.mark.filterwarnings("ignore")


def name_of(thing: Path | Block) -> str:
    if isinstance(thing, Block):
        return f"{thing.page.relative_to(ROOT)}:{thing.line}"
    return str(thing.relative_to(ROOT))


def pages_with(*languages: str, run: bool) -> list[Path]:
    """Pages with such a block that is run, or is not."""
    return [
        page
        for page, blocks in BLOCKS.items()
        if any(b.language in languages and (not b.reason) == run for b in blocks)
    ]


def test_blocks_are_found() -> None:
    assert len([block for blocks in BLOCKS.values() for block in blocks if not block.reason]) > 15
    assert len([block for blocks in BLOCKS.values() for block in blocks if block.reason]) > 20


@pytest.mark.parametrize(
    "block", [b for bs in BLOCKS.values() for b in bs if b.language != "python"], ids=name_of
)
def test_commands_are_ones_that_the_program_takes(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    commands = [ours(words) for words in block.commands]
    if None in commands:
        assert block.reason, "other programs are not run here: say so, <!-- not run: why -->"
    for words in commands:
        if words is not None:
            read(words)


def read(words: list[str]) -> None:
    """Read a command as the program does, up to where it would begin."""
    group: Any = get_command(app)
    if words[0].startswith("-"):
        return
    assert words[0] in group.commands, words[0]
    context = group.commands[words[0]].make_context(words[0], words[1:])
    parameters = Parameters(inspect.unwrap(command_named(words[0])))
    known = parameters.signature.parameters
    parameters.arguments({n: v or None for n, v in context.params.items() if n in known})


@pytest.mark.parametrize(
    "words",
    [
        "prune MODEL -o OUT --layer 7 --data c4",
        "prune MODEL -o OUT --layers seven --data c4",
        "prune MODEL -o OUT --layers 7 --data c4 --repair goast",
        "prune MODEL --layers 7 --data c4",
        "purne MODEL",
    ],
)
def test_commands_that_it_does_not_take_are_found(words: str) -> None:
    with pytest.raises(Exception, match=r"--layer|valid integer|goast|output|purne"):
        read(words.split())


@pytest.mark.parametrize("page", pages_with("python", run=False), ids=name_of)
def test_python_that_is_not_run_is_python(page: Path) -> None:
    for block in BLOCKS[page]:
        if block.language == "python" and block.reason:
            compile(block.text, name_of(block), "exec")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A folder with the models and texts that pages name."""
    stage = tmp_path_factory.mktemp("documentation")
    model = make_tiny_llama(num_hidden_layers=10, initializer_range=0.2)
    for name in MODEL_NAMES:
        model.save_pretrained(stage / name)
        byte_tokenizer.save_pretrained(stage / name)
    documents = make_documents(60)
    for name in ("c4", "wikitext2"):
        rows = (json.dumps({"text": document}) for document in documents)
        (stage / f"{name}.jsonl").write_text("\n".join(rows))
    (stage / "documents.txt").write_text("\n\n".join(documents))
    ghostlayers.prune(
        str(stage / MODEL_NAMES[0]), layers=7, data=documents, **CALLS
    ).save(stage / "smaller")  # fmt: skip
    return stage


@pytest.fixture
def place(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its copy for one page, with calls in Python that are content with its texts."""
    place = tmp_path / "place"
    shutil.copytree(stage, place)
    monkeypatch.chdir(place)
    few = functools.partial(with_few_windows, CALLS)
    monkeypatch.setattr(ghostlayers, "prune", few(ghostlayers.prune))
    monkeypatch.setattr(ghostlayers.Study, "open", few(ghostlayers.Study.open))
    short = functools.partial(with_few_windows, {"sequence_length": 64})
    monkeypatch.setattr(ghostlayers, "evaluate", short(ghostlayers.evaluate))
    monkeypatch.setattr(ghostlayers, "heal", short(ghostlayers.heal))
    return place


def with_few_windows(choices: dict[str, int], function: Any) -> Any:
    """A function that is called with these choices, whatever else is asked for."""
    return lambda *given, **named: function(*given, **{**named, **choices})


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash", "sh", "python", run=True), ids=name_of)
def test_blocks_run(page: Path, place: Path) -> None:
    known: dict[str, Any] = {"__name__": "documentation"}
    for block in BLOCKS[page]:
        if not block.reason:
            for output in outputs_of(block.text):
                shutil.rmtree(place / output, ignore_errors=True)
            run(block, known)


def run(block: Block, known: dict[str, Any]) -> None:
    """Run a block, in Python with the names that the blocks before it made."""
    if block.language == "python":
        exec(compile(smaller_code(block.text), name_of(block), "exec"), known)
        return
    for words in block.commands:
        made = smaller_command(ours(words) or [])
        result = CliRunner().invoke(app, made)
        assert result.exit_code == 0, f"{name_of(block)}: {' '.join(made)}\n{result.output}"


# The script of docs/how-to/quantised.md: cut models, folds and custom ones, through llm-compressor.
# Skipped where that is neither installed beside this package nor in the environment whose Python
# GHOSTLAYERS_LLMCOMPRESSOR_PYTHON names.
QUANTISED = ROOT / "docs" / "how-to" / "quantised.md"
PYTHON = os.environ.get("GHOSTLAYERS_LLMCOMPRESSOR_PYTHON") or (
    sys.executable if importlib.util.find_spec("llmcompressor") else ""
)
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module", params=["refit:1", "ghost"])
def cut(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any
) -> Path:
    """A folder with a cut model, the script and a text."""
    if not PYTHON:
        pytest.skip("llm-compressor is not installed")
    place = tmp_path_factory.mktemp("quantise")
    make_tiny_llama(**SIZES).bfloat16().save_pretrained(place / "plain")
    byte_tokenizer.save_pretrained(place / "plain")
    ghostlayers.prune(
        str(place / "plain"), remove="2-3", repair=request.param, data=make_documents(80),
        windows=8, fit_windows=8, sequence_length=64, held_out_windows=1,
        options=RunOptions(dtype="float32", device="cpu"),
    ).save(place / "cut")  # fmt: skip
    (script,) = (block.text for block in BLOCKS[QUANTISED] if block.language == "python")
    (place / "quantise.py").write_text(script)
    (place / "text.txt").write_text("\n\n".join(make_documents(20)))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq", "awq", "w8a8"])
def test_a_cut_model_goes_through_llm_compressor(cut: Path, scheme: str) -> None:
    if scheme == "awq" and not torch.accelerator.is_available():
        pytest.skip("llm-compressor 0.14 pins memory for it, which takes an accelerator")
    command = [PYTHON, "quantise.py", "cut", f"cut-{scheme}", scheme, "text.txt"]
    done = subprocess.run(
        command, cwd=cut, env={**alone(), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = cut / f"cut-{scheme}"
    tensors, before = load_file(out / "model.safetensors"), load_file(cut / "cut/model.safetensors")
    assert any(name.endswith(("weight_packed", "weight_scale")) for name in tensors)
    for name, tensor in before.items():
        if "repair_" in name:
            assert torch.equal(tensors[name], tensor)
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    ids = torch.arange(60)[None]
    with torch.no_grad():
        got, want = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
            for folder in (out, cut / "cut")
        )
    # Four bits in groups of 128 are coarse for random weights; another layer would give 1.4.
    assert float((got - want).norm() / want.norm()) < (0.1 if scheme == "w8a8" else 0.8)


def test_the_readme_is_short() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(text.split()) <= 700


def test_the_two_commands_of_a_clone_stand_in_the_readme() -> None:
    targets = (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test", "make docs"):
        assert command in (ROOT / "README.md").read_text()
        assert f"\n{command.removeprefix('make ')}:" in targets


def test_every_command_has_its_options_on_the_site() -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    marks = re.findall(r"^## ([\w-]+)\n\n<!-- options: ([\w-]+) -->$", page, re.MULTILINE)
    assert marks == [(name, name) for name in get_command(app).commands]  # type: ignore[attr-defined]


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    shown = set(re.findall(r"^::: ghostlayers\.(\w+)$", page, re.MULTILINE))
    assert shown == set(ghostlayers.__all__)
