"""What llama.cpp computes from our files is what transformers computes: needs llama-cpp-python.

`pip install llama-cpp-python` builds it; where it is not installed these tests are skipped, and
`test_gguf.py` holds the files to what transformers reads from them.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_models import IDS, VARIANTS, family, with_a_merge, write
from ghostlayers.checkpoint import quantise as quantising
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.checkpoint.quantise import NEED_IMATRIX, TYPES, quantise
from ghostlayers.compare import Comparison, compare
from ghostlayers.errors import ModelError
from ghostlayers.evaluation import llama_cpp as engine
from ghostlayers.export import IMATRIX, Family, export_family
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_families import GGUF_FAMILIES
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from ghostlayers.text.tokens import Windows
from oracles import fitted, logits
from test_gguf import READABLE
from test_gguf_copy import MIXED, cut, made, opened

llama_cpp = pytest.importorskip("llama_cpp")


def computed(file: Path, ids: torch.Tensor) -> np.ndarray:
    llama = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False)
    llama.eval(ids[0].tolist())
    return np.array(llama.scores[: ids.shape[1]])


def apart(file: Path) -> float:
    """The largest difference between llama.cpp's logits and transformers', of the largest logit."""
    want = logits(opened(file).network, IDS)[0].float().numpy()
    return float(np.abs(computed(file, IDS) - want).max() / np.abs(want).max())


def check(model: Any, tokenizer: Any, folder: Path, *, exported: Any = None) -> None:
    """A file of ``exported``, by default the model itself, computes what the model does."""
    write(exported or model, tokenizer, folder / "model")
    with_a_merge(folder / "model")
    file = export_gguf(folder / "model", folder / "model.gguf", pre_tokenizer="gpt-2")
    want = logits(model, IDS)[0].float().numpy()
    got = computed(file, IDS)
    # llama.cpp keeps keys and values in float16
    worst = np.abs(got - want).max()
    assert worst < 4e-3 * np.abs(want).max() * max(1.0, model.config.num_hidden_layers / 16)


@pytest.mark.parametrize("name", sorted(GGUF_FAMILIES))
def test_a_family_computes_the_same(name: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    check(family(name), byte_tokenizer, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_the_same(name: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    kind, changes = VARIANTS[name]
    check(family(kind, **changes), byte_tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_projection_refitted_with_its_norm_computes_the_same(
    name: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    dense, spans = family(name), (Span(2, 3),)
    built = removal.prune_layers(DenseModel(dense), spans, fitted(dense, "refit:1", spans))
    check(built, byte_tokenizer, tmp_path)
    with pytest.raises(AssertionError):
        check(
            removal.prune_layers(DenseModel(dense), spans),
            byte_tokenizer,
            tmp_path / "bare",
            exported=built,
        )


def test_the_check_sees_a_wrong_file(byte_tokenizer: Any, tmp_path: Path) -> None:
    """Windows in other layers are one of the smallest things that a file could say wrongly."""
    model = family("gemma3_text")
    other = family("gemma3_text", layer_types=model.config.layer_types[::-1])
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        check(model, byte_tokenizer, tmp_path, exported=other)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}  # fmt: skip
"""A model whose rows the K and IQ types can hold."""


@pytest.fixture(scope="module")
def wide(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return with_a_merge(write(family("llama", **WIDE), byte_tokenizer, folder))


@pytest.fixture(scope="module")
def plain(wide: Path) -> Path:
    """It as a file of its own type."""
    return export_gguf(wide, wide.with_name("plain.gguf"), pre_tokenizer="gpt-2")


@pytest.fixture(scope="module")
def weighed(wide: Path, some_text: list[str]) -> dict[str, Path]:
    """It in two types by importance, and the importance matrix."""
    text = wide.with_name("text.txt")
    text.write_text("\n\n".join(some_text))
    asked = Family(("IQ2_XS", "Q4_K_S"), str(text), windows=8, sequence_length=64)
    made = export_family(wide, wide.with_name("w-{type}.gguf"), asked, pre_tokenizer="gpt-2")
    return {each.kind: each.path for each in made}


def tensors_of(path: Path) -> dict[str, Any]:
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_a_simple_type_has_the_bytes_that_the_library_writes(
    kind: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tensors_of(quantise(plain, tmp_path / "theirs.gguf", kind).path)
    monkeypatch.setattr(engine, "is_installed", lambda: False)
    ours = tensors_of(quantise(plain, tmp_path / "ours.gguf", kind).path)
    for name, each in ours.items():
        if name != "output.weight":  # which has six bits there and eight here
            assert each.tensor_type == theirs[name].tensor_type
            same = np.mean(each.data == theirs[name].data)
            assert same == 1.0 or (kind in {"Q5_1", "Q4_1"} and same > 0.999)  # halves


@pytest.mark.parametrize(
    "kind", sorted(NEED_IMATRIX | {"IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL", "Q2_K", "Q3_K_S", "Q6_K"})
)
def test_the_types_that_need_a_matrix_are_those_that_llama_cpp_refuses(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    def make() -> None:
        engine.run("quantise", source=plain, target=tmp_path / "made.gguf", type=TYPES[kind],
                   imatrix=None)  # fmt: skip

    if kind not in NEED_IMATRIX:
        make()
        return
    with pytest.raises(ModelError, match="requires an imatrix"):
        make()


def test_what_is_multiplied_most_is_rounded_least(
    plain: Path, weighed: dict[str, Path], tmp_path: Path
) -> None:
    """The squared error, weighed by the mean squares, falls; without weights it need not."""
    bare = tensors_of(quantise(plain, tmp_path / "bare.gguf", "Q4_K_S").path)
    there, here = tensors_of(plain), tensors_of(weighed["Q4_K_S"])
    sums = tensors_of(weighed[IMATRIX])
    ratios = []
    for name in (
        f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in ("ffn_down", "attn_q")
    ):
        weights = sums[f"{name}.in_sum2"].data
        errors = [
            float(
                (
                    weights
                    * (gguf.dequantize(f[name].data, f[name].tensor_type) - there[name].data) ** 2
                ).sum()
            )
            for f in (here, bare)
        ]
        assert here[name].tensor_type == bare[name].tensor_type
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 1.0
    fields = gguf.GGUFReader(weighed["IQ2_XS"]).fields
    assert fields["quantize.imatrix.file"].contents() == "w-imatrix.gguf"
    assert fields["quantize.imatrix.dataset"].contents() == "text.txt"
    assert fields["quantize.imatrix.chunks_count"].contents() == 8
    assert fields["quantize.imatrix.entries_count"].contents() == len(sums) // 2


def windows_of(length: int = 100) -> Windows:
    ids = torch.arange(2 * length).view(2, length) * 13 % 190 + 30
    return Windows(ids, False, None, ())


def test_losses_are_those_of_its_logits(plain: Path, tmp_path: Path) -> None:
    """Literally, in float64, from all logits of each window at once."""
    small, windows = quantise(plain, tmp_path / "small.gguf", "Q2_K").path, windows_of()
    found = engine.measure_losses(small, windows, plain)
    for ids, sums in zip(windows.input_ids, found, strict=True):
        mine, dense = (
            torch.from_numpy(computed(file, ids[None])).double()[:-1].log_softmax(-1)
            for file in (small, plain)
        )
        assert sums.num_tokens == len(ids) - 1
        loss = -mine.gather(1, ids[1:, None]).sum()
        assert sums.loss == pytest.approx(float(loss), rel=1e-3)  # batches of other sizes
        apart = (dense.exp() * (dense - mine)).sum()
        assert sums.kl == pytest.approx(float(apart), rel=1e-2, abs=1e-4)
        assert abs(sums.agreements - int((mine.argmax(-1) == dense.argmax(-1)).sum())) <= 1
        kept = torch.minimum(mine.exp(), dense.exp()).sum(-1).mean()
        assert sums.acceptance == pytest.approx(float(kept), abs=1e-3)
    alone = engine.measure_losses(plain, windows, plain)
    assert sum(each.kl for each in alone) == 0.0
    assert all(each.agreements == each.num_tokens for each in alone)


def test_speed_and_memory_are_those_of_one_file(plain: Path) -> None:
    how = {"prompt": 64, "new_tokens": 4, "repeats": 2}
    short, long = (engine.measure_speed(plain, context=n, **how) for n in (256, 16384))
    assert short.decode.repeats == 8
    assert short.to_dict()["prefill_tokens_s"] > short.to_dict()["decode_tokens_s"] > 0
    # Keys and values of 2 layers and 2 heads of 64 channels, in float16.
    assert long.memory_bytes - short.memory_bytes > 0.8 * (16384 - 256) * 2 * 2 * 2 * 64 * 2


def test_what_llama_cpp_cannot_read_is_told(plain: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(plain.read_bytes()[:100_000])
    with pytest.raises(ModelError, match=r"llama\.cpp failed: .*"):
        engine.measure_losses(broken, windows_of())


def test_dense_and_cut_models_are_compared_as_files(
    wide: Path, some_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in some_text[-4:]))
    asked = Comparison.from_dict(
        {"layers": [1], "select": ["streamline"], "repair": ["none", "refit:1", "ghost"],
         "eval_data": [str(text)], "max_windows": 2, "windows": 8, "held_out_windows": 2,
         "sequence_length": 64, "types": ["f16", "q8_0", "q4_k_m"], "prompt": "", "speed": False}
    )  # fmt: skip
    assert asked.types == ("F16", "Q8_0", "Q4_K_M")
    found = compare(str(wide), asked, tmp_path / "out", data=some_text[:-4])
    names = {(each["repair"], each["type"]) for each in found["files"]}
    assert names == {(r, t) for r in ("dense", "none", "refit:1") for t in asked.types}
    cells = {each["repair"]: each["loss_nats"] for each in found["cells"]}
    for each in found["file_losses"]:
        assert each["num_tokens"] == 2 * 63
        assert len(each["window_losses"]) == 2
        if each["type"] == "F16":
            assert each["loss_nats"] == pytest.approx(cells[each["repair"]], abs=0.01)
    (same,) = [e for e in found["file_losses"] if (e["repair"], e["type"]) == ("dense", "F16")]
    assert same["kl_nats"] == pytest.approx(0.0, abs=1e-6)
    sizes = {(e["repair"], e["type"]): e["size_bytes"] for e in found["files"]}
    assert sizes["dense", "F16"] > sizes["none", "F16"] > sizes["none", "Q4_K_M"]
    assert sizes["none", "Q8_0"] == sizes["refit:1", "Q8_0"]
    for step in ("measure_losses", "measure_speed"):
        monkeypatch.setattr(engine, step, None)
    monkeypatch.setattr(quantising, "quantise", None)
    assert compare(str(wide), asked, tmp_path / "out", data=some_text[:-4]) == found


@pytest.mark.parametrize("types", [None, MIXED], ids=["plain", "quantised"])
@pytest.mark.parametrize("name", sorted(READABLE))
def test_a_file_cut_from_a_file_computes_the_same(
    name: str, types: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    """Irregular cuts of files whose layers and types are mixed, beside transformers."""
    if types is not None and name in {"qwen2_moe", "qwen3_moe", "phi3"}:
        pytest.skip("rows of experts and merged projections are no whole blocks here")
    whole = made(name, byte_tokenizer, tmp_path, types)
    repair = None if name in {"qwen2_moe", "qwen3_moe"} else "refit:1"
    cut(opened(whole), tmp_path / "small.gguf", repair, (Span(2, 3),))
    tolerance = 4e-3
    if types is not None:
        # Weights of eight and fewer bits meet activations of eight bits, and the matrix units of
        # some processors (AMX) compute them otherwise: no cut is nearer than the uncut file is.
        tolerance = max(5e-2, 2 * apart(whole))
    assert apart(tmp_path / "small.gguf") < tolerance
