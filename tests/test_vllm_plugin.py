"""What vLLM finds of ours. vLLM itself runs in benchmarks/serving, in an environment of its own."""

import json
import pickle
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from families import build
from ghostlayers.checkpoint import saving, vllm_plugin
from ghostlayers.model import families
from ghostlayers.model.dense import DenseModel
from ghostlayers.surgery import removal
from oracles import CUTS, operators

SPANS = CUTS["both ends"]


class Registry:
    """Stands for vLLM's: it remembers what it was told."""

    def __init__(self, *known: str) -> None:
        self.models: dict[str, str] = dict.fromkeys(known, "")

    def get_supported_archs(self) -> list[str]:
        return list(self.models)

    def register_model(self, name: str, where: str) -> None:
        assert name not in self.models, "told twice"
        self.models[name] = where


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry("LlamaForCausalLM")
    backend = types.ModuleType("vllm.model_executor.models.transformers")
    backend.TransformersForCausalLM = type("TransformersForCausalLM", (), {})  # type: ignore[attr-defined]
    backend.TransformersMoEForCausalLM = type("TransformersMoEForCausalLM", (), {})  # type: ignore[attr-defined]
    models = types.ModuleType("vllm.model_executor.models")
    models.transformers = backend  # type: ignore[attr-defined]
    vllm = types.ModuleType("vllm")
    vllm.ModelRegistry = registry  # type: ignore[attr-defined]
    for module in (vllm, types.ModuleType("vllm.model_executor"), models, backend):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry


def test_the_entry_point_leads_to_it() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="ghostlayers")
    assert found.load() is vllm_plugin.register


@pytest.mark.slow
def test_importing_it_imports_no_vllm() -> None:
    code = "import sys, ghostlayers.checkpoint.vllm_plugin; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_every_family_is_registered_once(registry: Registry) -> None:
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM's processes may each call it, and one may call it again
    for name in (
        "RepairedLlamaForCausalLM",
        "RepairedGPT2LMHeadModel",
        "RepairedMixtralForCausalLM",
    ):
        assert registry.models[name] == f"ghostlayers.checkpoint.vllm_plugin:{name}"
    assert registry.models["LlamaForCausalLM"] == ""  # vLLM's own stay its own


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("RepairedLlamaForCausalLM", "TransformersForCausalLM"),
        ("RepairedGemma3ForCausalLM", "TransformersForCausalLM"),
        ("RepairedMixtralForCausalLM", "TransformersMoEForCausalLM"),
        (
            "RepairedDots1ForCausalLM",
            "TransformersMoEForCausalLM",
        ),  # how many is left open
        ("RepairedHunYuanMoEV1ForCausalLM", "TransformersMoEForCausalLM"),  # one, unless told
        ("RepairedHunYuanDenseV1ForCausalLM", "TransformersForCausalLM"),
        ("RepairedQwen3MoeForCausalLM", "TransformersMoEForCausalLM"),
        ("RepairedDeepseekV3ForCausalLM", "TransformersMoEForCausalLM"),
    ],
)
def test_experts_get_the_class_for_experts(registry: Registry, name: str, wanted: str) -> None:
    assert getattr(vllm_plugin, name).__name__ == wanted


@pytest.mark.parametrize("module", [vllm_plugin, families])
@pytest.mark.parametrize("name", ["RepairedNothing", "LlamaForCausalLM", "__path__"])
def test_other_names_are_attribute_errors(registry: Registry, module: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(module, name)


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("RepairedLlamaForCausalLM", "llama"),  # InternLM 3 runs the same class
        ("RepairedLlamaConfig", "llama"),
        ("RepairedGPT2LMHeadModel", "gpt2"),
        ("RepairedGemma3TextConfig", "gemma3_text"),
    ],
)
def test_a_class_belongs_to_the_family_that_brought_it(class_name: str, model_type: str) -> None:
    family = families.repaired_family(class_name)
    assert family is not None
    assert family.model_type == model_type


@pytest.mark.slow
def test_another_process_unpickles_the_config(tmp_path: Path) -> None:
    """As vLLM's engine does; it has loaded no such checkpoint when the config arrives."""
    repaired = removal.prune_layers(DenseModel(build("llama")), SPANS, operators(SPANS))
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(repaired.config))
    code = (
        "import pickle, sys; c = pickle.load(open(sys.argv[1], 'rb'));"
        "print(type(c).__name__, c.model_type, c.repaired_boundaries)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "config.pickle")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    boundaries = repaired.config.repaired_boundaries
    assert done.stdout.strip() == f"RepairedLlamaConfig ghostlayers_llama {boundaries}"


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("granite", {"logits_scaling": 6.0}, 1 / 6),
        ("cohere", {"logit_scale": 0.25}, 0.25),
        ("llama", {}, 1.0),
        ("gemma2", {"final_logit_softcapping": 5.0}, 1.0),
    ],
)
def test_logit_scale(name: str, changes: dict[str, Any], scale: float) -> None:
    assert saving.logit_scale(build(name, **changes)) == scale


def test_vllm_can_read_granites_scale(tmp_path: Path) -> None:
    """Its way through transformers looks for logit_scale only, and would sample too coldly."""
    dense = build("granite", logits_scaling=6.0)
    repaired = removal.prune_layers(DenseModel(dense), SPANS, operators(SPANS))
    saving._write_weights(tmp_path, repaired, torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["logit_scale"] == 1 / 6
    assert AutoConfig.from_pretrained(tmp_path).logits_scaling == 6.0
