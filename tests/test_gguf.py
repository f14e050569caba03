"""GGUF files: read again by transformers they are the model, to the bit where the type allows."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ghostlayers
from families import build
from gguf_models import IDS, VARIANTS, family, with_a_merge, write
from ghostlayers.checkpoint import saving
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.checkpoint.gguf_tokenizer import (
    PATTERNS,
    check_splitting,
    merge_scores,
    splitting_name,
)
from ghostlayers.errors import (
    GhostlayersError,
    ModelError,
    OutputError,
    RecipeError,
    UnsupportedModelError,
)
from ghostlayers.model.gguf_families import GGUF_FAMILIES, check_facts, query_factor, window_entries
from ghostlayers.model.gguf_positions import position_entries, position_tensors
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions
from oracles import logits

BYTES = {"type": "ByteLevel", "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}}


def plain(name: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {"vocab_size": 256, **changes}
    if name in {"qwen2", "qwen3"}:
        whole = {"use_sliding_window": False, "layer_types": ["full_attention"] * 5}
        settings = whole | settings
    if name == "qwen3":  # transformers reads no head width from the file, and takes 128
        settings |= {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build(name, **settings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(
    name: str, tied: bool, byte_tokenizer: Any, tmp_path: Path
) -> None:
    model = plain(name, tie_word_embeddings=tied)
    if name == "mistral":
        model.config.sliding_window = None
    folder = write(model, byte_tokenizer, tmp_path / "model")
    file = export_gguf(folder, tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)
    assert again.config.num_hidden_layers == 5
    names = {each.name for each in gguf.GGUFReader(file).tensors}
    assert ("output.weight" in names) is not tied


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "granitemoeshared"])
def test_a_checkpoint_that_stays_on_disk_makes_the_same_file(
    name: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    folder = with_a_merge(write(family(name), byte_tokenizer, tmp_path / "model"))
    files = [
        export_gguf(
            folder,
            tmp_path / f"{offload}.gguf",
            pre_tokenizer="gpt-2",
            options=RunOptions(offload=offload),
        )
        for offload in ("none", "disk")
    ]
    one, other = (file.read_bytes() for file in files)
    assert one == other


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_type_of_a_file_is_chosen(kind: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    model = family("llama").to(torch.bfloat16)
    folder = with_a_merge(write(model, byte_tokenizer, tmp_path / "model"))
    file = export_gguf(folder, tmp_path / "model.gguf", pre_tokenizer="gpt-2", dtype=kind)
    loaded = load_model(str(file), RunOptions(dtype="float32", device="cpu"))
    assert loaded.stored_dtype == getattr(torch, kind)
    # Small bfloat16 numbers are in all three types.
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS)
    torch.testing.assert_close(logits(loaded.network, IDS), expected, rtol=1e-5, atol=1e-5)


def test_numbers_beyond_a_type_are_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    model = family("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    folder = with_a_merge(write(model, byte_tokenizer, tmp_path / "model"))
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up.*9\.\d+e\+04.*--dtype bfloat16"):
        export_gguf(folder, tmp_path / "x.gguf", pre_tokenizer="gpt-2", dtype="float16")
    assert not (tmp_path / "x.gguf").exists()
    with pytest.raises(RecipeError, match="unknown dtype 'q4'"):
        export_gguf(folder, tmp_path / "x.gguf", pre_tokenizer="gpt-2", dtype="q4")


READABLE = {"llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "stablelm",
            "starcoder2", "gemma2", "gemma3_text"}  # fmt: skip
"""Families whose GGUF files transformers reads."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in sorted(READABLE)),
        *(
            pytest.param(*each, id=label)
            for label, each in VARIANTS.items()
            if each[0] in READABLE and label not in {"biased", "normed heads, parallel"}
        ),
    ],
)
def test_a_file_is_read_as_what_it_says(
    name: str, changes: dict[str, Any], byte_tokenizer: Any, tmp_path: Path
) -> None:
    """Scaled positions, windows, caps and scales, which transformers' reader leaves out."""
    if name == "qwen3":
        changes = changes | {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = family(name, **changes)
    folder = with_a_merge(write(model, byte_tokenizer, tmp_path / "model"))
    file = export_gguf(folder, tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    loaded = load_model(str(file), RunOptions(dtype="float32", device="cpu"))
    torch.testing.assert_close(
        logits(loaded.network, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5
    )
    assert loaded.stored_dtype == torch.float32


def test_names_are_listed_once_for_a_file(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for every module, as a table for every layer makes the cost quadratic."""
    folder = with_a_merge(write(family("llama"), byte_tokenizer, tmp_path / "model"))
    file = export_gguf(folder, tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    made = []
    make = gguf.get_tensor_name_map
    counted = lambda *given: made.append(given) or make(*given)  # noqa: E731
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    load_model(str(file), RunOptions(dtype="float32", device="cpu"))
    assert len(made) == 1
    assert gguf.get_tensor_name_map is counted


def test_a_file_that_is_not_read_whole_is_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    def refuse(label: str, match: str) -> None:
        name, changes = VARIANTS[label]
        folder = with_a_merge(write(family(name, **changes), byte_tokenizer, tmp_path / label))
        file = export_gguf(folder, tmp_path / f"{label}.gguf", pre_tokenizer="gpt-2")
        with pytest.raises(ModelError, match=match):
            load_model(str(file), RunOptions(dtype="float32", device="cpu"))

    refuse("biased", r"52,336 numbers, but transformers reads a model of 51,296.*ffn_gate")
    refuse("normed heads, parallel", "norms queries and keys")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_a_file_is_kept(
    dtype: torch.dtype, byte_tokenizer: Any, tmp_path: Path
) -> None:
    folder = write(family("llama").to(dtype), byte_tokenizer, tmp_path / "model")
    file = export_gguf(with_a_merge(folder), tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    loaded = load_model(str(file), RunOptions(dtype="float32", device="cpu"))
    assert loaded.stored_dtype == dtype
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded.network, IDS), logits(want, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype: torch.dtype, byte_tokenizer: Any, tmp_path: Path) -> None:
    model = plain("llama").to(dtype)
    folder = write(model, byte_tokenizer, tmp_path / "model")
    file = export_gguf(folder, tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(file).tensors}
    half = "BF16" if dtype is torch.bfloat16 else "F16"
    assert kinds["blk.0.ffn_up.weight"] == half
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(again, IDS), logits(want, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repair", "export"), [("refit:2", "auto"), ("normed", "stock-layer"), ("none", "auto")]
)
def test_a_pruned_checkpoint_becomes_a_file(
    repair: str, export: str, trained_llama: Any, byte_tokenizer: Any, some_text: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from ghostlayers.checkpoint.proof import Verification

    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))
    pruned = ghostlayers.prune(
        trained_llama, layers=2, select="streamline", repair=repair, export=export,
        windows=8, sequence_length=64, held_out_windows=2,
        tokenizer=byte_tokenizer, data=some_text,
    )  # fmt: skip
    pruned.save(tmp_path / "out")
    file = export_gguf(tmp_path / "out", tmp_path / "out.gguf", pre_tokenizer="gpt-2")
    names = {each.name for each in gguf.GGUFReader(file).tensors}
    assert ("blk.0.ffn_gate.bias" in names) == (export == "stock-layer")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert again.config.num_hidden_layers == pruned.model.config.num_hidden_layers
    if export != "stock-layer":  # transformers' reader has no entry for biases of the MLP
        want = logits(pruned.model, IDS)
        torch.testing.assert_close(logits(again, IDS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_from_gguf_to_a_smaller_gguf(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from ghostlayers.checkpoint.proof import Verification

    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))
    folder = with_a_merge(write(trained_llama, byte_tokenizer, tmp_path / "dense"))
    file = export_gguf(folder, tmp_path / "dense.gguf", pre_tokenizer="gpt-2")
    pruned = ghostlayers.prune(
        str(file), remove="2-3", repair="refit:1", windows=8, sequence_length=64,
        held_out_windows=2, data=some_text,
    )  # fmt: skip
    pruned.save(tmp_path / "small")
    small = export_gguf(tmp_path / "small", tmp_path / "small.gguf", pre_tokenizer="gpt-2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=small.name)
    assert again.config.num_hidden_layers == trained_llama.config.num_hidden_layers - 2
    said = gguf.GGUFReader(small).fields["general.description"].contents()
    assert said == "dense without decoder layers 2-3 of its 8, repaired by refit:1, by Ghostlayers."
    assert "general.description" not in gguf.GGUFReader(file).fields


def positions(name: str, rope: dict[str, Any] | None = None, **changes: Any) -> Any:
    model = build(name, **changes) if rope is None else build(name, rope_parameters=rope, **changes)
    config = model.config
    entries = dict(position_entries(config, GGUF_FAMILIES[name]))
    return entries, position_tensors(config, model.model.rotary_emb)


def test_scaled_positions_become_factors() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    _, tensors = positions("llama", rope)
    factors = tensors["rope_freqs.weight"]
    assert factors[-1] == pytest.approx(8.0)
    assert factors.min() >= 1.0
    assert positions("llama")[1] == {}
    with pytest.raises(UnsupportedModelError, match=r"kind 'llama3' are not written.*'qwen2'"):
        positions("qwen2", rope)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="positions of kind 'dynamic'"):
        positions("llama", rope)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match="rotates 50% of a head's channels"):
        positions("llama", rope)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "mscale": 0.7}
    with pytest.raises(UnsupportedModelError, match="'yarn' with mscale"):
        positions("qwen3", rope)


FULL, LOCAL = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu', but llama.cpp computes silu"),
        ("gemma2", {"tie_word_embeddings": False}, "embedding for its head"),
        ("gemma2", {"final_logit_softcapping": None}, "always caps"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "does not cap"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "layer 2 of this checkpoint"),
        ("cohere", {"use_qk_norm": True}, "64 and more layers only, and this one, of 5"),
        ("cohere2", {"layer_types": [FULL] * 5}, "none is left"),
        (
            "exaone4",
            {"sliding_window": 8, "layer_types": [FULL] * 5},
            "windows in models of 64 layers only",
        ),
        ("qwen3", {"layer_types": [LOCAL] * 5, "sliding_window": 8}, "slides over 8 tokens"),
        ("starcoder2", {"head_dim": 16}, "channels in all"),
        ("qwen3_moe", {"norm_topk_prob": False}, "llama.cpp normalises the weights"),
        ("qwen2_moe", {"norm_topk_prob": True}, "llama.cpp does not normalise the weights"),
        ("qwen2_moe", {"mlp_only_layers": [2]}, "experts in every layer"),
        ("olmoe", {"num_key_value_heads": 4, "clip_qkv": 8.0}, "does not clamp"),
        ("olmoe", {}, "as many heads of keys"),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_checked(
    name: str, changes: dict[str, Any], match: str
) -> None:
    config = build(name).config
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=match):
        check_facts(config)


def test_a_cut_that_breaks_a_fixed_pattern_is_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    """SmolLM3 leaves positions out of every fourth layer, and llama.cpp counts for itself."""
    model = build("smollm3", vocab_size=256, num_hidden_layers=9)
    for remove, legal in (("4-7", True), ("2-3", False)):
        pruned = ghostlayers.prune(
            model, remove=remove, repair="none", export="auto", windows=2, sequence_length=16,
            held_out_windows=0, tokenizer=byte_tokenizer, data=["some text " * 40],
        )  # fmt: skip
        folder = write(pruned.model, byte_tokenizer, tmp_path / remove)
        if legal:
            export_gguf(folder, tmp_path / "legal.gguf", pre_tokenizer="gpt-2")
        else:
            with pytest.raises(UnsupportedModelError, match="whole groups of four layers"):
                export_gguf(folder, tmp_path / "illegal.gguf", pre_tokenizer="gpt-2")


def test_windows_are_said_layer_by_layer() -> None:
    def entries(name: str, types: list[str]) -> Any:
        config = build(name, layer_types=types, sliding_window=6).config
        return dict(window_entries(config, GGUF_FAMILIES[name]))

    mixed = [LOCAL, FULL, LOCAL, LOCAL, FULL]
    flags = [True, False, True, True, False]
    said = {"sliding_window": 6, "sliding_window_pattern": flags}
    assert entries("gemma3_text", mixed) == said
    assert entries("gemma3_text", [FULL] * 5) == {}
    whole = {"sliding_window": 64, "sliding_window_pattern": [True] * 5}
    assert entries("gemma2", [FULL] * 5) == whole
    assert entries("llama", [FULL] * 5) == {}


def test_queries_carry_the_scale_that_llama_cpp_does_not_read() -> None:
    assert query_factor(build("llama").config, GGUF_FAMILIES["llama"]) == 1.0
    config = build("gemma3_text", query_pre_attn_scalar=32, head_dim=16).config
    row = GGUF_FAMILIES["gemma3_text"]
    assert query_factor(config, row) == pytest.approx((16 / 32) ** 0.5)
    config.num_hidden_layers = 62  # there llama.cpp takes the width that heads would share
    assert query_factor(config, row) == pytest.approx((8 / 32) ** 0.5)


def test_a_bias_that_is_not_read_must_be_zero(byte_tokenizer: Any, tmp_path: Path) -> None:
    model = build("qwen3", vocab_size=256, attention_bias=True, layer_types=[FULL] * 5)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    folder = write(model, byte_tokenizer, tmp_path / "zero")
    file = export_gguf(folder, tmp_path / "zero.gguf", pre_tokenizer="gpt-2")
    names = {each.name for each in gguf.GGUFReader(file).tensors}
    assert "blk.0.attn_q.bias" in names
    assert "blk.0.attn_output.bias" not in names
    model.model.layers[3].self_attn.o_proj.bias[2] = 0.5
    folder = write(model, byte_tokenizer, tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=r"layers.3.self_attn.o_proj.bias' is not zero"):
        export_gguf(folder, tmp_path / "other.gguf", pre_tokenizer="gpt-2")


@pytest.mark.parametrize(
    ("steps", "whole", "name"),
    [
        *(([split(pattern), BYTES], whole, name) for (pattern, whole), name in PATTERNS.items()),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], False, "smollm"),
        ([{"type": "ByteLevel"}], False, "gpt-2"),
    ],
)
def test_how_a_tokenizer_splits_is_named(
    steps: list[dict[str, Any]], whole: bool, name: str
) -> None:
    model = {"ignore_merges": whole}
    content = {"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert splitting_name(content) == name


def test_the_named_pattern_splits_as_llama_cpp_does() -> None:
    """The words of a text under each pattern, as its name in llama.cpp splits them."""
    text = "GetHTTPPage'll see 12345 naïve/paths\n\n  x"
    words = {
        name: [word for word, _ in pre_tokenizers.Split(Regex(pattern), "isolated")
               .pre_tokenize_str(text)]
        for (pattern, _), name in PATTERNS.items()
    }  # fmt: skip
    plain = ["GetHTTPPage", "'ll", " see", " ", "123", "45", " naïve", "/paths", "\n\n", " ", " x"]
    assert words["llama-bpe"] == words["dbrx"] == plain
    digits = plain[:4] + list("12345") + plain[6:]
    assert words["qwen2"] == digits
    cased = ["Get", "HTTPPage", "'ll", *digits[2:]]
    assert words["tekken"] == cased
    with_suffix = ["Get", "HTTPPage'll", *plain[2:]]
    assert words["gpt-4o"] == with_suffix


@pytest.mark.parametrize("bos", [False, True])
def test_what_stands_before_a_text_is_said(
    bos: bool, byte_tokenizer: Any, bos_tokenizer: Any, tmp_path: Path
) -> None:
    """llama.cpp assumes a first token by the pre-tokenizer's name where the file does not tell."""
    tokenizer = bos_tokenizer if bos else byte_tokenizer
    folder = write(plain("llama"), tokenizer, tmp_path / "model")
    file = export_gguf(folder, tmp_path / "model.gguf", pre_tokenizer="llama-bpe")
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    assert field is not None
    assert field.contents() == bos


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Metaspace"}],
        # Mistral NeMo's and GPT-4o's patterns hold the same parts as Qwen's and Llama's.
        [split(r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+|\p{N}| ?[^\s]+"), BYTES],
        [split(r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+(?i:'s)?|\p{N}{1,3}| ?[^\s]+"), BYTES],
        [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}],
    ],
)
def test_other_ways_to_split_are_refused(steps: list[dict[str, Any]]) -> None:
    content = {"model": {}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    with pytest.raises(UnsupportedModelError, match="--pre-tokenizer"):
        splitting_name(content)


def sentencepiece_like(seed: int = 0) -> PreTrainedTokenizerFast:
    """Characters a to e, bytes for all others, and tokens at random with all ways to merge them."""
    random = np.random.default_rng(seed)
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", "<s>", "</s>", *every_byte, "\u2581", *"abcde"]
    while len(words) < 300:
        token = "".join(random.choice(words[259:], 2))
        if len(token) <= 4 and token not in words:
            words.append(token)
    halves = [(word[:middle], word[middle:]) for word in words[265:] for middle in range(1, 4)]
    merges = [pair for pair in halves if all(half in words for half in pair)]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def merged_by_scores(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """llama.cpp's rule, one merge at a time: neighbours of the highest score, leftmost first."""
    score = dict(zip(tokens, scores, strict=True))
    parts = list(text)
    while True:
        pairs = [left + right for left, right in pairwise(parts)]
        known = [index for index, pair in enumerate(pairs) if pair in score]
        if not known:
            return parts
        best = max(known, key=lambda index: (score[pairs[index]], -index))
        parts[best : best + 2] = [pairs[best]]


@pytest.mark.parametrize("seed", range(4))
def test_scores_merge_as_the_rules_do(seed: int) -> None:
    tokenizer = sentencepiece_like(seed)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    scores = merge_scores(content, tokens)
    random = np.random.default_rng(seed + 100)
    for _ in range(200):
        text = "".join(random.choice(list("abcde "), 12))
        want = tokenizer.tokenize(text)
        assert merged_by_scores("\u2581" + text.replace(" ", "\u2581"), tokens, scores) == want


def test_rules_that_scores_cannot_say_are_refused() -> None:
    rules = [("a", "b"), ("b", "c"), ("a", "bc")]  # never "ab" and "c"
    with pytest.raises(UnsupportedModelError, match="never merges 'ab' and 'c' into 'abc'"):
        merge_scores({"model": {"merges": rules}}, ["a", "b", "c", "ab", "bc", "abc"])


def test_a_sentencepiece_like_tokenizer_in_the_file(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    known = len(tokenizer)
    folder = write(plain("llama", vocab_size=known + 12), tokenizer, tmp_path / "folder")
    export_gguf(folder, tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = [gguf.TokenType(each) for each in fields["tokenizer.ggml.token_type"].contents()]
    assert tokens[:known] == sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert kinds[known:] == [gguf.TokenType.UNUSED] * 12  # rows of the embedding without a token
    assert kinds[:4] == [
        gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE,
    ]  # fmt: skip
    assert kinds[259] == gguf.TokenType.NORMAL


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
        ("mistral", {"sliding_window": 6}, "slides over 6 tokens"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 5,
                   "sliding_window": 6}, "slides over 6 tokens"),
    ],
)  # fmt: skip
def test_facts_that_the_file_cannot_say_are_refused(
    name: str, changes: dict[str, Any], message: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    folder = write(plain(name, **changes), byte_tokenizer, tmp_path / "folder")
    with pytest.raises(UnsupportedModelError, match=message):
        export_gguf(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_what_has_no_place_in_the_format_is_refused(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from ghostlayers.checkpoint.proof import Verification

    def refuse(error: type[GhostlayersError], match: str, folder: str, file: str) -> None:
        with pytest.raises(error, match=match):
            export_gguf(tmp_path / folder, tmp_path / file)
        assert not list(tmp_path.glob("*.gguf*"))

    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))
    pruned = ghostlayers.prune(
        trained_llama, remove="2-3", windows=8, sequence_length=64, held_out_windows=2,
        tokenizer=byte_tokenizer, data=some_text,
    )  # fmt: skip
    pruned.save(tmp_path / "custom")
    refuse(UnsupportedModelError, "carries operators.*--repair refit:3", "custom", "x.gguf")
    write(build("gpt2", vocab_size=256), byte_tokenizer, tmp_path / "gpt2")
    refuse(UnsupportedModelError, "'gpt2' are not written as GGUF", "gpt2", "x.gguf")
    refuse(OutputError, "should end in .gguf", "custom", "x.bin")
    refuse(ModelError, "holds no config.json", "nowhere", "x.gguf")
    folder = write(plain("llama"), byte_tokenizer, tmp_path / "plain")
    tokenizer = folder / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"] = {"type": "Unigram"}
    tokenizer.write_text(json.dumps(content))
    refuse(UnsupportedModelError, "tokenizer of type Unigram", "plain", "x.gguf")
    tokenizer.unlink()
    refuse(UnsupportedModelError, "has no tokenizer.json", "plain", "x.gguf")
    (tmp_path / "taken.gguf").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(folder, tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_text() == "precious"


@pytest.mark.parametrize("name", ["a" * 65, "", "\x1b[2Jgpt-2", "gpt 2", "GPT-2", "gpt-2\n", "é"])
def test_a_name_that_no_reader_knows_is_not_written(name):
    with pytest.raises(RecipeError, match="--pre-tokenizer: expected a name") as refused:
        splitting_name({}, name)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", [*PATTERNS.values(), "default", "smollm", "a.x-4.0", "jina_v2-de"])
def test_names_that_readers_know_are_taken(name):
    check_splitting(name)
    assert splitting_name({}, name) == name
