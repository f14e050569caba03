"""What transformers 5 writes, transformers 4.57 reads as the same model.

Half of it needs that version in an environment of its own, whose Python `GHOSTLAYERS_OLDER_PYTHON`
names; `.ci/versions` makes one.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import stranger
from families import FAMILIES, build
from ghostlayers.checkpoint import saving
from ghostlayers.model.dense import DenseModel
from ghostlayers.modeling import old_spellings
from ghostlayers.surgery import removal
from oracles import CUTS, logits, operators, token_ids

OLDER = os.environ.get("GHOSTLAYERS_OLDER_PYTHON", "")
ROTATED = [n for n in FAMILIES if getattr(build(n).config, "rope_parameters", None)]
NOT_IN_4 = {
    "afmoe", "cohere2_moe", "cwm", "exaone_moe", "internlm3", "jais2", "mellum", "minimax_m2",
    "ministral3", "nanochat", "nemotron_h", "olmo_hybrid", "solar_open",
}  # fmt: skip
CANNOT = {"jamba": "wants a graphics card", "zamba2": "computes the width of heads itself"}
SHARED = [name for name in FAMILIES if name not in NOT_IN_4 | CANNOT.keys()]
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"original_max_position_embeddings": 16},
}  # fmt: skip
SCALINGS = [
    *[(name, "linear") for name in ("llama", "olmo", "olmo2", "olmo3", "falcon", "gemma3_text")],
    *[(name, "llama3") for name in ("llama", "apertus", "smollm3")],
    *[(name, "yarn") for name in ("qwen2", "qwen3", "deepseek_v3", "gpt_oss", "olmo3")],
    ("phi3", "longrope"),
]


def with_positions(name: str, kind: str) -> Any:
    """A tiny model whose positions are not those that anyone would assume."""
    plain = build(name).config
    before = plain.rope_parameters
    layered = any(isinstance(each, dict) for each in before.values())
    old = before["full_attention"] if layered else before
    rope = {**old, "rope_type": kind, "rope_theta": 5000.0, **SCALED.get(kind, {})}
    changes: dict[str, Any] = {}
    if kind == "longrope":
        half = plain.head_dim // 2
        rope.update(short_factor=[1.5] * half, long_factor=[3.0] * half)
        changes["original_max_position_embeddings"] = 16
    if layered:
        local = 777.0 if name == "gemma3_text" else 5000.0  # the others have one base in version 4
        sliding = {"rope_type": "default", "rope_theta": local}
        rope = {"full_attention": rope, "sliding_attention": sliding}
    return build(name, rope_parameters=rope, **changes)


def cut(dense: Any, name: str, kind: str) -> Any:
    spans = CUTS["first"] if name in {"ernie4_5_moe", "zamba2"} else CUTS["last"]
    return removal.prune_layers(
        DenseModel(dense), spans, operators(spans) if kind == "repaired" else None
    )


@pytest.mark.parametrize(
    ("name", "kind"), [*[(n, "default") for n in ROTATED if n != "ministral3"], *SCALINGS]
)
@pytest.mark.parametrize("form", ["repaired", "bare"])
def test_both_spellings_are_one_model_here(name: str, kind: str, form: str, tmp_path: Path) -> None:
    """Older words never change what this version reads, and a second save changes neither."""
    model = cut(with_positions(name, kind), name, form)
    saving._write_weights(tmp_path, model, torch.float32)
    content = json.loads((tmp_path / "config.json").read_text())
    again = AutoConfig.from_pretrained(tmp_path)
    read, had = ({**each.rope_parameters} for each in (again, model.config))
    read.pop("type", None)
    assert read == had
    assert content["torch_dtype"] == content["dtype"] == "float32"
    assert old_spellings(content) == {k: content[k] for k in old_spellings(content)}
    if name != "mellum":  # with two bases, and too new for any other reader
        assert content["rope_theta"] == 5000.0
        assert (content["rope_scaling"] is None) == (kind == "default")


@pytest.fixture(scope="module")
def read(tmp_path_factory: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Every model here, and the logits of its checkpoint there."""
    if not OLDER:
        pytest.skip("GHOSTLAYERS_OLDER_PYTHON names no Python with transformers 4.57")
    folder, work = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("older")
    models = {(name, "as built"): build(name) for name in SHARED}
    models |= {
        (name, "default"): with_positions(name, "default") for name in SHARED if name in ROTATED
    }
    models |= {(name, kind): with_positions(name, kind) for name, kind in SCALINGS}
    here = {}
    for (name, kind), dense in models.items():
        for form in ("repaired", "bare"):
            model = cut(dense, name, form)
            place = folder / f"{name}-{kind}-{form}"
            place.mkdir()
            saving._write_weights(place, model, torch.float32)
            here[place.name] = logits(model, token_ids())
    save_file({"input_ids": token_ids()}, work / "ids")
    ask(folder, work)
    return here, load_file(work / "answers")


def ask(folder: Path, work: Path) -> None:
    environment = {"HF_MODULES_CACHE": str(work / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    command = [
        OLDER,
        "-W",
        "ignore",
        "-P",
        stranger.__file__,
        folder,
        work / "ids",
        work / "answers",
    ]
    kept = {name: each for name, each in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        env={**kept, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]


EVERY = [
    *[(name, "as built") for name in SHARED],
    *[(name, "default") for name in SHARED if name in ROTATED],
    *SCALINGS,
]


@pytest.mark.parametrize("form", ["repaired", "bare"])
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_version_4_reads_the_same_model(name: str, kind: str, form: str, read: Any) -> None:
    here, there = read
    key = f"{name}-{kind}-{form}"
    labels = token_ids()[:, 1:].flatten()
    losses = [
        torch.nn.functional.cross_entropy(each[key][:, :-1].flatten(0, 1).double(), labels)
        for each in read
    ]
    assert abs(float(losses[0] - losses[1])) < 1e-4
    torch.testing.assert_close(there[key], here[key], rtol=1e-3, atol=1e-3)
    if form == "repaired":
        assert bool(there[f"{key} refused"])
