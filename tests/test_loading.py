"""Opening models: what is refused and how it is said, and in which type they are computed."""

import contextlib
import dataclasses
import json
import pickle
import random
import shutil
import socket
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ghostlayers.errors import ModelError, RecipeError
from ghostlayers.model import computing
from ghostlayers.model.computing import compute_dtype, device_named, half_precision_gain
from ghostlayers.model.loading import from_memory, load_model
from ghostlayers.recipe import RunOptions

CPU = RunOptions(device="cpu")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test of loading went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A model's folder that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def message(name, options=CPU):
    with pytest.raises(ModelError) as caught:
        load_model(str(name), options)
    return str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Names that are no model


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/no-such-model", "a/b/c"])
def test_a_missing_folder_is_refused(name):
    assert message(name) == (
        f"'{name}' is neither a model's folder, nor a .gguf file, nor a hub id such as "
        "HuggingFaceTB/SmolLM2-135M."
    )


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert message(path).startswith(f"'{path}' is neither a model's folder, nor a .gguf file")


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert message(tmp_path) == (
        f"folder '{tmp_path}' holds no config.json: it is not a model's folder."
    )


@pytest.mark.parametrize("name", ["no such model!", "-dash-", "a..b/c"])
def test_a_nonsense_id_is_refused(name):
    text = message(name)
    assert text.startswith(f"cannot load the model '{name}': ")
    assert "\n" not in text


def test_a_missing_gguf_file_is_refused(tmp_path):
    path = tmp_path / "missing.gguf"
    assert message(path) == f"there is no file '{path}'."


@pytest.mark.parametrize("content", [b"", b"abc", b"GGUF" + bytes(60)])
def test_a_gguf_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert message(path).startswith(f"'{path}' cannot be read as a GGUF file: ")


# Pickles


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


def pickled_weights(folder):
    escaped = folder / "escaped"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(escaped)))
    return escaped


def test_the_pickled_canary_would_sing(tmp_path):
    escaped = pickled_weights(tmp_path)
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes()).close()
    assert escaped.exists()


def test_pickled_weights_only_are_refused(folder):
    (folder / "model.safetensors").unlink()
    escaped = pickled_weights(folder)
    assert message(folder) == (
        f"folder '{folder}' holds pickled weights (.bin) only, which can run code when opened; "
        "expected .safetensors. Convert it with save_pretrained on a machine you can spare."
    )
    assert not escaped.exists()


def test_pickled_weights_beside_others_are_left_alone(folder):
    escaped = pickled_weights(folder)
    load_model(str(folder), CPU)
    assert not escaped.exists()


def test_pickled_weights_are_not_opened_for_want_of_better(folder):
    weights = (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    assert message(folder).startswith(f"cannot load the model '{folder}': ")


# Damaged folders


def test_weights_that_end_early_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert message(folder).startswith(f"cannot load the model '{folder}': ")


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in message(folder)


def test_a_missing_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert message(folder).startswith(f"cannot load the model '{folder}': ")


@pytest.mark.parametrize(
    "content", ["{ not json", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": "wide"}']
)
def test_a_damaged_config_is_refused(folder, content):
    path = folder / "config.json"
    if "hidden_size" in content:
        edit(path, **json.loads(content))
    else:
        path.write_text(content)
    text = message(folder)
    assert text.startswith((f"cannot load the model '{folder}': ", f"'{path}' "))
    assert "\n" not in text


# A model's own code


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({place!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def plant_code(folder):
    """Give a folder code that writes a file when it is imported."""
    escaped = folder / "escaped"
    (folder / "own.py").write_text(CODE.format(place=str(escaped)))
    return escaped


MODEL_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
TOKENIZER_MAP = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}


def test_a_models_own_code_is_refused_and_does_not_run(folder):
    escaped = plant_code(folder)
    edit(folder / "config.json", model_type="own", auto_map=MODEL_MAP)
    text = message(folder)
    assert text.startswith(f"cannot load the model '{folder}': ")
    assert text.endswith("(Ghostlayers: --trust-remote-code lets it run; read the code first.)")
    assert not escaped.exists()


def test_a_tokenizers_own_code_does_not_run(folder):
    escaped = plant_code(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=TOKENIZER_MAP)
    with contextlib.suppress(ModelError):  # refused, or opened by a class of transformers
        load_model(str(folder), CPU)
    assert not escaped.exists()


def test_code_of_a_known_family_is_not_needed_and_does_not_run(folder):
    escaped = plant_code(folder)
    edit(folder / "config.json", auto_map=MODEL_MAP)
    loaded = load_model(str(folder), CPU)
    assert type(loaded.network) is transformers.LlamaForCausalLM
    assert not escaped.exists()


def test_trusted_code_runs(folder, tmp_path, monkeypatch):
    modules = transformers.dynamic_module_utils
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    escaped = plant_code(folder)
    edit(folder / "config.json", model_type="own", auto_map=MODEL_MAP)
    loaded = load_model(str(folder), dataclasses.replace(CPU, trust_remote_code=True))
    assert type(loaded.network).__name__ == "OwnForCausalLM"
    assert escaped.exists()


# What a loaded model is


def test_a_folder_is_opened_ready_to_be_measured(tiny_folder):
    loaded = load_model(str(tiny_folder), CPU)
    assert not loaded.network.training
    assert loaded.stored_dtype == torch.float32
    assert loaded.base.name == str(tiny_folder)
    assert loaded.base.folder == tiny_folder
    assert not loaded.base.on_hub
    assert loaded.base.revision is None
    stored = load_file(tiny_folder / "model.safetensors")
    for name, tensor in loaded.network.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: own-terms\n---\n", "own-terms"),
        ("---\ntags: [x]\n---\n", None),
        ("no header at all\n", None),
        ("---\n: : [broken\n---\n", None),
    ],
    ids=["no card", "licence", "named licence", "card without", "no header", "broken header"],
)
def test_the_licence_of_the_card_is_read(folder, card, licence):
    if card is not None:
        (folder / "README.md").write_text(card)
    assert load_model(str(folder), CPU).base.licence == licence


@pytest.fixture
def half_folder(folder, tiny_llama):
    tiny_llama.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("gain", "computed"), [(1.0, torch.float32), (2.0, torch.bfloat16)])
def test_half_precision_on_disk_is_remembered(half_folder, monkeypatch, gain, computed):
    monkeypatch.setattr(computing, "half_precision_gain", lambda dtype: gain)
    loaded = load_model(str(half_folder), CPU)
    assert loaded.stored_dtype == torch.bfloat16
    assert {each.dtype for each in loaded.network.parameters()} == {computed}


def test_widened_weights_keep_their_values(half_folder):
    loaded = load_model(str(half_folder), RunOptions(dtype="float32", device="cpu"))
    stored = load_file(half_folder / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(loaded.network.model.norm.weight, stored.float())


def test_narrowing_leaves_buffers_in_float32(folder):
    loaded = load_model(str(folder), RunOptions(dtype="bfloat16", device="cpu"))
    assert loaded.stored_dtype == torch.float32
    assert {each.dtype for each in loaded.network.parameters()} == {torch.bfloat16}
    assert loaded.network.model.rotary_emb.inv_freq.dtype == torch.float32


# The type to compute in


@pytest.mark.parametrize(
    ("asked", "stored", "device", "gain", "expected"),
    [
        ("auto", "float32", "cpu", 9.0, "float32"),
        ("auto", "bfloat16", "cpu", 0.1, "float32"),
        ("auto", "bfloat16", "cpu", 1.29, "float32"),
        ("auto", "bfloat16", "cpu", 1.3, "bfloat16"),
        ("auto", "float16", "cpu", 0.1, "float32"),
        ("auto", "bfloat16", "cuda", 0.1, "bfloat16"),
        ("auto", "float16", "cuda", 0.1, "float16"),
        ("bfloat16", "float32", "cpu", 0.1, "bfloat16"),
        ("float32", "bfloat16", "cpu", 9.0, "float32"),
        ("float16", "float32", "cuda", 0.1, "float16"),
    ],
)
def test_the_type_to_compute_in(monkeypatch, asked, stored, device, gain, expected):
    monkeypatch.setattr(computing, "half_precision_gain", lambda dtype: gain)
    got = compute_dtype(RunOptions(dtype=asked), getattr(torch, stored), torch.device(device))
    assert got == getattr(torch, expected)


def test_the_gain_is_not_measured_where_it_does_not_matter(monkeypatch):
    def measured(dtype):
        raise AssertionError("measured in vain")

    monkeypatch.setattr(computing, "half_precision_gain", measured)
    compute_dtype(RunOptions(), torch.float32, torch.device("cpu"))
    compute_dtype(RunOptions(), torch.bfloat16, torch.device("cuda"))
    compute_dtype(RunOptions(dtype="float16"), torch.bfloat16, torch.device("cpu"))


def test_the_gain_of_float32_over_itself_is_about_one():
    assert 0.05 < half_precision_gain(torch.float32) < 20


@pytest.mark.parametrize("seed", range(5))
def test_the_gain_is_that_of_an_idle_machine(monkeypatch, seed):
    """Two of three products take up to twenty times as long, as on a busy one."""
    rng, now, cost = random.Random(seed), [0.0], {torch.float32: 1.0, torch.bfloat16: 0.25}

    def product(left, right):
        now[0] += cost[left.dtype] * (1 if rng.random() < 1 / 3 else rng.uniform(1, 20))

    monkeypatch.setattr(computing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    assert half_precision_gain(torch.bfloat16) == pytest.approx(4.0, rel=0.05)


def test_an_unknown_type_is_refused():
    with pytest.raises(RecipeError) as caught:
        compute_dtype(RunOptions(dtype="int4"), torch.float32, torch.device("cpu"))
    assert str(caught.value) == ("unknown dtype 'int4'; expected auto, float32, bfloat16, float16.")


def test_an_unknown_device_is_refused(tiny_folder):
    with pytest.raises(RecipeError, match="unknown device 'toaster': "):
        load_model(str(tiny_folder), RunOptions(device="toaster"))


@pytest.mark.parametrize(
    ("device", "there"),
    [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())],
)
def test_a_device_that_is_not_there_is_refused(tiny_folder, device, there):
    if there:
        pytest.skip(f"this machine has {device}")
    with pytest.raises(RecipeError, match=device):
        load_model(str(tiny_folder), RunOptions(device=device))


# In memory


def test_a_model_in_memory_needs_its_tokenizer(tiny_llama):
    with pytest.raises(ModelError) as caught:
        from_memory(tiny_llama, None)
    assert str(caught.value) == ("a model in memory needs its tokenizer too: pass tokenizer=...")


def test_a_model_in_memory_is_used_as_it_is(tiny_llama, byte_tokenizer):
    loaded = from_memory(tiny_llama, byte_tokenizer)
    assert loaded.network is tiny_llama
    assert loaded.tokenizer is byte_tokenizer
    assert loaded.stored_dtype == torch.float32
    assert loaded.base.name == "LlamaForCausalLM"
    assert loaded.base.folder is None


def test_a_model_in_memory_remembers_its_folder(folder, byte_tokenizer):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = from_memory(model, byte_tokenizer).base
    assert (base.name, base.folder, base.licence) == (str(folder), folder, "mit")


def test_a_device_without_float64_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Apple's graphics processors are; here one that refuses to make such a tensor."""
    zeros = torch.zeros

    def refuse(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if dtype == torch.float64 and torch.device(device).type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: torch.device("mps"),
    )
    assert device_named(RunOptions()) == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"'mps' has no float64.*--device cpu"):
        device_named(RunOptions(device="mps"))


# The hub


@pytest.fixture
def cached(tiny_folder, tmp_path, monkeypatch):
    """A model in the hub's cache, and no network."""
    import huggingface_hub.constants as hub

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    commit = "0123456789" * 4
    place = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited to ask again"))
    return commit


@pytest.mark.parametrize("by_commit", [True, False])
def test_a_cached_model_opens_without_a_network(cached, by_commit):
    loaded = load_model("someone/tiny", CPU, cached if by_commit else None)
    assert loaded.base.on_hub
    assert loaded.base.revision == cached


@pytest.mark.usefixtures("cached")
def test_without_a_network_what_is_not_here_is_said_to_be_so():
    assert "is not on this machine yet" in message("someone/other")


def test_a_peft_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it into its base" in message(tmp_path)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert "lacks 'model-00002-of-00002.safetensors'" in message(folder)
    index.write_text("[]")
    assert "is damaged" in message(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"pad_token_id": 99_999}),
        ("config.json", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}),
        ("tokenizer.json", {"added_tokens": 5}),
    ],
)
def test_what_a_library_trips_over_is_told_with_its_files(folder, file, changes):
    edit(folder / file, **changes)
    text = message(folder)
    assert file in text
    assert "expected entries that transformers can compute with" in text
