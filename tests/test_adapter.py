"""An adapter makes the repaired model of its base again, bit for bit, and of nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ghostlayers
from families import build
from ghostlayers.checkpoint.adapter import read_adapter, weights_hash
from ghostlayers.errors import ModelError, OutputError, RecipeError
from ghostlayers.recipe import RunOptions
from oracles import logits

CHOICES: dict[str, Any] = {
    "layers": 2,
    "select": "shortgpt",
    "windows": 8,
    "sequence_length": 64,
    "held_out_windows": 2,
}
CPU = RunOptions(dtype="float32", device="cpu")
IDS = torch.arange(40)[None] + 60


@pytest.fixture(scope="module")
def base(trained_llama: Any, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model on disk, in bfloat16 as most are."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = AutoModelForCausalLM.from_config(trained_llama.config)
    model.load_state_dict(trained_llama.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def pruned(base: Path, some_text: list[str], **changes: Any) -> Any:
    return ghostlayers.prune(str(base), data=some_text, **{"options": CPU, **CHOICES, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {"repair": "ghost"},
        {"repair": "ghost:affine"},
        {"repair": "piecewise:2"},
        {"repair": "refit:2"},
        {"repair": "joint:x+z"},
        {"repair": "magnitude"},
        {"repair": "none"},
        {"repair": "normed", "export": "stock-layer"},
        {"repair": "ghost", "remove": "0,3", "layers": None},
    ],
    ids=str,
)
def test_an_adapter_makes_the_same_model(
    choices: dict[str, Any], base: Path, some_text: list[str], tmp_path: Path
) -> None:
    result = pruned(base, some_text, **choices)
    assert result.save_adapter(tmp_path / "adapter").identical
    again = ghostlayers.from_adapter(tmp_path / "adapter", options=CPU)
    want = logits(result.model, IDS)
    assert type(again) is type(result.model)
    assert torch.equal(logits(again, IDS), want)
    assert ghostlayers.inspect(tmp_path / "adapter")["mode"] == "adapter"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repair", "export"), [("ghost", "auto"), ("refit:2", "auto"), ("normed", "stock-layer")]
)
def test_the_whole_checkpoint_is_the_one_saved_directly(
    repair: str, export: str, base: Path, some_text: list[str], tmp_path: Path
) -> None:
    result = pruned(base, some_text, repair=repair, export=export)
    result.save_adapter(tmp_path / "adapter")
    assert ghostlayers.materialize(tmp_path / "adapter", tmp_path / "whole", options=CPU).identical
    result.save(tmp_path / "direct")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == direct.keys()
    assert all(torch.equal(whole[name], direct[name]) for name in direct)
    mode = ghostlayers.inspect(tmp_path / "direct")["mode"]
    assert ghostlayers.inspect(tmp_path / "whole")["mode"] == mode


def test_it_is_as_small_as_its_operators(base: Path, some_text: list[str], tmp_path: Path) -> None:
    result = pruned(base, some_text, repair="ghost", remove="1-2", layers=None)
    result.save_adapter(tmp_path / "adapter")
    hidden = result.model.config.hidden_size
    (stored,) = load_file(tmp_path / "adapter" / "adapter.safetensors").values()
    assert (stored.shape, stored.dtype) == ((hidden, hidden), torch.bfloat16)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "ghostlayers.from_adapter" in card
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_another_base_is_refused(
    base: Path, some_text: list[str], byte_tokenizer: Any, tmp_path: Path
) -> None:
    pruned(base, some_text).save_adapter(tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(base)
    other.model.norm.weight.data[0] += 1.0
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"is not the model that this adapter was made on: .*hash"):
        ghostlayers.from_adapter(tmp_path / "adapter", tmp_path / "other", CPU)
    with pytest.raises(ModelError, match="is not the model"):
        ghostlayers.materialize(tmp_path / "adapter", tmp_path / "whole", tmp_path / "other", CPU)
    assert not (tmp_path / "whole").exists()
    moved = base.rename(base.with_name("moved"))
    try:
        with pytest.raises(ModelError, match=r"not on this machine.*--base"):
            ghostlayers.from_adapter(tmp_path / "adapter")
        assert ghostlayers.from_adapter(tmp_path / "adapter", moved, CPU)
    finally:
        moved.rename(base)


@pytest.mark.slow
def test_a_damaged_or_foreign_folder_is_refused(
    base: Path, some_text: list[str], tmp_path: Path
) -> None:
    result = pruned(base, some_text)
    result.save_adapter(tmp_path / "adapter")
    with pytest.raises(OutputError, match="exists already"):
        result.save_adapter(tmp_path / "adapter")
    result.save_adapter(tmp_path / "adapter", overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        ghostlayers.materialize(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(OutputError, match="is the same as adapter"):
        ghostlayers.materialize(tmp_path / "adapter", tmp_path / "adapter", overwrite=True)
    weights = tmp_path / "adapter" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="not the file that its record describes"):
        read_adapter(tmp_path / "adapter")
    record = tmp_path / "adapter" / "ghostlayers.json"
    content = json.loads(record.read_text())
    del content["files"]
    record.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is damaged"):
        read_adapter(tmp_path / "adapter")
    result.save(tmp_path / "whole")
    with pytest.raises(ModelError, match="holds a whole model"):
        read_adapter(tmp_path / "whole")
    with pytest.raises(ModelError, match="was not made by Ghostlayers"):
        read_adapter(tmp_path)


def test_the_same_weights_under_another_config_are_refused(
    base: Path, some_text: list[str], tmp_path: Path
) -> None:
    pruned(base, some_text).save_adapter(tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 30.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"computes something else .*rope_theta"):
        ghostlayers.from_adapter(tmp_path / "adapter", tmp_path / "other", CPU)


@pytest.mark.slow
def test_a_type_that_rounds_the_base_is_refused(
    base: Path, some_text: list[str], tmp_path: Path
) -> None:
    """The base is known by its weights on disk, here in bfloat16."""
    narrow = RunOptions(dtype="float16", device="cpu")
    with pytest.raises(RecipeError, match=r"float16 rounds\. Pass --dtype bfloat16 or float32"):
        pruned(base, some_text, options=narrow).save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    pruned(base, some_text).save_adapter(tmp_path / "adapter")
    with pytest.raises(RecipeError, match="float16 rounds"):
        ghostlayers.from_adapter(tmp_path / "adapter", options=narrow)
    same = RunOptions(dtype="bfloat16", device="cpu")
    assert ghostlayers.from_adapter(tmp_path / "adapter", options=same)


def test_the_hash_is_of_the_stored_weights() -> None:
    model = build("llama").to(torch.bfloat16)
    stored = weights_hash(model, torch.bfloat16)
    assert weights_hash(model.float(), torch.bfloat16) == stored
    assert weights_hash(model, torch.float32) != stored
    model.lm_head.weight.data[0, 0] += 1.0
    assert weights_hash(model, torch.bfloat16) != stored
