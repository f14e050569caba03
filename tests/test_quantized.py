"""Quantised checkpoints as input: expanded to what their numbers say, or refused at the start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import ghostlayers
from ghostlayers.cli import app
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model import quantized
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions

BLOCK = 16
OPTIONS = RunOptions(dtype="float32", device="cpu")
EIGHT_BITS = {"num_bits": 8, "symmetric": True, "dynamic": False}


def is_packed(name: str) -> bool:
    return "_proj.weight" in name


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def by_blocks(folder: Path) -> dict[str, torch.Tensor]:
    """Eight-bit floats with a factor a block, as DeepSeek publishes; returns the weights meant."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [each for each in tensors if is_packed(each)]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        factor = blocks.abs().amax(dim=(1, 3)) / 448
        small = (blocks / factor[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (small.float() * factor[:, None, :, None]).reshape(rows, columns)
        tensors[name] = small.reshape(rows, columns)
        tensors[f"{name}_scale_inv"] = factor
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    write(folder, tensors, {**settings, "activation_scheme": "dynamic"})
    return meant


def by_rows(folder: Path) -> dict[str, torch.Tensor]:
    """Eight-bit integers with a factor a row, in compressed-tensors' format."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [each for each in tensors if is_packed(each)]:
        factor = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        small = (tensors[name] / factor).round().to(torch.int8)
        meant[name] = small.float() * factor
        tensors[name] = small
        tensors[f"{name}_scale"] = factor
    group = {"targets": ["Linear"], "weights": {**EIGHT_BITS, "type": "int", "strategy": "channel"}}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    settings |= {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    write(folder, tensors, {**settings, "quantization_status": "compressed"})
    return meant


def by_bitsandbytes(folder: Path, **bits: Any) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu", dtype="float32"
    )
    model.save_pretrained(folder)
    identity = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    return {  # what the layers do to the identity is their weight
        f"{name}.weight": module(torch.eye(module.in_features)).detach().T
        for name, module in identity.items()
    }


WRITERS = {
    "fp8": by_blocks,
    "compressed-tensors": by_rows,
    "bitsandbytes": lambda folder: by_bitsandbytes(folder, load_in_4bit=True),
    "bitsandbytes, 8 bits": lambda folder: by_bitsandbytes(folder, load_in_8bit=True),
}


@pytest.fixture(scope="module", params=list(WRITERS))
def packed(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """Name of the format, the folder, and the weights that its numbers stand for."""
    for library in filter(None, [quantized.LAYOUTS[request.param.split(",")[0]].library]):
        pytest.importorskip(library)
    if request.param.startswith("bitsandbytes"):
        request.getfixturevalue("plain_bitsandbytes")
    folder = tmp_path_factory.mktemp("packed") / "model"
    shutil.copytree(tiny_folder, folder)
    return request.param, folder, WRITERS[request.param](folder)


pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries of these formats warn a lot


def test_weights_are_what_the_numbers_say(
    packed: tuple[str, Path, dict[str, torch.Tensor]],
) -> None:
    name, folder, meant = packed
    loaded = load_model(str(folder), OPTIONS)
    assert loaded.base.quantized == name.split(",")[0]
    weights = dict(loaded.network.named_parameters())
    assert len(meant) >= 7
    tolerance = 0.02 if "8 bits" in name else 1e-5  # its own product rounds the activations too
    for key, want in meant.items():
        error = float((weights[key] - want).abs().max() / want.abs().max())
        assert error <= tolerance, (key, error)


@pytest.mark.slow
def test_it_is_pruned_and_holds_plain_weights_on_request(
    packed: tuple[str, Path, dict[str, torch.Tensor]], some_text: list[str], tmp_path: Path
) -> None:
    _, folder, _ = packed
    pruned = ghostlayers.prune(
        str(folder), remove="2-3", data=some_text, windows=4, fit_windows=4, sequence_length=64,
        held_out_windows=1, quantized="expand", options=OPTIONS,
    )  # fmt: skip
    pruned.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    record = json.loads((tmp_path / "out" / "ghostlayers.json").read_text())
    assert record["base_model"]["quantized"] in quantized.LAYOUTS
    assert "weights expanded from" in (tmp_path / "out" / "README.md").read_text()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["aqlm", "quanto", "vptq"])
def test_others_are_refused_before_any_weight_is_read(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    (tmp_path / "model").mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(
        app,
        [
            *("prune", str(tmp_path / "model"), "--remove", "2", "--data", "x"),
            "-o",
            f"{tmp_path}/out",
        ],
    )
    assert done.exit_code != 0
    said = " ".join(done.output.split())
    assert f"quantised as '{method}'" in said
    assert "Start from the checkpoint that was quantised" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="pip install compressed-tensors"):
        quantized.check_quantization(
            {"quantization_config": {"quant_method": "compressed-tensors"}}
        )


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (None, None),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_quantization_method(settings: Any, method: str | None) -> None:
    assert quantized.quantization_method({"quantization_config": settings}) == method


def test_plain_weights_stay_as_they_are(tiny_folder: Path) -> None:
    assert load_model(str(tiny_folder), OPTIONS).base.quantized is None
