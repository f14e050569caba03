"""Packed checkpoints in and out: what is untouched keeps its bytes, and the config is true."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import ghostlayers
import packers
from conftest import make_tiny_llama
from families import build
from ghostlayers.checkpoint.packed_config import covers, renumbered
from ghostlayers.cli import app
from ghostlayers.errors import ModelError, UnsupportedModelError
from ghostlayers.model import layouts
from ghostlayers.model.expanding import packed_weights
from ghostlayers.model.integer_layouts import Awq, Gptq, unpack_bits
from ghostlayers.model.library_layouts import names
from ghostlayers.model.loading import load_model
from ghostlayers.model.quantized import LAYOUTS
from ghostlayers.model.residency import read_tensor
from ghostlayers.model.tensor_files import header, held_in
from ghostlayers.recipe import RunOptions

OPTIONS = RunOptions(dtype="float32", device="cpu")
REMOVED = (2, 3)
MOVED = {0: 0, 1: 1, 4: 2, 5: 3}
DOWN = "model.layers.1.mlp.down_proj"

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries of these formats warn a lot


def make_folder(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    make_tiny_llama(**{**sizes, "num_key_value_heads": 2, **changes}).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    return make_folder(tmp_path_factory.mktemp("packed") / "plain", byte_tokenizer)


@pytest.fixture(scope="module", params=list(packers.SETTINGS))
def packed(
    request: pytest.FixtureRequest, plain_folder: Path
) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """A scheme, a folder packed in it, and the weights that its numbers stand for."""
    return request.param, packed_once(plain_folder, request.param), WEIGHTS[request.param]


WEIGHTS: dict[str, dict[str, torch.Tensor]] = {}
"""What the numbers of the folders that were packed stand for, by scheme."""


def packed_once(plain_folder: Path, scheme: str) -> Path:
    folder = plain_folder.parent / scheme
    if not folder.exists():
        shutil.copytree(plain_folder, folder)
        WEIGHTS[scheme] = packers.pack_folder(folder, scheme)
    return folder


def copy_of(plain_folder: Path, scheme: str, place: Path, **changes: Any) -> Path:
    """A packed folder of one's own, with changes to its settings."""
    folder = place / "model"
    shutil.copytree(packed_once(plain_folder, scheme), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prune(folder: Path, text: list[str], **choices: Any) -> ghostlayers.PrunedModel:
    settings = {"remove": "2-3", "windows": 2, "fit_windows": 2, "sequence_length": 64}
    more = {"held_out_windows": 1, "options": OPTIONS}
    return ghostlayers.prune(str(folder), data=text, **{**settings, **more, **choices})


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        for name, entry in header(path).items():
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def moved(name: str) -> str | None:
    """What a tensor of the base is called after the cut, number by number."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return name
    number = int(parts[2])
    return None if number in REMOVED else ".".join([*parts[:2], str(MOVED[number]), *parts[3:]])


# ---- the layouts


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_read_as_one_string(bits: int) -> None:
    rng = random.Random(bits)
    rows = [[rng.randrange(1 << bits) for _ in range(64)] for _ in range(3)]
    words = torch.tensor([packers.pack_column(row, bits) for row in rows], dtype=torch.int32)
    assert unpack_bits(words, bits, 64).tolist() == rows


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_is_what_its_definition_says(
    bits: int, version: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffle(group: list[int]) -> list[int]:
        return random.Random(0).sample(group, len(group))

    monkeypatch.setattr("ghostlayers.model.integer_layouts.BLOCK", 500)  # several blocks
    torch.manual_seed(bits)
    weight = torch.randn(32, 96)
    order = shuffle if ordered else list
    parts, want = packers.gptq_parts(weight, bits, version=version, order=order)
    written = "gptq" if version == 1 else "gptq_v2"
    layout = Gptq({"bits": bits, "group_size": 32, "checkpoint_format": written})
    got = layout.unpack("a.weight", {f".{name}": each for name, each in parts.items()})
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert float((want - weight).abs().max()) < 6 / (1 << bits) + 0.1  # near what was packed


def test_gptq_without_an_order_has_runs_of_inputs() -> None:
    parts, want = packers.gptq_parts(torch.randn(32, 64))
    del parts["g_idx"]
    got = Gptq({"bits": 4, "group_size": 32}).unpack(
        "a.weight", {f".{name}": each for name, each in parts.items()}
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_gptq_has_exceptions_by_name() -> None:
    rules = {r"-:.*skip.*": {}, r"+:.*\.down$": {"bits": 8}, r".*\.up$": {"bits": 3}}
    layout = Gptq({"bits": 4, "group_size": 32, "dynamic": rules})
    assert [layout.bits(f"a.{name}.weight", {}) for name in ("down", "up", "gate")] == [8, 3, 4]


def test_awq_is_what_its_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostlayers.model.integer_layouts.BLOCK", 500)
    parts, want = packers.awq_parts(torch.randn(40, 64))
    got = Awq({"bits": 4, "group_size": 32}).unpack(
        "a.weight", {f".{name}": each for name, each in parts.items()}
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_zero_point_of_compressed_tensors_counts() -> None:
    pytest.importorskip("compressed_tensors")
    parts, want = packers.w4a16_parts(torch.randn(32, 64), symmetric=False)
    settings = json.loads(json.dumps(packers.SETTINGS["w4a16"]))
    settings["config_groups"]["group_0"]["weights"]["symmetric"] = False
    layout = LAYOUTS["compressed-tensors"](settings)
    got = layout.unpack("a.weight", {f".{name}": each for name, each in parts.items()})
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=0)


# ---- in


def test_weights_are_what_the_numbers_say(
    packed: tuple[str, Path, dict[str, torch.Tensor]],
) -> None:
    scheme, folder, want = packed
    loaded = load_model(str(folder), OPTIONS)
    assert loaded.base.quantized == packers.SETTINGS[scheme]["quant_method"]
    weights = dict(loaded.network.named_parameters())
    assert len(want) == 42
    for name, weight in want.items():
        torch.testing.assert_close(weights[name].detach(), weight, rtol=2e-3, atol=1e-6)


def test_two_schemes_in_one_model_are_told_apart(plain_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / "model"
    shutil.copytree(plain_folder, folder)
    four, eight = (packers.SETTINGS[name]["config_groups"]["group_0"] for name in ("w4a16", "w8a8"))
    groups = {
        "group_0": {**four, "targets": ["re:.*mlp.*"], "format": "pack-quantized"},
        "group_1": {**eight, "targets": ["re:.*self_attn.*"], "format": "int-quantized"},
    }
    changes = {"config_groups": groups, "format": "mixed-precision"}
    parts = {"mlp": packers.w4a16_parts, "self_attn": packers.w8a8_parts}
    want: dict[str, torch.Tensor] = {}
    for kind, pack in parts.items():
        want |= packers.pack_folder(
            folder, "w4a16", changes=changes, pack=pack,
            skip=lambda name, kind=kind: kind not in name,
        )  # fmt: skip
    weights = dict(load_model(str(folder), OPTIONS).network.named_parameters())
    for name, weight in want.items():
        torch.testing.assert_close(weights[name].detach(), weight, rtol=2e-3, atol=1e-6)


def test_a_module_that_keeps_its_inputs_first_is_read_so(
    tmp_path: Path, byte_tokenizer: Any
) -> None:
    folder = tmp_path / "gpt2"
    model = build("gpt2").half()
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj"
    parts, want = packers.gptq_parts(
        tensors.pop(f"{name}.weight").float().T[:, :32], symmetric=True
    )
    tensors = {k: v for k, v in tensors.items() if k != f"{name}.weight"}
    # its 128 inputs: four times the same 32
    tensors |= {f"{name}.qweight": parts["qweight"].repeat(4, 1).contiguous()}
    tensors |= {f"{name}.qzeros": parts["qzeros"].repeat(4, 1).contiguous()}
    tensors |= {f"{name}.scales": parts["scales"].repeat(4, 1).contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = packers.SETTINGS["gptq"]
    (folder / "config.json").write_text(json.dumps(config))
    got = load_model(str(folder), OPTIONS).network.get_parameter(f"{name}.weight").detach()
    torch.testing.assert_close(got, want.repeat(1, 4).T, rtol=2e-3, atol=1e-6)


def test_offloaded_layers_are_read_packed_too(plain_folder: Path, tmp_path: Path) -> None:
    folder, want = copy_of(plain_folder, "gptq", tmp_path), WEIGHTS["gptq"]
    options = RunOptions(dtype="float16", device="cpu", offload="disk")
    loaded = load_model(str(folder), options)
    assert any(each.is_meta for each in loaded.network.parameters())
    name = "model.layers.4.mlp.up_proj.weight"
    found = read_tensor(loaded.network, name)
    torch.testing.assert_close(found.float(), want[name], rtol=2e-3, atol=1e-6)


# ---- out


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["refit:1", "ghost"])
def test_what_a_cut_leaves_alone_keeps_its_bytes(
    packed: tuple[str, Path, dict[str, torch.Tensor]],
    some_text: list[str],
    tmp_path: Path,
    repair: str,
) -> None:
    scheme, folder, _ = packed
    pruned = prune(folder, some_text, repair=repair)
    verification = pruned.save(tmp_path / "out")
    assert verification.identical
    if scheme in ("w4a16", "w8a8", "fp8"):
        assert verification.packed is not None
        assert verification.packed < 0.05
    before, after = contents(folder), contents(tmp_path / "out")
    changed = {DOWN} if repair == "refit:1" else set()
    for name, tensor in before.items():
        new = moved(name)
        if new is not None and name.rpartition(".")[0] not in changed:
            assert after.pop(new) == tensor, new
    if repair == "refit:1":
        kind, shape, data = after.pop(f"{DOWN}.weight")
        assert (kind, shape) == ("F16", [64, 96])
        want = pruned.model.get_submodule(DOWN).weight.detach().half()
        assert data == want.numpy().tobytes()
    assert all("repair_" in name for name in after)
    assert bool(after) == (repair == "ghost")
    _check_record(tmp_path / "out", scheme, sorted(changed))


def _check_record(out: Path, scheme: str, plain: list[str]) -> None:
    packed = ghostlayers.inspect(out)["packed"]
    assert packed["plain"] == plain
    assert packed["weights"] == 28 - len(plain)
    size = sum(len(data) for _, _, data in contents(out).values())
    assert packed["packed_bytes"] + packed["plain_bytes"] == size
    card = (out / "README.md").read_text()
    assert f"{28 - len(plain)} weights are packed as" in card
    assert "weights expanded from" not in card
    assert all(name.replace("_", r"\_") in card or name in card for name in plain)
    settings = settings_of(out)
    said = json.dumps(settings)
    assert all(name in said.replace("\\\\", "") for name in plain)
    if not plain:
        assert settings == json.loads(json.dumps(packers.SETTINGS[scheme]))


@pytest.mark.slow
def test_transformers_opens_what_it_can_run(
    packed: tuple[str, Path, dict[str, torch.Tensor]], some_text: list[str], tmp_path: Path
) -> None:
    scheme, folder, _ = packed
    if scheme in ("gptq", "awq"):
        pytest.skip("transformers needs gptqmodel for it")
    pruned = prune(folder, some_text, repair="refit:1")
    pruned.save(tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        got, want = read(input_ids=ids).logits, pruned.model(input_ids=ids).logits
    assert float((got - want).abs().max()) < 0.05
    weight = read.get_submodule(DOWN).weight
    assert weight.is_floating_point()
    assert weight.dtype == torch.float32


@pytest.mark.slow
def test_offloaded_layers_stay_packed_too(
    plain_folder: Path, some_text: list[str], tmp_path: Path
) -> None:
    folder = copy_of(plain_folder, "gptq", tmp_path)
    options = RunOptions(dtype="float16", device="cpu", offload="disk")
    for name, run in (("in-memory", OPTIONS), ("offloaded", options)):
        prune(folder, some_text, repair="none", options=run).save(tmp_path / name)
    assert contents(tmp_path / "offloaded") == contents(tmp_path / "in-memory")


def test_plain_weights_on_request(plain_folder: Path, some_text: list[str], tmp_path: Path) -> None:
    folder = copy_of(plain_folder, "gptq", tmp_path)
    prune(folder, some_text, repair="none", quantized="expand").save(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {kind for kind, _, _ in contents(tmp_path / "out").values()} == {"F16"}
    assert "expanded from gptq" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_an_adapter_of_a_packed_base_becomes_packed(
    plain_folder: Path, some_text: list[str], tmp_path: Path
) -> None:
    folder = copy_of(plain_folder, "awq", tmp_path)
    pruned = prune(folder, some_text, repair="refit:1")
    pruned.save(tmp_path / "whole")
    pruned.save_adapter(tmp_path / "adapter")
    ghostlayers.materialize(tmp_path / "adapter", tmp_path / "out", options=OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_packed_result_is_cut_again_and_evaluated(
    plain_folder: Path, some_text: list[str], tmp_path: Path
) -> None:
    folder = copy_of(plain_folder, "gptq", tmp_path)
    prune(folder, some_text, repair="refit:1").save(tmp_path / "once")
    again = prune(tmp_path / "once", some_text, remove="0", repair="none")
    again.save(tmp_path / "twice")
    rules = settings_of(tmp_path / "twice")["dynamic"]
    assert list(rules) == [r"-:^(?:model\.layers\.0\.mlp\.down_proj)$"]
    result = ghostlayers.evaluate(
        str(tmp_path / "twice"), data=tmp_text(tmp_path, some_text), sequence_length=64,
        max_windows=1, options=OPTIONS,
    )  # fmt: skip
    assert 0 < result[0].sums.loss_nats < 10


def tmp_text(folder: Path, text: list[str]) -> str:
    path = folder / "text.txt"
    path.write_text("\n\n".join(text))
    return str(path)


def test_several_files_of_weights(
    plain_folder: Path, some_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(plain_folder, "gptq", tmp_path)
    monkeypatch.setattr("ghostlayers.checkpoint.packed.SHARD", 40_000)
    prune(folder, some_text, repair="none").save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    for name in files:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118
                assert index["weight_map"][tensor] == name
                file.get_tensor(tensor)
    assert index["weight_map"].keys() == held_in(tmp_path / "out").keys()


@pytest.mark.slow
def test_experts_are_packed_as_a_whole_or_not_at_all(
    some_text: list[str], tmp_path: Path, byte_tokenizer: Any
) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 256}
    build("qwen3_moe", **sizes).half().save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    packers.pack_folder(
        tmp_path / "model", "gptq",
        pack=lambda w: packers.gptq_parts(w, symmetric=True), skip=lambda n: "experts" not in n,
    )  # fmt: skip
    pruned = prune(tmp_path / "model", some_text, remove="2", repair="refit:1")
    assert pruned.save(tmp_path / "out").identical
    after = contents(tmp_path / "out")
    experts = [f"model.layers.1.mlp.experts.{e}.{p}_proj" for e in range(4) for p in KINDS]
    assert all(f"{each}.weight" in after for each in experts)
    assert not [name for name in after if ".layers.1.mlp.experts." in name and "q" in name[-7:]]
    assert ghostlayers.inspect(tmp_path / "out")["packed"]["plain"] == sorted(experts)
    rules = [each.replace("\\", "") for each in settings_of(tmp_path / "out")["dynamic"]]
    assert rules == [f"-:^{each}$" for each in sorted([*experts, "model.layers.1.mlp.experts"])]
    assert "model.layers.2.mlp.experts.3.up_proj.qweight" in after


KINDS = ("gate", "up", "down")


@pytest.mark.slow
def test_experts_in_blocks_of_four_bits(
    some_text: list[str], tmp_path: Path, byte_tokenizer: Any
) -> None:
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 256, "num_hidden_layers": 4}
    kinds = ["full_attention"] * 4
    build("gpt_oss", **sizes, layer_types=kinds).bfloat16().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    tensors, want = load_file(folder / "model.safetensors"), {}
    for name in [each for each in tensors if each.endswith(("experts.gate_up_proj", "down_proj"))]:
        parts, want[name] = packers.mxfp4_parts(tensors.pop(name).float())
        tensors |= {f"{name}_{part}": each.contiguous() for part, each in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    weights = dict(load_model(str(folder), OPTIONS).network.named_parameters())
    for name, weight in want.items():
        torch.testing.assert_close(weights[name].detach(), weight, rtol=0, atol=0)
    prune(folder, some_text, remove="1", repair="none").save(tmp_path / "out")
    before, after = contents(folder), contents(tmp_path / "out")
    for name, tensor in after.items():
        old = name.replace(".layers.2.", ".layers.3.").replace(".layers.1.", ".layers.2.")
        assert before[old] == tensor
    assert settings_of(tmp_path / "out") == {"quant_method": "mxfp4"}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_stays_packed(
    bits: int, some_text: list[str], tmp_path: Path, byte_tokenizer: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_folder(tmp_path / "model", byte_tokenizer, intermediate_size=128)
    how = {f"load_in_{bits}bit": True}
    how |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**how), device_map="cpu", dtype="float16"
    ).save_pretrained(folder)
    pruned = prune(folder, some_text, repair="refit:1", windows=4, fit_windows=4)
    verification = pruned.save(tmp_path / "out")
    assert verification.identical
    assert verification.packed is not None
    before, after = contents(folder), contents(tmp_path / "out")
    for name, tensor in before.items():
        new = moved(name)
        if new is not None and not name.startswith(DOWN):
            assert after.pop(new) == tensor, new
    assert list(after) == [f"{DOWN}.weight"]
    skipped = settings_of(tmp_path / "out")["llm_int8_skip_modules"]
    assert skipped == ["lm_head", DOWN]


# ---- what is said of modules by name


MODULES = [f"model.layers.{n}.{m}" for n in range(12) for m in ("q_proj", "down_proj")] + [
    "lm_head"
]
GONE = {3, 4, 11}


def after_cut(module: str) -> str | None:
    if not module.startswith("model.layers."):
        return module
    _, _, number, rest = module.split(".")
    kept = [each for each in range(12) if each not in GONE]
    return f"model.layers.{kept.index(int(number))}.{rest}" if int(number) in kept else None


@pytest.mark.parametrize(
    ("method", "entries", "means"),
    [
        ("compressed-tensors", ["lm_head", *MODULES[2:4], "model.layers.11.q_proj"], names),
        ("compressed-tensors", ["re:.*q_proj", r"re:model\.layers\.(5|6)\..*"], names),
        ("compressed-tensors", [r"re:model\.layers\.1.*", "model.layers.3.q_proj"], names),
        ("awq", ["model.layers.1", "lm_head"], covers),
        ("awq", ["model.layers.10.q_proj", "model.layers.3"], covers),
        ("fp8", ["model.layers.*.q_proj", "model.layers.5.down_proj"], covers),
        ("mxfp4", ["down_proj"], covers),
        ("bitsandbytes", ["lm_head", "6.q_proj"], covers),
        ("gptq", [r"-:.*layers\.[0-4]\..*q_proj", r"+:model\.layers\.11\..*", r".*down.*"], None),
    ],
)  # fmt: skip
def test_lists_mean_the_modules_that_they_meant(
    method: str, entries: list[str], means: Callable[[str, str], bool] | None
) -> None:
    """Entry by entry, read as the format's readers do, before and after."""
    place = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules"}
    key = place.get(method, "modules_to_not_convert")
    settings: dict[str, Any] = {key: entries}
    if means is None:
        key, settings = "dynamic", {"dynamic": {each: {"n": n} for n, each in enumerate(entries)}}
    moves = {module: after_cut(module) for module in MODULES}
    left = ["model.layers.2.down_proj"]
    found = renumbered(settings, method, moves, left, ["lm_head"])[key]

    def meant(listed: Any, module: str) -> Any:
        if means is not None:
            return any(means(each, module) for each in listed)
        import re

        rules = (k for k in listed if re.match(k.removeprefix("+:").removeprefix("-:"), module))
        first = next(rules, "")
        return listed.get(first), first.startswith("-:")

    for old, new in moves.items():
        if new in left:
            assert meant(found, new) == (True if means else ({}, True))
        elif new is not None:
            assert meant(found, new) == meant(entries if means else settings[key], old), (
                old,
                found,
            )


def test_targets_of_a_group_are_renumbered() -> None:
    groups = {
        "a": {"targets": ["model.layers.3.q_proj"]},
        "b": {"targets": ["model.layers.5.q_proj", "Linear"]},
    }
    moves = {module: after_cut(module) for module in MODULES}
    found = renumbered({"config_groups": groups}, "compressed-tensors", moves, [], [])
    assert found["config_groups"] == {"b": {"targets": ["model.layers.3.q_proj", "Linear"]}}


def test_defaults_of_a_reader_stay_where_a_list_begins() -> None:
    moves = {module: after_cut(module) for module in MODULES}
    left = ["model.layers.2.down_proj"]
    found = renumbered({"bits": 8}, "fp8", moves, left, ["lm_head"])
    assert found["modules_to_not_convert"] == ["lm_head", *left]
    assert renumbered({"bits": 8}, "fp8", moves, [], ["lm_head"]) == {"bits": 8}


# ---- bad input


def broken(name: str, folder: Path) -> None:
    """Change a packed folder."""
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.4.mlp.up_proj"
    if name == "no zeros":
        del tensors[f"{module}.qzeros"]
    elif name == "other groups":
        half = tensors[f"{module}.scales"][:1].clone()
        tensors[f"{module}.scales"] = half
    elif name == "short":
        tensors[f"{module}.qzeros"] = tensors[f"{module}.qzeros"][:, :1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("no zeros", {}, r"tensors that end in \.qzeros"),
        ("other groups", {}, r"shape \[1, 96\].* make that \[2, 96\]"),
        ("short", {}, r"qzeros' of shape \[2, 1\]"),
        ("", {"bits": 5}, "packed in 5 bits"),
        ("", {"checkpoint_format": "marlin"}, "layout called 'marlin'"),
        ("", {"quant_method": "awq", "version": "gemv"}, "layout called 'gemv'"),
        ("", {"quant_method": "awq", "bits": 8}, "packed in 8 bits"),
        ("", {"group_size": 16}, r"make that \[6, 64\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    plain_folder: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = copy_of(plain_folder, "gptq", tmp_path, **changes)
    broken(name, folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), OPTIONS)


def test_the_command_line_says_what_stayed_packed(
    plain_folder: Path, some_text: list[str], tmp_path: Path
) -> None:
    folder = copy_of(plain_folder, "gptq", tmp_path)
    text = tmp_text(tmp_path, some_text)
    asked = ["prune", str(folder), "--remove", "2-3", "--repair", "refit:1", "--data", text]
    asked += ["--windows", "2", "--fit-windows", "2", "--sequence-length", "64"]
    done = CliRunner().invoke(
        app, [*asked, "--dtype", "float32", "--held-out-windows", "1", "-o", f"{tmp_path}/out"]
    )
    said = " ".join(done.output.split())
    assert done.exit_code == 0, said
    assert "quantised as gptq" in said
    assert "27 weights are packed as gptq, byte for byte as in the base" in said
    assert DOWN in said


def test_numbers_without_their_factors_are_refused(tmp_path: Path) -> None:
    save_file({"a.0.weight": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    layout = LAYOUTS["compressed-tensors"](packers.SETTINGS["w8a8"])
    with pytest.raises(ModelError, match="but not the factors"):
        packed_weights(held_in(tmp_path), layout)


def test_every_layout_names_its_parts() -> None:
    for kind in LAYOUTS.values():
        ends = {*kind.ends, ""}
        assert all(need <= ends for need in kind.needs)
        assert issubclass(kind, layouts.Layout)


def test_sparse_weights_are_refused() -> None:
    settings = {**packers.SETTINGS["w4a16"], "sparsity_config": {"format": "sparse-24-bitmask"}}
    with pytest.raises(UnsupportedModelError, match="sparse-24-bitmask"):
        LAYOUTS["compressed-tensors"](settings)
