"""Families of GGUF files: types, names, importance. llama.cpp itself: `test_llama_cpp`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from gguf_models import family, with_a_merge, write
from ghostlayers.calibration.passes import Runner
from ghostlayers.calibration.squares import gather_squares
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.checkpoint.imatrix import named_for_llama_cpp, write_imatrix
from ghostlayers.checkpoint.quantise import (
    NEED_IMATRIX,
    SIMPLE,
    TYPES,
    family_paths,
    quantise,
    type_named,
)
from ghostlayers.errors import DependencyError, ModelError, OutputError, RecipeError
from ghostlayers.evaluation import llama_cpp
from ghostlayers.export import Family, export_family
from ghostlayers.model.dense import DenseModel
from ghostlayers.text.tokens import Windows
from test_cli import call, words

Lister = Callable[[Path], dict[str, str]]
CUT_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


@pytest.fixture(scope="module")
def folder(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it is exported."""
    place = tmp_path_factory.mktemp("quantise") / "model"
    return with_a_merge(write(family("llama"), byte_tokenizer, place))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """It as a file of 32 bits."""
    return export_gguf(folder, folder.with_name("plain.gguf"), pre_tokenizer="gpt-2")


def types_in(path: Path) -> dict[str, str]:
    return {each.name: each.tensor_type.name for each in gguf.GGUFReader(path).tensors}


def block_values(row: np.ndarray, kind: str) -> np.ndarray:
    """A row as the format's description says it is rounded, a block of 32 at a time."""
    out = []
    for block in row.reshape(-1, 32).astype(np.float64):
        low, high = block.min(), block.max()
        peak = block[np.abs(block).argmax()]
        if kind == "Q8_0":
            step, base = np.abs(peak) / 127, 0.0
            levels = (-127, 127)
        elif kind in {"Q4_0", "Q5_0"}:
            half = 8 if kind == "Q4_0" else 16
            step, base, levels = peak / -half, 0.0, (-half, half - 1)
        else:
            most = 15 if kind == "Q4_1" else 31
            step, base, levels = (high - low) / most, low, (0, most)
        places = (block - base) / step if step else np.zeros(32)
        stored = [float(np.float16(each)) for each in (step, base)]
        out.append(np.clip(np.round(places), *levels) * stored[0] + stored[1])
    return np.concatenate(out)


@pytest.mark.parametrize("kind", CUT_TYPES)
def test_a_simple_type_rounds_every_block_to_its_levels(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    made = quantise(plain, tmp_path / "made.gguf", kind)
    name = "blk.2.ffn_gate.weight"
    (there,) = [each for each in gguf.GGUFReader(plain).tensors if each.name == name]
    (here,) = [each for each in gguf.GGUFReader(made.path).tensors if each.name == name]
    assert here.tensor_type.name == kind
    want = np.stack([block_values(row, kind) for row in there.data])
    got = gguf.dequantize(here.data, here.tensor_type)
    levels = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 7, "Q5_0": 16, "Q5_1": 15}[kind]
    step = np.abs(there.data).max() / levels
    assert np.abs(got - want).max() <= 1.01 * step
    assert np.mean(np.abs(got - want) < 1e-6) > 0.99  # halves are rounded either way


def test_what_is_no_matrix_stays_and_the_head_gets_eight_bits(plain: Path, tmp_path: Path) -> None:
    made = quantise(plain, tmp_path / "made.gguf", "Q4_0")
    kinds = types_in(made.path)
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.4.ffn_down.weight"] == "F16"  # 48 channels are no multiple of 32
    assert made.tensors["Q4_0"] == sum(kind == "Q4_0" for kind in kinds.values())
    reader = gguf.GGUFReader(made.path)
    assert reader.fields["general.file_type"].contents() == TYPES["Q4_0"]


def test_a_tied_embedding_is_a_head(byte_tokenizer: Any, tmp_path: Path) -> None:
    model = family("llama", tie_word_embeddings=True)
    place = with_a_merge(write(model, byte_tokenizer, tmp_path / "tied"))
    (made,) = export_family(
        place, tmp_path / "made.gguf", Family(types=("Q4_1",)), pre_tokenizer="gpt-2"
    )
    assert types_in(made.path)["token_embd.weight"] == "Q8_0"


def test_sixteen_bits_of_a_file_are_those_of_an_export(
    folder: Path, plain: Path, tmp_path: Path
) -> None:
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")):
        made = quantise(plain, tmp_path / f"{kind}.gguf", kind)
        want = export_gguf(folder, tmp_path / "want.gguf", pre_tokenizer="gpt-2", dtype=dtype,
                           overwrite=True)  # fmt: skip
        tensors = [
            {
                each.name: (each.tensor_type, each.data.tobytes())
                for each in gguf.GGUFReader(p).tensors
            }
            for p in (made.path, want)
        ]
        assert tensors[0] == tensors[1]


def test_a_family_is_made_in_one_command(folder: Path, tmp_path: Path) -> None:
    result = call(
        "export", folder, "--gguf", tmp_path / "small-{type}.gguf", "--type", "q8_0,F16,Q8_0",
        "--pre-tokenizer", "gpt-2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["small-F16.gguf", "small-Q8_0.gguf"]
    for kind in ("Q8_0", "F16"):
        size = (tmp_path / f"small-{kind}.gguf").stat().st_size / 1e6
        assert f"small-{kind}.gguf, {size:,.1f} MB" in words(result.output).replace("- ", "-")
    again = call("export", folder, "--gguf", tmp_path / "small-{type}.gguf", "--type", "Q8_0")
    assert again.exit_code == 1
    assert "exists already" in words(again.output)


def test_a_file_of_16_bits_is_a_source_and_a_quantised_one_is_none(
    plain: Path, tmp_path: Path
) -> None:
    (made,) = export_family(plain, tmp_path / "{type}.gguf", Family(types=("Q8_0",)))
    assert made.path.name == "Q8_0.gguf"
    with pytest.raises(ModelError, match=r"quantised already .*Q8_0"):
        list(export_family(made.path, tmp_path / "again.gguf", Family(types=("Q4_0",))))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["Q8_0.gguf"]


@pytest.mark.parametrize(
    ("types", "name", "error", "message"),
    [
        (("Q8_0", "Q4_0"), "small.gguf", RecipeError, "names one file, but 2 types"),
        (("Q4_K_M", "Q8_0"), "{type}.gguf", DependencyError, "Q4_K_M needs .*llama-cpp-python"),
        (("IQ2_XS",), "{type}.gguf", RecipeError, "IQ2_XS cannot be made without an importance"),
        (("Q8_0",), "{type}.bin", OutputError, "should end in .gguf"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, types: tuple[str, ...], name: str, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        list(export_family(folder, tmp_path / name, Family(types=types), pre_tokenizer="gpt-2"))
    assert not list(tmp_path.iterdir())


def test_a_type_is_named_as_llama_quantize_names_it() -> None:
    assert type_named("q4_k") == "Q4_K_M"
    assert {*SIMPLE, *NEED_IMATRIX} <= {*TYPES}
    with pytest.raises(RecipeError, match=r"unknown GGUF type 'Q4KM'\. Did you mean 'Q4_K_M'\?"):
        type_named("Q4KM")
    with pytest.raises(RecipeError, match="none is asked for"):
        family_paths(Path("a-{type}.gguf"), ())
    with pytest.raises(RecipeError, match="none is asked for"):
        Family(imatrix_data="c4")


def test_numbers_beyond_float16_are_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    model = family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    place = with_a_merge(write(model, byte_tokenizer, tmp_path / "model"))
    file = export_gguf(place, tmp_path / "plain.gguf", pre_tokenizer="gpt-2")
    with pytest.raises(ModelError, match="holds 1e\\+05, and float16 ends"):
        quantise(file, tmp_path / "made.gguf", "F16")
    assert not (tmp_path / "made.gguf").exists()


def windows_of(count: int = 3, length: int = 24) -> Windows:
    ids = torch.arange(count * length).view(count, length) * 11 % 200 + 20
    return Windows(ids, False, None, ())


def by_hooks(model: Any, windows: Windows) -> dict[str, tuple[np.ndarray, int]]:
    """A literal hook on every `Linear`: squares of its inputs, summed in float64."""
    found: dict[str, tuple[np.ndarray, int]] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double().numpy()
            total, count = found.get(name, (np.zeros(rows.shape[1]), 0))
            found[name] = total + (rows**2).sum(axis=0), count + len(rows)

        return note

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        for window in windows.input_ids:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "qwen2_moe", "glm4"])
def test_squares_are_those_that_a_hook_on_every_projection_sees(name: str) -> None:
    model, windows = family(name), windows_of()
    squares = gather_squares(Runner(DenseModel(model)), windows)
    want = by_hooks(model, windows)
    assert len(want) >= 20
    for weight, (total, count) in want.items():
        assert float(squares.counts[weight]) == count == windows.input_ids.numel()
        np.testing.assert_allclose(squares.sums[weight][0].numpy(), total, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "granitemoeshared"])
def test_each_expert_has_the_squares_of_the_tokens_that_it_reads(name: str) -> None:
    """A transcription: each chosen expert of each token, one by one."""
    model, windows = family(name), windows_of(2)
    squares = gather_squares(Runner(DenseModel(model)), windows)
    layer = 1
    path, experts = next(
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and f"layers.{layer}." in path
    )
    calls: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for window in windows.input_ids:
            model(input_ids=window[None])
    handle.remove()
    rows, width = experts.gate_up_proj.shape[0], experts.down_proj.shape[-1]
    outer, inner = np.zeros((rows, model.config.hidden_size)), np.zeros((rows, width))
    counts = np.zeros(rows)
    for hidden, chosen, _ in calls:
        for token, choice in zip(hidden.reshape(-1, hidden.shape[-1]), chosen, strict=True):
            for expert in choice.tolist():
                gate, up = (experts.gate_up_proj[expert].detach() @ token).chunk(2)
                outer[expert] += token.double().numpy() ** 2
                inner[expert] += (experts.act_fn(gate) * up).detach().double().numpy() ** 2
                counts[expert] += 1
    for part, want in (("gate_up_proj", outer), ("down_proj", inner)):
        np.testing.assert_array_equal(squares.counts[f"{path}.{part}"].numpy(), counts)
        np.testing.assert_allclose(
            squares.sums[f"{path}.{part}"].numpy(), want, rtol=1e-3, atol=1e-9
        )


def test_an_importance_matrix_is_written_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    model, windows = family("mixtral"), windows_of()
    squares = gather_squares(Runner(DenseModel(model)), windows)
    rows = named_for_llama_cpp(model, squares.sums, squares.counts)
    path = write_imatrix(tmp_path / "imatrix.gguf", rows, text="/home/me/c4.jsonl", windows=windows)
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.type"] == "imatrix"
    assert said["imatrix.datasets"] == ["c4.jsonl"]
    assert (said["imatrix.chunk_count"], said["imatrix.chunk_size"]) == (3, 24)
    tensors = {each.name: each.data for each in reader.tensors}
    experts, tokens = model.config.num_local_experts, windows.input_ids.numel()
    for part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        assert tensors[f"blk.1.{part}.weight.in_sum2"].shape[0] == experts
        counts = tensors[f"blk.1.{part}.weight.counts"]
        assert counts.shape == (experts, 1)
        assert counts.sum() == tokens * model.config.num_experts_per_tok
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape == (1, model.config.hidden_size)
    assert tensors["blk.0.attn_q.weight.counts"].item() == tokens
    # Queries' rows are reordered for llama.cpp; what they are multiplied with is not.
    np.testing.assert_array_equal(
        tensors["blk.0.attn_q.weight.in_sum2"], tensors["blk.0.attn_v.weight.in_sum2"]
    )
    named = {name.rpartition(".")[0] for name in tensors}
    place = {each for each in named if "blk." not in each}
    assert not place


def test_the_sixteen_bit_file_and_its_matrix_tell_the_next_command(
    folder: Path, tmp_path: Path, some_text: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text))
    result = call(
        "export", folder, "--gguf", tmp_path / "s-{type}.gguf", "--type", "F16", "--imatrix-data",
        text, "--windows", "4", "--sequence-length", "32", "--pre-tokenizer", "gpt-2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = result.output.replace("\n", "").replace(" ", "")
    there = str(tmp_path).replace(" ", "")
    assert (
        f"llama-quantize--imatrix{there}/s-imatrix.gguf{there}/s-F16.gguf{there}/s-Q4_K_M.gguf"
        in said
    )
    refused = call(
        "export", folder, "--gguf", tmp_path / "t-{type}.gguf", "--type", "Q8_0,Q4_0",
        "--imatrix-data", text,
    )  # fmt: skip
    assert refused.exit_code == 1
    assert "making Q4_0 with an importance matrix needs llama.cpp" in words(refused.output)
    assert "llama-quantize --imatrix small-imatrix.gguf small-F16.gguf" in words(refused.output)


def test_a_comparison_of_types_needs_llama_cpp_before_anything_is_computed(
    folder: Path, tmp_path: Path
) -> None:
    result = call(
        "compare", folder, "-o", tmp_path / "out", "-n", "1", "-d", "absent.txt", "--eval-data",
        "absent.txt", "--types", "f16,q8_0",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "--types needs llama.cpp, which is not installed: pip install" in words(result.output)
    assert not (tmp_path / "out").exists()
    other = call("compare", folder, "-o", tmp_path / "out", "-n", "1", "-d", "absent.txt",
                 "--eval-data", "absent.txt", "--types", "q9")  # fmt: skip
    assert "unknown GGUF type 'q9'" in words(other.output)
