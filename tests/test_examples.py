"""Every example runs: on a tiny model here, as it stands on SmolLM2 where that can be fetched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gguf_models import family, with_a_merge, write
from ghostlayers.checkpoint.gguf_export import export_gguf

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNNABLE = sorted(each for each in EXAMPLES.iterdir() if each.suffix in {".py", ".sh"})
NOTEBOOK = json.loads((EXAMPLES / "look.ipynb").read_text())

real = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("GHOSTLAYERS_OFFLINE") == "1",
        reason="GHOSTLAYERS_OFFLINE=1: SmolLM2 cannot be fetched from the package index",
    ),
]


def run(*command: str | Path, at: Path, **variables: str) -> str:
    """What a program says that is started in a folder of its own."""
    environment = {**os.environ, "PYTHON": sys.executable, "MPLBACKEND": "Agg", **variables}
    done = subprocess.run(
        [str(each) for each in command],
        capture_output=True, text=True, check=False, cwd=at, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def notebook_as_program() -> str:
    """The notebook's cells one after the other; a picture is kept of every figure."""
    cells = [each for each in NOTEBOOK["cells"] if each["cell_type"] == "code"]
    keep = "\n[plt.figure(n).savefig(f'{n}.png') for n in plt.get_fignums()]\nprint(losses.keys())"
    return "\n".join("".join(each["source"]) for each in cells) + keep


@pytest.fixture
def text(some_text: list[str], tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(some_text))
    return file


@pytest.mark.slow
def test_a_first_cut(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    given = ("--model", tiny_folder, "--data", text, "--layers", "2", "--windows", "8")
    said = run(
        sys.executable, EXAMPLES / "first_cut.py", *given, "--sequence-length", "64", at=tmp_path
    )
    assert "logits are identical: True" in said
    assert (tmp_path / "first-cut" / "config.json").is_file()


@pytest.mark.slow
def test_healing(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    given = ("--model", tiny_folder, "--data", text, "--layers", "2", "--minutes", "0.05")
    said = run(sys.executable, EXAMPLES / "heal.py", *given, "--sequence-length", "64", at=tmp_path)
    assert "step 0: " in said
    assert (tmp_path / "healed").is_dir() == ("saved: healed" in said)


@pytest.mark.slow
def test_a_gguf_file(text: Path, tmp_path: Path, byte_tokenizer: Any) -> None:
    folder = with_a_merge(write(family("llama"), byte_tokenizer, tmp_path / "model"))
    model = tmp_path / "model.gguf"
    export_gguf(folder, model, pre_tokenizer="gpt-2", dtype="float32")
    said = run(
        "bash", EXAMPLES / "gguf.sh", model, "smaller.gguf", text,
        at=tmp_path, LAYERS="1", WINDOWS="8", LENGTH="48",
    )  # fmt: skip
    assert (tmp_path / "smaller.gguf").is_file()
    assert "Removed: layers" in said


@pytest.mark.slow
@pytest.mark.parametrize("draft", [False, True])
def test_serving(draft: bool, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """vLLM itself is not run here: the checkpoint is made, and the command is told."""
    given = (tiny_folder, "out", *(["--draft"] if draft else []))
    small = {"LAYERS": "2", "WINDOWS": "8", "LENGTH": "64", "REPAIR": "refit:1"}
    wanted = {**small, "DATA": str(text), "PRINT": "1"}
    if draft:
        (tmp_path / "out").mkdir()  # one that is there is taken as it is
    said = run("bash", EXAMPLES / "serve.sh", *given, at=tmp_path, **wanted)
    assert (tmp_path / "out" / "config.json").is_file() != draft
    assert ("num_speculative_tokens" in said) == draft
    assert f"'{tiny_folder if draft else 'out'}' '--port'" in said


@pytest.mark.slow
def test_the_notebook(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(notebook_as_program())
    small = {"MODEL": str(tiny_folder), "LAYERS": "2", "LENGTH": "64"}
    said = run(sys.executable, "look.py", at=tmp_path, **small)
    assert "joint:x+z" in said
    assert [each.name for each in sorted(tmp_path.glob("*.png"))] == ["1.png", "2.png"]


def test_the_notebook_is_kept_without_what_it_showed() -> None:
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_examples_are_short_and_told_of(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert f"({path.name})" in (EXAMPLES / "README.md").read_text()


class TestReal:
    pytestmark = real

    @pytest.mark.slow
    def test_a_first_cut(self, tmp_path: Path) -> None:
        said = run(sys.executable, EXAMPLES / "first_cut.py", at=tmp_path)
        assert "The capital of France is" in said

    @pytest.mark.slow
    def test_the_notebook(self, tmp_path: Path) -> None:
        (tmp_path / "look.py").write_text(notebook_as_program())
        assert "ghost" in run(sys.executable, "look.py", at=tmp_path)
