"""What is imported when: little at first, and transformers knows repaired checkpoints all the same.

Each in a fresh process, as nothing is ever un-imported.
"""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ghostlayers
from ghostlayers import modeling
from ghostlayers.checkpoint import readiness
from ghostlayers.cli.app import COMMANDS, command_named
from ghostlayers.model import auto_classes

HEAVY = {
    *("torch", "numpy", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors"),
    *("matplotlib", "jinja2", "pydantic", "yaml", "psutil", "filelock", "gguf", "lm_eval"),
}


def run_fresh(program: str, *arguments: str) -> list[str]:
    """The lines that a fresh process prints."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    "program",
    [
        "import ghostlayers; dir(ghostlayers)",
        "import runpy; runpy.run_module('ghostlayers', run_name='__main__')",
    ],
)
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_little_is_imported_before_something_is_used(program: str, argument: str) -> None:
    told = "import atexit, json, sys; atexit.register(lambda: print(json.dumps([*sys.modules])))\n"
    modules = json.loads(run_fresh(told + program, argument)[-1])
    assert "ghostlayers" in modules
    assert not HEAVY & {name.partition(".")[0] for name in modules}


def test_the_first_help_says_of_each_command_what_its_own_help_does() -> None:
    said = {name: inspect.getdoc(command_named(name)) or "" for name in COMMANDS}
    paragraphs = {name: text.split("\n\n")[0].replace("\n", " ") for name, text in said.items()}
    assert paragraphs == COMMANDS


def test_every_public_name_is_what_its_module_has() -> None:
    homes = ghostlayers._HOMES
    assert sorted(homes) == sorted(ghostlayers.__all__)
    for name, home in homes.items():
        assert getattr(ghostlayers, name) is getattr(import_module(f"ghostlayers.{home}"), name)
    assert {*ghostlayers.__all__, "__version__"} <= {*dir(ghostlayers)}


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        _ = ghostlayers.prunes


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import ghostlayers",
        "import transformers, ghostlayers",
        "from transformers import AutoModelForCausalLM; import ghostlayers",
        "import ghostlayers; from transformers import AutoTokenizer",
        "import ghostlayers, importlib; importlib.reload(ghostlayers)",
    ],
)
def test_auto_classes_know_repaired_checkpoints_in_any_order(imports: str) -> None:
    ask = (
        f"import sys; {imports}\n"
        "from transformers.models.auto import configuration_auto as table\n"
        "print(table.CONFIG_MAPPING['ghostlayers_llama'].from_dict.__self__.__name__)\n"
        "print(table.__spec__.loader.get_source(table.__name__)[:1] != '')\n"
        "print([type(each).__name__ for each in sys.meta_path].count('_AfterImport'))\n"
    )
    assert run_fresh(ask) == ["RepairedLlamaConfig", "True", "0"]


def test_a_family_that_cannot_be_cut_has_no_repaired_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in ("clip", "gemma3n_text"):
        promise = CONFIG_MAPPING[f"{auto_classes.PREFIX}{model_type}"]
        with pytest.raises(AttributeError, match=f"no language model of type '{model_type}'"):
            _ = promise.from_dict


@pytest.mark.slow
def test_what_proves_a_checkpoint_has_imported_all_before_it_is_asked() -> None:
    wanted = "modeling_utils", "generation.utils", "tokenization_utils_tokenizers"
    path = str(Path(readiness.RELOAD_CHECK).parent)
    ask = f"import sys; sys.path.insert(0, {path!r}); import reload_check; print(*sys.modules)"
    (modules,) = run_fresh(ask)
    assert {f"transformers.{name}" for name in wanted} <= {*modules.split()}


def test_the_prefix_is_that_of_the_code_that_travels() -> None:
    assert auto_classes.PREFIX == modeling.PREFIX
