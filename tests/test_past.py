"""What earlier versions wrote still loads, runs, and computes the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import ghostlayers
import stranger
from ghostlayers.checkpoint.records import check_files
from ghostlayers.cli import app
from ghostlayers.compare.files import RENDERERS, write_report

PAST = Path(__file__).with_name("past")
CHECKPOINTS = PAST / "checkpoints"
FOLDERS = {each.name: each for each in (*sorted(CHECKPOINTS.iterdir()), PAST / "adapter")}
IDS = torch.arange(60, 68)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found[:, -2:]


def check_same(name: str, found: torch.Tensor) -> None:
    expected = load_file(PAST / "logits.safetensors")[name]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that a command reads, where it runs."""
    shutil.copytree(PAST, tmp_path / "past")
    monkeypatch.chdir(tmp_path / "past")
    return tmp_path / "past"


@pytest.mark.parametrize("name", ["custom", "stock"])
def test_checkpoints_compute_the_same(name: str) -> None:
    folder = CHECKPOINTS / name
    check_same(name, logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert AutoTokenizer.from_pretrained(folder)("The river")["input_ids"]


@pytest.mark.slow
def test_the_code_that_they_carry_still_runs(tmp_path: Path) -> None:
    save_file({"input_ids": IDS}, tmp_path / "ids")
    arguments = [str(CHECKPOINTS), str(tmp_path / "ids"), str(tmp_path / "answers")]
    command = [sys.executable, "-P", stranger.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = load_file(tmp_path / "answers")
    assert found.keys() == {"custom", "stock"}, done.stdout + done.stderr
    for name, each in found.items():
        check_same(name, each[:, -2:])


def test_an_adapter_finds_its_base_and_computes_the_same(here: Path) -> None:
    check_same("adapter", logits(ghostlayers.from_adapter("adapter")))
    ghostlayers.materialize("adapter", here / "whole")
    check_same("adapter", logits(AutoModelForCausalLM.from_pretrained(here / "whole")))


@pytest.mark.parametrize("name", FOLDERS)
def test_records_are_read(name: str) -> None:
    record = ghostlayers.inspect(FOLDERS[name])
    assert record["cut"]["removed"] == [3, 4]
    assert record["mode"] == name
    check_files(FOLDERS[name], record)
    result = CliRunner().invoke(app, ["inspect", str(FOLDERS[name])])
    assert result.exit_code == 0
    assert record["recipe"]["repair"] in result.output


def test_a_recipe_runs_and_gives_the_same_model(here: Path) -> None:
    result = CliRunner().invoke(app, ["run", "recipe.yaml"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    check_same("custom", logits(AutoModelForCausalLM.from_pretrained(here / "custom")))
    before, after = (
        ghostlayers.inspect(each) for each in (CHECKPOINTS / "custom", here / "custom")
    )
    assert after["calibration"]["documents"] == before["calibration"]["documents"]
    assert after["recipe"].items() >= before["recipe"].items()


def test_results_are_shown(tmp_path: Path) -> None:
    results = json.loads((PAST / "results.json").read_text())
    written = {path.name for path in write_report(results, tmp_path)}
    assert written == RENDERERS.keys() - {"tasks.csv"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("results.md", "results.csv", "report.html"):
        assert "ghost" in (tmp_path / name).read_text()
