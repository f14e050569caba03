"""Models that do not belong together, and weights that stand twice in a file, are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ghostlayers
from ghostlayers.errors import InputError, ModelError
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions

SMALL = {"windows": 6, "held_out_windows": 2, "sequence_length": 32}
HEAL = {"tokens": "128", "held_out_windows": 2, "sequence_length": 32, "step_tokens": 64}


@pytest.fixture
def renumbered(tiny_folder: Path, tmp_path: Path) -> Path:
    """The same weights, with a tokenizer that numbers some tokens the other way round."""
    folder = tmp_path / "renumbered"
    shutil.copytree(tiny_folder, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    few = [word for word, number in words.items() if 100 <= number < 140]
    turned = dict(zip(few, reversed([words[word] for word in few]), strict=True))
    content["model"]["vocab"] = words | turned
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def cut(tiny_folder: Path, some_text: list[str], tmp_path: Path) -> Path:
    pruned = ghostlayers.prune(tiny_folder, remove="3-4", repair="refit:1", data=some_text, **SMALL)
    pruned.save(tmp_path / "cut")
    return tmp_path / "cut"


def test_models_that_number_tokens_differently_are_not_compared(
    tiny_folder: Path, renumbered: Path, some_text: list[str], cut: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text))
    for model, against in ((renumbered, tiny_folder), (tiny_folder, renumbered)):
        with pytest.raises(InputError, match="number their tokens differently"):
            ghostlayers.evaluate(model, data=text, against=against, sequence_length=32)
    with pytest.raises(InputError, match="number their tokens differently"):
        ghostlayers.heal(cut, against=renumbered, data=some_text, **HEAL)


@pytest.mark.parametrize("layer", [0, 5])
def test_a_dense_model_that_is_not_the_base_does_not_heal(
    layer: int, tiny_folder: Path, some_text: list[str], cut: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1.05
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="was not made of"):
        ghostlayers.heal(cut, against=other, data=some_text, **HEAL)


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight"])
def test_a_weight_under_two_names_is_refused(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(tiny_folder, folder)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    weights[name] = torch.full_like(weights[f"model.{name}"], 2.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"hold '{name}'"):
        load_model(str(folder), RunOptions())
