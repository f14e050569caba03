"""No code runs that was not allowed: canaries in every place that our libraries look at.

The commands run in this process, on models with code all around; what must not run leaves a file.
The whole list, under every command and in child processes, is a part of the campaign (`faults`).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from huggingface_hub import constants
from transformers import dynamic_module_utils
from typer.testing import CliRunner

from conftest import make_byte_tokenizer, make_documents, make_tiny_llama
from faults import judge, materials
from faults.kinds import canaries
from faults.kinds.canaries import CANARIES, Canary
from faults.materials import Place
from ghostlayers.cli import app

pytestmark = pytest.mark.filterwarnings("ignore")
COMMANDS = ["prune, none", "score", "compare", "materialize", "prune, refit", "bench"]


def picked() -> list[Canary]:
    """Every place under eval, and the models' under one more command each."""
    found = [each for each in CANARIES if each.label.endswith("; eval") or "; " not in each.label]
    for number, place in enumerate(canaries.MODELS):
        command = COMMANDS[number % len(COMMANDS)]
        found += [each for each in CANARIES if each.label == f"{place}; {command}"]
    names = ("inspect", "push", "export", "materialize")
    found += [e for e in CANARIES if e.label.startswith("code of") and e.label.endswith(names)]
    return found


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """Models, and what the command line makes of them."""
    root = tmp_path_factory.mktemp("canaries")
    folder = root / "in"
    materials._make_in(folder, make_byte_tokenizer, make_documents, make_tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("custom", "stock", "adapter"):
            result = CliRunner().invoke(app, materials.command_of(name))
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def place(templates, tmp_path, monkeypatch) -> Place:
    """An empty folder without a network, whose cache of the hub is its own."""
    home = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    (tmp_path / "in").mkdir()
    return Place(tmp_path, templates, Random(0), {"HF_HOME": str(home)})


def check(canary: Canary, place: Place) -> str:
    """Run a command over a planted place; what it said."""
    plan = canary.plan(place)
    result = CliRunner().invoke(app, [str(each) for each in plan.arguments])
    assert not place.marker.exists(), f"{canary.label}: code ran\n{result.output}"
    if result.exit_code == 0:
        assert judge._foreign(place.root / "out") is None
    return result.output


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_processes")
def test_no_code_runs_in_the_process_that_reloads(place, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", place.environment["HF_HOME"])
    label = "config, code of a hub's repository; prune, none"
    check(next(each for each in CANARIES if each.label == label), place)


@pytest.mark.slow
@pytest.mark.parametrize(
    "canary",
    [pytest.param(each, id=each.label) for each in picked()],
)
def test_no_code_runs(canary, place) -> None:
    check(canary, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in canaries.ON_MODELS if n not in ("inspect", "push")])
def test_the_commands_do_what_they_are_for_where_no_code_is(name, place) -> None:
    place.take("tied", "text.txt", "adapter")
    arguments = [each.replace("MODEL", "in/tied") for each in canaries.ON_MODELS[name]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "name", ["config, a type of its own", "config, code of a hub's repository", "tokenizer"]
)
def test_the_canaries_sing_where_code_is_allowed(name, place) -> None:
    canaries.MODELS[name](place)
    arguments = [each.replace("MODEL", "in/tied") for each in canaries.ON_MODELS["eval"]]
    result = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
    assert place.marker.exists(), result.output


def test_whoever_starts_a_recipe_may_allow_code(place) -> None:
    canaries.RECIPES["trust"](place)
    refused = CliRunner().invoke(app, ["run", "in/recipe.yaml"])
    assert (refused.exit_code, place.marker.exists()) == (2, False)
    assert "say so yourself" in refused.output
    CliRunner().invoke(app, ["run", "in/recipe.yaml", "--trust-remote-code"])
    assert place.marker.exists()


@pytest.mark.slow
def test_compiled_code_of_the_hub_is_not_even_looked_for(tmp_path) -> None:
    """bitsandbytes fetches it as it is imported, where the package `kernels` is installed."""
    (tmp_path / "kernels.py").write_text(
        "open('canary', 'w').close()\n\ndef get_kernel(*_, **__): ...\n"
    )
    program = (
        "from ghostlayers.cli.app import command_named\n"
        "command_named('heal')\n"
        "import importlib.util\n"
        "import peft\n"
        "assert importlib.util.find_spec('kernels') is None\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=path, check=True)
    assert not (tmp_path / "canary").exists()
