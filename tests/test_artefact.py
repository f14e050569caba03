"""What an installation has: CI runs this with the wheel, too, in an environment of its own.

The installed program is started as users start it, in a folder that has nothing to do with it.
"""

import subprocess
import sys
import sysconfig
from importlib import metadata, resources
from pathlib import Path

import pytest

PROGRAM = Path(sysconfig.get_path("scripts")) / "ghostlayers"


def call(*arguments: str | Path, at: Path) -> str:
    """What the installed program says."""
    done = subprocess.run(
        [str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=at
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_model_is_cut_measured_and_described(
    tiny_folder: Path, some_text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(some_text))
    text = ("--data", "text.txt", "--sequence-length", "64")
    small = ("--layers", "2", "--windows", "8", "--held-out-windows", "2")
    assert "bit for bit" in call("prune", tiny_folder, "-o", "out", *text, *small, at=tmp_path)
    against = ("--against", tiny_folder, "--continuations", "0", "--max-windows", "2")
    assert "text.txt" in call("eval", "out", *against, *text, at=tmp_path)
    assert "ghost" in call("inspect", "out", at=tmp_path)
    load = (
        "import ghostlayers; from transformers import AutoModelForCausalLM as Auto; "
        "print(type(Auto.from_pretrained('out')).__name__)"
    )
    run = [sys.executable, "-P", "-c", load]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "RepairedLlamaForCausalLM"


@pytest.mark.slow
def test_files_that_are_no_code_are_installed(tmp_path: Path) -> None:
    package = resources.files("ghostlayers")
    assert (package / "py.typed").is_file()
    assert any(each.name.endswith(".yaml") for each in (package / "preset_files").iterdir())
    assert "ghosted" in call("methods", at=tmp_path)


def test_entry_points_are_found_and_can_be_loaded() -> None:
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="ghostlayers")
    (script,) = metadata.entry_points(group="console_scripts", name="ghostlayers")
    assert callable(plugin.load())
    assert callable(script.load())


def test_the_program_says_the_installed_version(tmp_path: Path) -> None:
    assert (
        call("--version", at=tmp_path).strip() == f"ghostlayers {metadata.version('ghostlayers')}"
    )
