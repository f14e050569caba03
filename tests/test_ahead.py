"""The next layer is read from its files while one computes."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import make_tiny_llama
from ghostlayers.model import ahead, tensor_files
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions


@pytest.fixture
def model(tmp_path: Path, byte_tokenizer: Any) -> DenseModel:
    """Four layers on disk."""
    make_tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    return load_model(str(tmp_path), RunOptions(offload="disk", dtype="float32"))


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def bytes_at(place: ahead.Stretch) -> bytes:
    return place.path.read_bytes()[place.start : place.stop]


def test_the_layer_behind_is_read_meanwhile(
    model: DenseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[ahead.Stretch]] = []
    monkeypatch.setattr(ahead, "read", read.append)
    for index in range(4):
        model.residency.bring(index)
    model.residency.release()
    assert len(read) == 3
    for index, places in enumerate(read[:], 1):
        brought = weights_of(model.residency.bring(index)).values()
        contents = {bytes_at(place) for place in places}
        assert contents == {tensor.numpy().tobytes() for tensor in brought}


def test_all_of_a_stretch_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "READ_AHEAD_BYTES", 1000)
    path = tmp_path / "weights"
    path.write_bytes(bytes(10_000))
    read: list[tuple[int, int]] = []

    class Noted:
        def __init__(self) -> None:
            self.file = io.FileIO(path)

        def __enter__(self) -> "Noted":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, place: int) -> None:
            self.file.seek(place)

        def read(self, count: int) -> None:
            begin = self.file.tell()
            read.append((begin, begin + len(self.file.read(count))))

    monkeypatch.setattr(Path, "open", lambda *_, **__: Noted())
    ahead.read([ahead.Stretch(path, 700, 4200)])
    assert read == [(700, 1700), (1700, 2700), (2700, 3700), (3700, 4200)]


def test_a_file_that_is_gone_is_left_to_whoever_needs_it(tmp_path: Path) -> None:
    ahead.read([ahead.Stretch(tmp_path / "gone", 0, 10)])


def test_another_layer_than_the_expected_one(model: DenseModel) -> None:
    expected = weights_of(model.residency.bring(3))
    model.residency.bring(0)  # and layer 1 is read
    weights = weights_of(model.residency.bring(3))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_a_released_model_holds_nothing(model: DenseModel) -> None:
    model.residency.bring(0)
    model.residency.release()
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())


def test_layers_in_memory_lie_nowhere_else() -> None:
    assert not ahead.stretches(make_tiny_llama())


def replace(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As a run that writes a folder anew does."""
    draft = path.with_suffix(".new")
    save_file(tensors, draft)
    os.utime(draft, ns=(1, 1))  # a copy keeps the times of what it is made of
    draft.replace(path)


def test_headers_are_those_of_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    replace(path, {"w": torch.ones(4, dtype=torch.float32)})
    assert tensor_files.type_in_file(str(path), "w", torch.float64) == torch.float32
    replace(path, {"a": torch.zeros(9), "w": torch.ones(4, dtype=torch.bfloat16)})
    assert tensor_files.type_in_file(str(path), "w", torch.float64) == torch.bfloat16
    start, stop = tensor_files.header(path)["w"]["data_offsets"]
    assert (
        path.read_bytes()[start:stop]
        == torch.ones(4).bfloat16().view(torch.uint8).numpy().tobytes()
    )
