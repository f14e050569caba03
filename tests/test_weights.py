"""The door for weights: all of what the files hold, and nothing else, in every family."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from families import FAMILIES, build
from ghostlayers.checkpoint import saving
from ghostlayers.checkpoint.adapter import weights_hash
from ghostlayers.errors import ModelError, NonFiniteError, UnsupportedModelError
from ghostlayers.model import tensor_files, weights
from ghostlayers.model.anatomy import examine
from ghostlayers.model.causal import check_causal
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import from_memory, load_model
from ghostlayers.pipeline import evaluate
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs.base import Operator, Repair, rounded_once
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from ghostlayers.surgery.stock_layer import with_stock_layers
from ghostlayers.text.corpora import Corpus

CPU = RunOptions(dtype="float32", device="cpu")
SEEDS = range(3)


def save(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def write(folder, tensors):
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), CPU)
    assert "is not whole" in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


# Every family, damaged at random


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_of_every_family_passes_and_a_damaged_one_does_not(
    name, tmp_path, byte_tokenizer
):
    """A tensor that is gone, one under another name, and one too many, chosen at random."""
    rng = random.Random(name)
    model = build(name)
    place = save(model, tmp_path / "model", byte_tokenizer)
    opened = load_model(str(place), CPU).network
    opened_state, wanted = opened.state_dict(), model.state_dict()
    assert all(torch.equal(opened_state[key], wanted[key]) for key in wanted)
    whole = tensors_of(place)
    gone = rng.choice(sorted(whole))
    write(place, {key: tensor for key, tensor in whole.items() if key != gone})
    assert_refused_or_same(place, wanted)
    renamed = rng.choice(sorted(whole))
    write(place, {flipped(rng, key) if key == renamed else key: v for key, v in whole.items()})
    assert_refused_or_same(place, wanted)
    write(place, {**whole, flipped(rng, renamed): whole[renamed]})
    refusal(place)


def assert_refused_or_same(folder, wanted):
    """What a family does without, such as a tied head, may be gone if nothing changes."""
    try:
        opened = load_model(str(folder), CPU).network
    except ModelError:
        return
    opened_state = opened.state_dict()
    assert all(torch.equal(opened_state[key], wanted[key]) for key in wanted)


def flipped(rng, name):
    """One bit of a name's last word is another: what a bad disk or cable does."""
    at = rng.randrange(name.rindex(".") + 1, len(name))
    return name[:at] + chr(ord(name[at]) ^ 1) + name[at + 1 :]


# Reasons


def test_a_head_that_no_file_has_is_not_made_up(folder):
    whole = tensors_of(folder)
    write(folder, {key: tensor for key, tensor in whole.items() if key != "lm_head.weight"})
    edit(folder, tie_word_embeddings=False)
    assert "tie_word_embeddings" in refusal(folder)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "any.thing."])
def test_a_wrappers_prefix_is_named(folder, prefix):
    write(folder, {prefix + key: tensor for key, tensor in tensors_of(folder).items()})
    assert f"begins with '{prefix}'" in refusal(folder)


@pytest.mark.parametrize(("depth", "words"), [(3, "says 3"), (9, "says 9")])
def test_another_depth_is_named(folder, tiny_llama, depth, words):
    edit(folder, num_hidden_layers=depth)
    text = refusal(folder)
    assert words in text
    assert f"the files hold {tiny_llama.config.num_hidden_layers}" in text


def test_a_classifier_is_named(folder):
    write(folder, {**tensors_of(folder), "score.weight": torch.zeros(2, 32)})
    assert "classifier" in refusal(folder)


def test_another_shape_is_named(folder):
    whole = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    write(folder, {**whole, name: whole[name][:-1]})
    text = refusal(folder)
    assert f"'{name}' is" in text
    assert "wanted" in text


def test_lost_experts_are_named(tmp_path, byte_tokenizer):
    place = save(build("mixtral"), tmp_path / "model", byte_tokenizer)
    whole = tensors_of(place)
    write(place, {key: tensor for key, tensor in whole.items() if "experts" not in key})
    assert "Experts were lost" in refusal(place)
    write(place, {key: tensor for key, tensor in whole.items() if "experts.1." not in key})
    with pytest.raises(ModelError):
        load_model(str(place), CPU)


def test_an_edited_guard_does_not_lose_the_operators(tmp_path, trained_llama, byte_tokenizer):
    span, hidden = Span(1, 2), trained_llama.config.hidden_size
    repair = Repair("ghost", Operator({"weight": torch.eye(hidden) * 0.1}))
    pruned = removal.prune_layers(DenseModel(trained_llama), [span], {span: repair})
    place = save(pruned, tmp_path / "out", byte_tokenizer)
    content = json.loads((place / "config.json").read_text())
    count = content["num_hidden_layers"]["value"]
    edit(place, num_hidden_layers=count, model_type="llama", auto_map={})
    assert "was edited" in refusal(place)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_offloaded_or_not_the_door_is_the_same(folder, offload):
    whole = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    for damaged in ({}, {name: whole[name][:-1]}, {name: whole[name], "x.1.y": whole[name]}):
        write(folder, {key: tensor for key, tensor in whole.items() if key != name} | damaged)
        with pytest.raises(ModelError, match="is not whole"):
            load_model(str(folder), RunOptions("float32", "cpu", offload=offload))


# Types


def test_each_tensor_is_stored_in_the_type_of_its_file(folder, tmp_path, byte_tokenizer):
    """Most in bfloat16, norms in float32; all digits stay whatever it was computed in."""
    rng = random.Random(0)
    whole = {
        key: tensor if "norm" in key or rng.random() < 0.2 else tensor.bfloat16()
        for key, tensor in tensors_of(folder).items()
    }
    write(folder, whole)
    for computed in ("float32", "bfloat16"):
        loaded = load_model(str(folder), RunOptions(computed, "cpu"))
        assert loaded.stored_dtype == torch.bfloat16
        pruned = removal.prune_layers(loaded, [Span(1, 2)])
        out = tmp_path / computed
        out.mkdir()
        saving._write_weights(out, pruned, loaded.stored_dtype)
        saved = tensors_of(out)
        for name, tensor in saved.items():
            parts = name.split(".")
            if "layers" in parts and int(parts[2]) >= 1:
                parts[2] = str(int(parts[2]) + 1)
            original = whole[".".join(parts)]
            assert tensor.dtype == original.dtype
            assert torch.equal(tensor, original)


@pytest.mark.parametrize("computed", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mixtral", "minimax_m2", "granitemoe", "gpt_neox", "nemotron_h"])
def test_packed_and_renamed_tensors_keep_type_and_digits_too(
    name, computed, tmp_path, byte_tokenizer
):
    """In memory experts lie in one tensor, and names are others than the file's."""
    rng = random.Random(name)
    place = save(build(name), tmp_path / "model", byte_tokenizer)
    whole = {
        key: tensor if not tensor.is_floating_point() or rng.random() < 0.3 else tensor.bfloat16()
        for key, tensor in tensors_of(place).items()
    }
    write(place, whole)
    loaded = load_model(str(place), RunOptions(computed, "cpu"))
    pruned = removal.prune_layers(loaded, [Span(4, 5)])
    (out := tmp_path / "out").mkdir()
    saving._write_weights(out, pruned, loaded.stored_dtype)
    saved = tensors_of(out)
    assert len(saved) > 0.7 * len(whole)
    for key, tensor in saved.items():
        assert tensor.dtype == whole[key].dtype
        assert torch.equal(tensor, whole[key])


def test_a_stock_layers_model_keeps_types(folder, tmp_path):
    whole = {
        k: tensor if "norm" in k else tensor.bfloat16() for k, tensor in tensors_of(folder).items()
    }
    write(folder, whole)
    loaded = load_model(str(folder), CPU)
    hidden = loaded.network.config.hidden_size
    repair = Repair("normed", Operator({"normed": torch.eye(hidden) * 0.1}))
    bare = removal.prune_layers(loaded, [Span(1, 2)])
    made = with_stock_layers(bare, [Span(1, 2)], {Span(1, 2): repair}, torch.bfloat16)
    (out := tmp_path / "out").mkdir()
    saving._write_weights(out, made, torch.bfloat16)
    saved = tensors_of(out)
    assert all(torch.equal(saved[k], whole[k]) for k in saved if "layers.5" in k and k in whole)
    assert saved["model.norm.weight"].dtype == torch.float32
    assert saved["model.layers.5.input_layernorm.weight"].dtype == torch.float32
    assert saved["model.layers.5.mlp.up_proj.weight"].dtype == torch.bfloat16


# Several files


def in_shards(folder, more=None, index=None):
    """The weights in two files with an index, both changed as told."""
    whole = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        tensors = {name: whole[name].clone() for name in mine} | (more or {}).get(file, {})
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, mine in parts.items() for name in mine}
    content = {"metadata": {}, "weight_map": {**places, **(index or {})}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return names


def test_shards_are_read_as_the_index_says_or_not_at_all(folder, tmp_path):
    def refused(match, **changes):
        place = shutil.copytree(folder, tmp_path / match.replace(" ", ""))
        in_shards(place, **changes)
        with pytest.raises(ModelError, match=match):
            load_model(str(place), CPU)

    first = sorted(tensors_of(folder))[0]
    twice = {"b.safetensors": {first: torch.zeros_like(tensors_of(folder)[first])}}
    refused("twice", more=twice)
    refused("but a.safetensors holds it", index={first: "b.safetensors"})
    refused("of the same folder", index={first: "../model/a.safetensors"})
    refused("which model.safetensors.index.json names", index={first: "c.safetensors"})
    whole = tensors_of(folder)
    in_shards(folder)
    assert tensor_files.held_in(folder).keys() == whole.keys()
    write(folder, whole)
    with pytest.raises(ModelError, match="two sets of weights"):
        load_model(str(folder), CPU)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_packed_numbers_without_a_word_of_it_are_refused(folder, kind):
    whole = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    write(folder, {**whole, name: whole[name].to(kind)})
    with pytest.raises(ModelError, match="names no quantisation"):
        load_model(str(folder), CPU)


def test_the_files_say_the_type_not_the_config(folder):
    edit(folder, dtype="bfloat16")
    assert load_model(str(folder), CPU).stored_dtype == torch.float32
    write(folder, {key: tensor.bfloat16() for key, tensor in tensors_of(folder).items()})
    edit(folder, dtype="float32")
    assert load_model(str(folder), CPU).stored_dtype == torch.bfloat16


def test_an_adapter_knows_its_base_by_all_digits(folder):
    """Computed in whatever type, the hash is of what lies on disk."""
    hashes = {
        weights_hash(load_model(str(folder), RunOptions(kind, "cpu")).network, torch.float32)
        for kind in ("float32", "bfloat16", "float16")
    }
    assert len(hashes) == 1


def test_types_of_a_model_in_memory_stay(trained_llama, byte_tokenizer):
    import copy

    model = copy.deepcopy(trained_llama)
    norm = model.model.norm.weight
    norm.data = norm.data.double()
    loaded = from_memory(model.eval(), byte_tokenizer)
    assert weights.stored_type(norm, loaded.stored_dtype) == torch.float64


# What is no causal language model


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_an_encoder_is_refused(kind, tmp_path, byte_tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    config = BertConfig(vocab_size=256, num_hidden_layers=3, **sizes)
    place = save(kind(config), tmp_path / "bert", byte_tokenizer)
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        evaluate(str(place), data=Corpus("text", ("some text " * 99,)), options=CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_from_left_to_right(name, byte_tokenizer):
    check_causal(from_memory(build(name), byte_tokenizer))


# Numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "where", ["model.norm.weight", "embed_tokens.weight", "layers.2.mlp.up_proj"]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_bad_numbers_are_refused_where_they_are_met(folder, some_text, value, where, seed):
    whole = tensors_of(folder)
    name = next(key for key in whole if where in key)
    rows = whole[name].view(whole[name].shape[0], -1)
    rows[random.Random(seed).randrange(len(rows))] = value
    write(folder, whole)
    text = Corpus("sentences", tuple(some_text))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        evaluate(str(folder), data=text, sequence_length=32, max_windows=2, options=CPU)


def test_a_repair_of_nan_is_not_called_too_large_for_a_type():
    with pytest.raises(NonFiniteError, match="NaN or infinity as weights"):
        rounded_once(torch.tensor([1.0, float("nan")]), torch.float32)


def test_a_model_of_zeros_is_told_as_such(byte_tokenizer):
    """Its MLPs are given zeros: a fold into them would be scaled by a ratio of zeros."""
    model = build("llama")
    for name, weight in model.named_parameters():
        if "embed" not in name:
            torch.nn.init.zeros_(weight)
    said = examine(from_memory(model, byte_tokenizer))
    assert isinstance(said, str)
    assert "given nothing but zeros" in said


def test_offloaded_experts_keep_type_and_digits(tmp_path, byte_tokenizer):
    """Packed experts are written anew for offloading, in the type that the run computes in."""
    place = save(build("mixtral"), tmp_path / "model", byte_tokenizer)
    whole = {key: tensor.bfloat16() for key, tensor in tensors_of(place).items()}
    write(place, whole)
    loaded = load_model(str(place), RunOptions("float32", "cpu", offload="disk"))
    out = tmp_path / "out"
    out.mkdir()
    saving._write_weights(out, removal.prune_layers(loaded, [Span(4, 5)]), torch.bfloat16)
    saved = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    assert saved.keys() == {key for key in whole if ".4." not in key[: len("model.layers.4.")]}
    assert all(torch.equal(tensor, whole[key]) for key, tensor in saved.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values())
