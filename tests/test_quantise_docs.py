"""The script of docs/quantise.md: cut models, folds and custom ones, through llm-compressor.

Skipped where llm-compressor is neither installed beside this package nor in the environment whose
Python GHOSTLAYERS_LLMCOMPRESSOR_PYTHON names.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ghostlayers
from conftest import make_documents, make_tiny_llama
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.launchers import alone

PAGE = Path(__file__).parents[1] / "docs" / "quantise.md"
PYTHON = os.environ.get("GHOSTLAYERS_LLMCOMPRESSOR_PYTHON") or (
    sys.executable if importlib.util.find_spec("llmcompressor") else ""
)
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

pytestmark = pytest.mark.filterwarnings("ignore")


def script() -> str:
    """The page's Python block."""
    (found,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return str(found)


def test_the_script_is_one_that_python_takes() -> None:
    compile(script(), "quantise.py", "exec")


@pytest.fixture(scope="module", params=["refit:1", "ghost"])
def cut(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any
) -> Path:
    """A folder with a cut model, the script and a text."""
    if not PYTHON:
        pytest.skip("llm-compressor is not installed")
    place = tmp_path_factory.mktemp("quantise")
    make_tiny_llama(**SIZES).bfloat16().save_pretrained(place / "plain")
    byte_tokenizer.save_pretrained(place / "plain")
    ghostlayers.prune(
        str(place / "plain"), remove="2-3", repair=request.param, data=make_documents(80),
        windows=8, fit_windows=8, sequence_length=64, held_out_windows=1,
        options=RunOptions(dtype="float32", device="cpu"),
    ).save(place / "cut")  # fmt: skip
    (place / "quantise.py").write_text(script())
    (place / "text.txt").write_text("\n\n".join(make_documents(20)))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq", "awq", "w8a8"])
def test_a_cut_model_goes_through_it(cut: Path, scheme: str) -> None:
    if scheme == "awq" and not torch.accelerator.is_available():
        pytest.skip("llm-compressor 0.14 pins memory for it, which takes an accelerator")
    command = [PYTHON, "quantise.py", "cut", f"cut-{scheme}", scheme, "text.txt"]
    done = subprocess.run(
        command, cwd=cut, env={**alone(), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = cut / f"cut-{scheme}"
    tensors, before = load_file(out / "model.safetensors"), load_file(cut / "cut/model.safetensors")
    assert any(name.endswith(("weight_packed", "weight_scale")) for name in tensors)
    for name, tensor in before.items():
        if "repair_" in name:
            assert torch.equal(tensors[name], tensor)
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    ids = torch.arange(60)[None]
    with torch.no_grad():
        got, want = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(input_ids=ids).logits
            for each in (out, cut / "cut")
        )
    # Four bits in groups of 128 are coarse for random weights; another layer would give 1.4.
    assert float((got - want).norm() / want.norm()) < (0.1 if scheme == "w8a8" else 0.8)
