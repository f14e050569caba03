"""Repaired models saved by others: the code goes along, and strangers can load them."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import saver
import stranger
from families import build
from ghostlayers import modeling
from ghostlayers.checkpoint import saving
from ghostlayers.model.dense import DenseModel
from ghostlayers.surgery import removal
from oracles import CUTS, logits, operators, token_ids

NAMES = ("llama", "mixtral", "gemma3_text", "gpt2")
CLASSES = {
    "AutoConfig": "Repaired{}Config",
    "AutoModel": "Repaired{}Model",
    "AutoModelForCausalLM": "Repaired{}ForCausalLM",
}


def repaired(name: str) -> Any:
    spans = CUTS["two gaps"]
    return removal.prune_layers(DenseModel(build(name)), spans, operators(spans))


@pytest.fixture
def model() -> Any:
    return repaired("llama")


def check_folder(folder: Path, name: str = "Llama") -> None:
    """The file of code, and a config that names it and stands guard."""
    content = json.loads((folder / "config.json").read_text())
    code = modeling.CODE.removesuffix(".py")
    assert content["auto_map"] == {a: f"{code}.{c.format(name)}" for a, c in CLASSES.items()}
    assert content["num_hidden_layers"]["repaired_boundaries"]
    compile((folder / modeling.CODE).read_text(), modeling.CODE, "exec")
    assert [path.name for path in folder.glob("*.py")] == [modeling.CODE]


def by_itself(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    model.save_pretrained(folder)


def in_shards(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")


def with_tokenizer(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size == 256


def by_trainer(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    arguments = TrainingArguments(str(folder / "run"), report_to=[], use_cpu=True)
    Trainer(model=model, args=arguments).save_model(str(folder))


def by_accelerate(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        folder, save_function=accelerator.save, state_dict=accelerator.get_state_dict(prepared)
    )


def as_weights_and_config(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, str(folder))
    model.config.save_pretrained(folder)


def merged_by_peft(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    import peft

    how = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():  # peft asks for what transformers calls otherwise now
        warnings.simplefilter("ignore", FutureWarning)
        peft.get_peft_model(model, how).merge_and_unload().save_pretrained(folder)


def three_times(model: Any, folder: Path, byte_tokenizer: Any) -> None:
    model.save_pretrained(folder)
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)


WAYS: dict[str, Callable[[Any, Path, Any], None]] = {
    each.__name__: each
    for each in (
        by_itself, in_shards, with_tokenizer, by_trainer, by_accelerate, as_weights_and_config,
        merged_by_peft, three_times,
    )
}  # fmt: skip


def ask_stranger(folder: Path, work: Path) -> dict[str, torch.Tensor]:
    """What a process without this package gets from every checkpoint in a folder."""
    save_file({"input_ids": token_ids()}, work / "ids")
    run_alone(stranger.__file__, work, str(folder), str(work / "ids"), str(work / "answers"))
    return load_file(work / "answers")


def run_alone(program: str, work: Path, *arguments: str) -> None:
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(work / "modules"),
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", program, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any, byte_tokenizer: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """One model saved by every way, and every family by itself, and what a stranger gets."""
    folder, work = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("work")
    for way, save in WAYS.items():
        (folder / f"{way}-repaired").mkdir()
        save(repaired("llama"), folder / f"{way}-repaired", byte_tokenizer)
    for name in NAMES:
        repaired(name).save_pretrained(folder / f"{name}-repaired")
    return folder, ask_stranger(folder, work)


@pytest.mark.parametrize("way", WAYS)
def test_the_code_goes_along(way: str, saved: Any) -> None:
    folder, answers = saved
    check_folder(folder / f"{way}-repaired")
    torch.testing.assert_close(
        answers[f"{way}-repaired"], logits(repaired("llama"), token_ids()), rtol=1e-5, atol=1e-6
    )
    assert bool(answers[f"{way}-repaired refused"])


@pytest.mark.parametrize("name", NAMES)
def test_of_every_family(name: str, saved: Any) -> None:
    assert torch.equal(saved[1][f"{name}-repaired"], logits(repaired(name), token_ids()))


@pytest.mark.slow
def test_a_stranger_saves_it_again(saved: Any, tmp_path: Path) -> None:
    """Without this package: as loaded by the code in the folder, saved by every Auto class."""
    folder, _ = saved
    (tmp_path / "again").mkdir()
    source = str(folder / "by_itself-repaired")
    run_alone(saver.__file__, tmp_path, source, str(tmp_path / "again"))
    places = sorted((tmp_path / "again").iterdir())
    assert [each.name for each in places] == ["config", "once-repaired", "twice-repaired"]
    for place in places:
        check_folder(place)
    (tmp_path / "again" / "config").rename(tmp_path / "config")
    answers = ask_stranger(tmp_path / "again", tmp_path)
    want = logits(repaired("llama"), token_ids())
    assert torch.equal(answers["once-repaired"], want)
    assert torch.equal(answers["twice-repaired"], want)


def test_a_config_alone_carries_it_too(model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    check_folder(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).repaired_boundaries


def test_a_base_model_carries_it_too(model: Any, tmp_path: Path) -> None:
    model.base_model.save_pretrained(tmp_path)
    check_folder(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        got, want = (each(token_ids()).last_hidden_state for each in (again, model.base_model))
    assert torch.equal(got, want)


@pytest.mark.slow
def test_a_push_to_a_hub_sends_the_code(model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    sent: list[str] = []

    def commit(self: Any, repo_id: str, operations: Any, **_: Any) -> None:
        sent.extend(each.path_in_repo for each in operations)

    made = huggingface_hub.RepoUrl(
        "https://hub.invalid/someone/model", endpoint="https://hub.invalid"
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    card = huggingface_hub.ModelCard("---\n---\n")
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    model.push_to_hub("someone/model")
    assert {"config.json", "model.safetensors", modeling.CODE} <= set(sent)
    sent.clear()
    model.save_pretrained(tmp_path)  # what lies there already is written anew, so it is sent too
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model")
    assert {"config.json", "model.safetensors", modeling.CODE} <= set(sent)


def test_what_a_checkpoint_holds_and_what_a_save_holds_are_one(model: Any, tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    saving._write_weights(tmp_path / "written", model, torch.float32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "written").save_pretrained(tmp_path / "saved")
    one, other = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("written", "saved")
    )
    assert one == other
    assert (tmp_path / "written" / modeling.CODE).read_text() == (
        tmp_path / "saved" / modeling.CODE
    ).read_text()
