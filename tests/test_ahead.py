"""The next layer is copied to an accelerator while one computes; a stand-in plays its streams."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_tiny_llama
from ghostlayers.model import ahead
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions

CPU = torch.device("cpu")


class Streams:
    """What torch offers for a device, taking notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.threads: set[int] = set()
        self.when_waiting: Callable[[], object] = lambda: None

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        notes = self.notes

        class Side:
            def __init__(self) -> None:
                self.device = device

            def synchronize(self) -> None:
                notes.append("copied")

        return Side()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        assert stream.device == CPU
        self.threads.add(threading.get_ident())
        yield

    def current_stream(self, device: torch.device) -> Any:
        assert device == CPU
        note = self.when_waiting

        class Main:
            def synchronize(self) -> None:
                note()

        return Main()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(ahead, "streams_of", lambda device: found)
    return found


@pytest.fixture
def model(tmp_path: Path, byte_tokenizer: Any) -> DenseModel:
    """Four layers on disk."""
    make_tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    return load_model(str(tmp_path), RunOptions(offload="disk", dtype="float32"))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in module.named_parameters()}


def in_place(layer: nn.Module) -> bool:
    return not any(each.is_meta for each in layer.parameters())


def one_pass(model: DenseModel) -> torch.Tensor:
    batch, stream = model.begin(torch.arange(2 * 16).view(2, 16))
    for layer in range(model.num_layers):
        stream = model.run_layer(layer, batch, stream)
    return stream


def test_nothing_is_copied_where_the_processor_computes(model: DenseModel) -> None:
    assert ahead.streams_of(CPU) is None
    one_pass(model)
    assert not model.residency._ahead._copies


def test_layers_come_from_their_copies(
    model: DenseModel, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each but the first; what is handed over is the very tensor that was copied."""
    copied: list[int] = []
    copy = ahead._copy

    def note(module: nn.Module, hook: Any) -> dict[str, torch.Tensor]:
        found = {name: each.clone() for name, each in copy(module, hook).items()}
        copied.extend(each.data_ptr() for each in found.values())
        return found

    monkeypatch.setattr(ahead, "_copy", note)
    for index in range(4):
        layer = model.residency.bring(index)
        places = [each.data_ptr() for each in layer.parameters()]
        assert set(places) <= set(copied) if index else not set(places) & set(copied)
    assert threading.get_ident() not in streams.threads


def test_a_pass_gives_the_same_bits(model: DenseModel, streams: Streams) -> None:
    found = one_pass(model), one_pass(model)
    assert "copied" in streams.notes
    model.residency.release()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "streams_of", lambda device: None)
        model.residency._ahead = ahead.Ahead()
        plain = one_pass(model)
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], plain)


def test_memory_goes_back_only_after_its_work_is_done(model: DenseModel, streams: Streams) -> None:
    held: list[bool] = []
    streams.when_waiting = lambda: held.append(in_place(model.layers[1]))
    for index in range(3):
        model.residency.bring(index)
    assert held == [False, True]  # layer 0 goes, then layer 1
    assert not in_place(model.layers[1])


def test_another_layer_than_the_expected_one(model: DenseModel, streams: Streams) -> None:
    expected = weights(model.residency.bring(3))
    model.residency.bring(0)  # and layer 1 is fetched
    found = weights(model.residency.bring(3))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not model.residency._ahead._copies


def test_a_layer_that_finds_no_room_is_brought_in_the_usual_way(
    model: DenseModel, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(module: nn.Module, hook: Any) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("no room")

    expected = one_pass(model)
    monkeypatch.setattr(ahead, "_copy", full)
    assert torch.equal(one_pass(model), expected)


def test_a_released_model_holds_nothing(model: DenseModel, streams: Streams) -> None:
    model.residency.bring(0)
    model.residency.release()
    assert not model.residency._ahead._copies
    assert all(each.is_meta for layer in model.layers for each in layer.parameters())


def test_hooks_read_files_again_afterwards(model: DenseModel, streams: Streams) -> None:
    hooks = [hook for _, hook in ahead.offloaded_modules(model.layers)]
    before = [hook.weights_map for hook in hooks]
    one_pass(model)
    assert all(hook.weights_map is each for hook, each in zip(hooks, before, strict=True))


def test_tied_weights_are_left_to_the_hook(model: DenseModel, streams: Streams) -> None:
    module = model.layers[1].get_submodule("mlp.up_proj")
    hook = ahead.offloading_hook(module)
    assert set(ahead._copy(module, hook)) == {"weight"}
    names, hook.tied_params_names = hook.tied_params_names, {"weight"}
    assert not ahead._copy(module, hook)
    hook.tied_params_names = names
