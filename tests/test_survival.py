"""What people do with a model, done to a repaired one: its operators act all along."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TextGenerationPipeline,
    pipeline,
)

from families import build
from ghostlayers.checkpoint import saving
from ghostlayers.model.dense import DenseModel
from ghostlayers.surgery import removal
from oracles import CUTS, logits, operators, token_ids

NAMES = ("llama", "gemma3_text", "gpt2")
SPANS = CUTS["both ends"]


@pytest.fixture(scope="module", params=NAMES)
def folder(
    request: pytest.FixtureRequest, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repaired checkpoint, with an operator before layer 0 and one behind a layer."""
    path = tmp_path_factory.mktemp("repaired") / request.param
    path.mkdir()
    dense = build(request.param, vocab_size=256)
    saving._write_weights(
        path, removal.prune_layers(DenseModel(dense), SPANS, operators(SPANS)), torch.float32
    )
    byte_tokenizer.save_pretrained(path)
    return path


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def silenced(model: Any) -> Any:
    """The same model with its operators set to zero."""
    for name, parameter in model.named_parameters():
        if "repair_" in name:
            parameter.data.zero_()
    return model


def test_the_operators_matter(folder: Path) -> None:
    difference = logits(load(folder), token_ids()) - logits(silenced(load(folder)), token_ids())
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, dtype=dtype)
    assert {each.dtype for each in model.parameters()} == {dtype}
    want, bare = logits(load(folder), token_ids()), logits(silenced(load(folder)), token_ids())
    got = logits(model, token_ids()).float()
    assert (got - want).norm() < 0.2 * (bare - want).norm()


def test_device_map(folder: Path) -> None:
    model = load(folder, device_map="auto")
    assert torch.equal(logits(model, token_ids()).cpu(), logits(load(folder), token_ids()))


def test_pipeline(folder: Path) -> None:
    writer = pipeline("text-generation", model=str(folder), device="cpu")
    assert isinstance(writer, TextGenerationPipeline)
    text = writer("abc", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    ids = writer.tokenizer("abc", return_tensors="pt")
    model = load(folder)
    found = model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert text == writer.tokenizer.decode(found[0], skip_special_tokens=True)


@pytest.mark.slow
def test_torch_compile(folder: Path) -> None:
    model = load(folder)
    want = logits(model, token_ids())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    torch.testing.assert_close(logits(compiled, token_ids()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torch_export(folder: Path) -> None:
    model = load(folder, attn_implementation="eager")
    want = logits(model, token_ids())

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    program = torch.export.export(Logits(), (token_ids(),), strict=False)
    with torch.no_grad():
        got = program.module()(token_ids())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # peft and transformers disagree about names
def test_lora_on_all_linear_layers_leaves_the_operators_alone(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(folder)
    want = logits(model, token_ids())
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    assert torch.equal(logits(tuned, token_ids()), want)  # LoRA starts at zero
    names = [name for name, _ in tuned.named_parameters()]
    repairs = [name for name in names if "repair_" in name]
    assert len(repairs) == 2
    assert not any("lora" in name for name in repairs)
    assert any("lora_A" in name for name in names)
    assert torch.equal(logits(tuned.merge_and_unload(), token_ids()), want)


def test_quantised_to_int8_with_the_operators_in_high_precision(folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = load(folder)
    want, bare = logits(model, token_ids()), logits(silenced(load(folder)), token_ids())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for name, parameter in model.named_parameters():
        if "repair_" in name:
            assert type(parameter) is torch.nn.Parameter
            assert parameter.dtype is torch.float32
    got = logits(model, token_ids())
    assert (got - want).norm() < 0.3 * (bare - want).norm()


@pytest.mark.usefixtures("plain_bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_quantised_by_bitsandbytes(folder: Path, tmp_path: Path, bits: dict[str, bool]) -> None:
    """On loading; and what it saves then loads again."""
    pytest.importorskip("bitsandbytes")
    want, bare = logits(load(folder), token_ids()), logits(silenced(load(folder)), token_ids())
    options = {"device_map": "cpu", "dtype": torch.float32}
    model = load(folder, quantization_config=BitsAndBytesConfig(**bits), **options)
    for name, parameter in model.named_parameters():
        if "repair_" in name:
            assert type(parameter) is torch.nn.Parameter
            assert parameter.dtype is torch.float32
    got = logits(model, token_ids())
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", **options)
    torch.testing.assert_close(logits(again, token_ids()), got, rtol=1e-3, atol=1e-3)
    brought = got - logits(silenced(again), token_ids())  # by the operators; four bits are coarse
    assert torch.cosine_similarity(brought.flatten(), (want - bare).flatten(), dim=0) > 0.6


def test_saved_again_by_transformers(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), token_ids()), logits(model, token_ids()))
