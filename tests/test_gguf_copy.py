"""GGUF to GGUF: what a cut leaves alone is copied, and the rest is what the model in memory has."""

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from typer.testing import CliRunner

import ghostlayers
from gguf_models import IDS, VARIANTS, a_header, family, with_a_merge, write
from ghostlayers.checkpoint.gguf_copy import split_size
from ghostlayers.checkpoint.gguf_encoding import conversion, encode, fallback_named
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.checkpoint.gguf_saving import How, save_gguf
from ghostlayers.checkpoint.records import GGUF_RECORD as RECORD
from ghostlayers.cli import app
from ghostlayers.errors import GhostlayersError, ModelError, OutputError, RecipeError
from ghostlayers.evaluation import evaluate_windows
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_file import open_gguf
from ghostlayers.model.gguf_header import header_after
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.places import part_name
from ghostlayers.spans import Span, kept_layers
from ghostlayers.surgery import removal
from oracles import fitted, logits
from test_gguf import READABLE

HOW = RunOptions(dtype="float32", device="cpu")
RECORDED: dict[str, Any] = {"evidence": []}


def rewritten(
    source: Path,
    out: Path,
    types: dict[str, Type] | None = None,
    changed: dict[str, tuple[Any, GGUFValueType, Any]] | None = None,
    *,
    without: tuple[str, ...] = (),
    split: int = 0,
) -> Path:
    """A file with other types of tensors or entries, by the library alone."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture, split_max_tensors=split)
    entries = {
        name: (field.contents(), field.types[0], field.types[-1])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    for name, (value, kind, inner) in {**entries, **(changed or {})}.items():
        inner = inner if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name in without:
            continue
        kind = tensor.tensor_type
        if len(tensor.shape) > 1:
            kind = next((t for part, t in (types or {}).items() if part in tensor.name), kind)
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def made(
    name: str, tokenizer: Any, folder: Path, types: dict[str, Type] | None = None, **changes: Any
) -> Path:
    """The file of a tiny model, quantised."""
    if name == "qwen3":
        changes = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1} | changes
    if types is not None:
        changes = {"intermediate_size": 64} | changes  # rows of whole blocks
    write(family(name, **changes), tokenizer, folder / "model")
    file = export_gguf(
        with_a_merge(folder / "model"), folder / "plain.gguf", pre_tokenizer="gpt-2",
        dtype="float32",
    )  # fmt: skip
    return rewritten(file, folder / "base.gguf", types)


def opened(file: Path) -> DenseModel:
    return load_model(str(file), HOW, exact=True)


def cut(
    dense: DenseModel,
    out: Path,
    repair: str | None,
    spans: tuple[Span, ...],
    how: How | None = None,
    **more: Any,
) -> tuple[Any, Any]:
    """The cut model, and what was saved of it."""
    repairs = None if repair is None else fitted(dense.network, repair, spans)
    pruned = removal.prune_layers(dense, spans, repairs)
    kept = kept_layers(spans, dense.num_layers)
    return pruned, save_gguf(dense, pruned, kept, RECORDED, out, how or How(), **more)


def entries(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}


def contents(file: Path) -> dict[str, tuple[str, bytes]]:
    tensors = gguf.GGUFReader(file).tensors
    return {each.name: (each.tensor_type.name, each.data.tobytes()) for each in tensors}


MIXED = {
    "attn_k.": Type.Q8_0,
    "ffn_up.": Type.Q4_0,
    "ffn_down.": Type.Q5_1,
    "token_embd": Type.BF16,
}
"""Several types in one layer, as the K_M mixes have them."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in sorted(READABLE)),
        *(
            pytest.param(*each, id=label)
            for label, each in VARIANTS.items()
            if each[0] in READABLE
            and label not in {"biased", "normed heads, parallel", "as deep as the largest"}
        ),
    ],
)
def test_the_file_is_the_one_that_the_folder_makes(
    name: str, changes: dict[str, Any], byte_tokenizer: Any, tmp_path: Path
) -> None:
    """In float32 the two ways, which share no code, end with the same entries and numbers."""
    base = made(name, byte_tokenizer, tmp_path, **changes)
    dense = opened(base)
    repair = None if name in {"qwen2_moe", "qwen3_moe"} else "refit:1"
    pruned, saved = cut(dense, tmp_path / "small.gguf", repair, (Span(2, 4),))
    assert saved.verification.identical
    write(pruned, byte_tokenizer, tmp_path / "cut")
    other = export_gguf(
        with_a_merge(tmp_path / "cut"), tmp_path / "other.gguf", pre_tokenizer="gpt-2",
        dtype="float32",
    )  # fmt: skip
    ours, theirs = entries(tmp_path / "small.gguf"), entries(other)
    said = {"general.name", "general.description", RECORD}
    assert {k: v for k, v in ours.items() if k not in said} == {
        k: v for k, v in theirs.items() if k not in said
    }
    ours, theirs = contents(tmp_path / "small.gguf"), contents(other)
    assert ours.keys() == theirs.keys()
    for key, (kind, data) in ours.items():
        assert kind == theirs[key][0] == "F32"
        got, want = (np.frombuffer(each, np.float32) for each in (data, theirs[key][1]))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("repair", [None, "refit:2", "magnitude", "replaceme"])
def test_untouched_tensors_are_copied(
    repair: str | None, byte_tokenizer: Any, tmp_path: Path
) -> None:
    base = made("llama", byte_tokenizer, tmp_path, MIXED)
    dense = opened(base)
    pruned, saved = cut(dense, tmp_path / "small.gguf", repair, (Span(1, 2), Span(3, 4)))
    before, after = contents(base), contents(tmp_path / "small.gguf")
    for name, content in after.items():
        old = name
        for new, number in enumerate([0, 2, 4]):
            if name.startswith(f"blk.{new}."):
                old = name.replace(f"blk.{new}.", f"blk.{number}.", 1)
        assert (content == before[old]) is (name not in saved.types)
        assert content[0] == before[old][0]  # all of these can be encoded
    assert bool(saved.types) is (repair is not None)
    want, got = entries(base), entries(tmp_path / "small.gguf")
    differ = {key for key in got if got[key] != want.get(key)}
    assert differ == {"llama.block_count", RECORD}
    again = opened(tmp_path / "small.gguf").network
    assert torch.equal(logits(again, IDS), logits(opened(tmp_path / "small.gguf").network, IDS))
    if repair is None:
        assert torch.equal(logits(again, IDS), logits(pruned, IDS))


def test_a_changed_tensor_is_what_the_library_encodes(byte_tokenizer: Any, tmp_path: Path) -> None:
    """The oracle: the folded weight, quantised by the library by hand."""
    base = made("llama", byte_tokenizer, tmp_path, MIXED)
    dense = opened(base)
    pruned, saved = cut(dense, tmp_path / "small.gguf", "refit:1", (Span(2, 4),))
    weight = pruned.model.layers[1].mlp.down_proj.weight.detach().numpy()
    data = contents(tmp_path / "small.gguf")["blk.1.ffn_down.weight"]
    assert data == ("Q5_1", gguf.quantize(weight, Type.Q5_1).tobytes())
    assert saved.types == {"blk.1.ffn_down.weight": ("Q5_1", "Q5_1")}
    read = opened(tmp_path / "small.gguf").network.model.layers[1].mlp.down_proj.weight
    assert not torch.equal(read, pruned.model.layers[1].mlp.down_proj.weight)


def test_types_without_an_encoder_take_another(byte_tokenizer: Any, tmp_path: Path) -> None:
    weight = torch.randn(8, 256)
    plain = conversion("w", weight, reader_tensor(weight, tmp_path), set())
    for before in (Type.Q4_K, Type.Q6_K, Type.IQ4_XS, Type.TQ1_0):
        assert encode(weight, plain, before, Type.Q8_0).type == Type.Q8_0
        assert encode(weight, plain, before, Type.Q5_0).type == Type.Q5_0
    short = torch.randn(8, 24)  # no blocks of 32
    assert encode(short, plain, Type.Q4_K, Type.Q8_0).type == Type.F16
    large = torch.full((8, 24), 1e6)
    assert encode(large, plain, Type.F16, Type.Q8_0).type == Type.F32
    with pytest.raises(GhostlayersError, match="not finite"):
        encode(large * torch.inf, plain, Type.F16, Type.Q8_0)
    with pytest.raises(RecipeError, match="--gguf-fallback: expected one of Q8_0"):
        fallback_named("Q4_K_M")


def reader_tensor(weight: torch.Tensor, folder: Path) -> Any:
    path = folder / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path).tensors[0]


@pytest.mark.parametrize("seed", range(4))
def test_large_gains_are_told_from_those_with_one_added(seed: int, tmp_path: Path) -> None:
    """Gemma's norms reach hundreds, beside which a one is less than the file's own rounding."""
    torch.manual_seed(seed)
    weight = (torch.randn(64) * 100).to(torch.bfloat16).float()
    for stored in (weight, weight + 1):
        how = conversion("w", weight, reader_tensor(stored, tmp_path), set())
        torch.testing.assert_close(how.to_file(weight), stored)


@pytest.mark.parametrize("seed", range(4))
def test_how_a_weight_lies_is_found(seed: int, tmp_path: Path) -> None:
    """Every way there and back, and none that only looks alike."""
    torch.manual_seed(seed)
    weight = torch.randn(24, 12)
    paired = weight.reshape(3, 2, 4, 12).transpose(1, 2).reshape(24, 12)
    for stored in (weight, weight + 1, weight.T.contiguous(), paired):
        how = conversion("w", weight, reader_tensor(stored, tmp_path), {3, 2})
        torch.testing.assert_close(how.to_file(weight), stored)
        torch.testing.assert_close(how.from_file(how.to_file(weight)), weight)
        twice = how.scaled(2.0)
        torch.testing.assert_close(twice.to_file(weight), 2 * stored)
        torch.testing.assert_close(twice.from_file(twice.to_file(weight)), weight)
    with pytest.raises(GhostlayersError, match="in a way that is not written here"):
        conversion("w", weight, reader_tensor(torch.randn(24, 12), tmp_path), {3})


@pytest.mark.slow
def test_queries_are_rescaled_where_the_depth_decides(byte_tokenizer: Any, tmp_path: Path) -> None:
    """llama.cpp scales attention by another number in the family's deepest model."""
    kinds = ["sliding_attention", "full_attention"] * 31
    base = made(
        "gemma3_text",
        byte_tokenizer,
        tmp_path,
        num_hidden_layers=62,
        head_dim=16,
        layer_types=kinds,
    )
    dense = opened(base)
    pruned, saved = cut(dense, tmp_path / "small.gguf", None, (Span(5, 7),))
    assert len(saved.types) == 60
    assert all(name.endswith("attn_q_norm.weight") for name in saved.types)
    again = opened(tmp_path / "small.gguf").network
    torch.testing.assert_close(logits(again, IDS), logits(pruned, IDS), rtol=1e-4, atol=1e-4)


class Config:
    model_type = "lfm2"


@pytest.mark.parametrize("seed", range(8))
def test_arrays_a_layer_follow_the_layers(seed: int, tmp_path: Path) -> None:
    """llama.cpp's own --prune-layers leaves them as long as they were (its issue 27976)."""
    draw = random.Random(seed)
    depth = draw.randint(5, 12)
    kept = sorted(draw.sample(range(depth), draw.randint(1, depth - 1)))
    heads = [draw.choice([0, 8]) for _ in range(depth)]
    widths = [draw.randint(1, 99) for _ in range(depth)]
    longer = list(range(depth + 1))
    file = open_gguf(
        a_header(
            "lfm2", depth, tmp_path, attention__head_count_kv=heads, feed_forward_length=widths,
            leading_dense_block_count=2, features=longer, attention__shared_kv_layers=3,
        )
    )  # fmt: skip
    new = {k.removeprefix("lfm2."): v for k, v in header_after(file, Config, Config, kept).items()}
    assert {key: value[0] for key, value in new.items() if value} == {
        "block_count": len(kept),
        "attention.head_count_kv": [heads[i] for i in kept],
        "feed_forward_length": [widths[i] for i in kept],
        "leading_dense_block_count": len([i for i in kept if i < 2]),
        "attention.shared_kv_layers": len([i for i in kept if i >= depth - 3]),
    }


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("gpt-oss", {}),
        ("lfm2", {"full_attention_interval": 2}),
        ("lfm2", {"moe_every_n_layers": 2}),
        ("lfm2", {"attention__sliding_window_pattern": 2}),
    ],
)
def test_rules_of_every_nth_layer_are_kept_or_refused(
    architecture: str, said: dict[str, Any], tmp_path: Path
) -> None:
    file = open_gguf(a_header(architecture, 8, tmp_path, **said))
    for kept in ([0, 1, 4, 5, 6, 7], [0, 3, 4, 7], [2, 3]):
        assert header_after(file, Config, Config, kept)
    for kept in ([0, 1, 2, 4, 5, 6, 7], [1, 2, 3]):
        with pytest.raises(GhostlayersError, match="one of 2 layers of this model otherwise"):
            header_after(file, Config, Config, kept)


@pytest.mark.parametrize(
    ("said", "match"),
    [({"nextn_predict_layers": 1}, "predict further tokens")],
)
def test_layers_of_another_kind_are_refused(
    said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    file = open_gguf(a_header("lfm2", 4, tmp_path, **said))
    with pytest.raises(GhostlayersError, match=match):
        header_after(file, Config, Config, [0, 1])


@pytest.mark.slow
def test_several_files_are_read_and_written_as_one(byte_tokenizer: Any, tmp_path: Path) -> None:
    base = made("llama", byte_tokenizer, tmp_path, MIXED)
    rewritten(base, tmp_path / "many.gguf", split=20)
    parts = sorted(tmp_path.glob("many-*.gguf"))
    assert len(parts) == 3
    whole = opened(base)
    for part in parts:  # any of them stands for all
        dense = opened(part)
        assert torch.equal(logits(dense.network, IDS), logits(whole.network, IDS))
    _, one = cut(dense, tmp_path / "one.gguf", "refit:1", (Span(2, 4),))
    # Files are started anew at a size, here small enough for several.
    _, several = cut(dense, tmp_path / "several.gguf", "refit:1", (Span(2, 4),), How(split="1M"))
    assert several.paths == (tmp_path / "several.gguf",)  # all of it is smaller
    assert contents(several.paths[0]) == contents(one.paths[0])
    with pytest.raises(OutputError, match="would be named as those of the input"):
        cut(dense, tmp_path / "many.gguf", None, (Span(2, 4),), How(split="1M"))
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"one of 3 files.*00002-of-00003.gguf is not beside it"):
        opened(parts[0])


@pytest.mark.slow
def test_large_files_are_split(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = made("llama", byte_tokenizer, tmp_path, MIXED)
    dense = opened(base)
    monkeypatch.setattr("ghostlayers.checkpoint.gguf_saving.split_size", lambda _: 20_000)
    _, saved = cut(dense, tmp_path / "s.gguf", "refit:1", (Span(2, 4),), How(split="1M"))
    count = len(saved.paths)
    assert count > 2
    assert [path.name for path in saved.paths] == [
        part_name("s", 1 + i, count) for i in range(count)
    ]
    _, one = cut(dense, tmp_path / "one.gguf", "refit:1", (Span(2, 4),))
    assert {k: v for path in saved.paths for k, v in contents(path).items()} == contents(
        one.paths[0]
    )
    assert torch.equal(
        logits(opened(saved.paths[0]).network, IDS), logits(opened(one.paths[0]).network, IDS)
    )
    assert sorted(tmp_path.glob(".*")) == []
    with pytest.raises(OutputError, match="exists already"):
        cut(dense, tmp_path / "s.gguf", None, (Span(2, 4),), How(split="1M"))


@pytest.mark.parametrize("text", ["4", "4T", "-4G", "0G", "G", "4.5G", "4GB", ""])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="such as 4G or 500M"):
        split_size(text)


def test_sizes_are_read() -> None:
    assert split_size("4G") == 4 * 10**9
    assert split_size(" 500m") == 500 * 10**6


def test_nothing_is_replaced_unasked(byte_tokenizer: Any, tmp_path: Path) -> None:
    base = made("llama", byte_tokenizer, tmp_path)
    dense, out = opened(base), tmp_path / "small.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        cut(dense, out, None, (Span(2, 4),))
    assert out.read_text() == "mine"
    cut(dense, out, None, (Span(2, 4),), overwrite=True)
    assert opened(out).num_layers == 3


def test_a_header_of_another_depth_never_gets_its_name(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof sees a wrong entry: here, a base of positions that is another layer's."""
    base = made("gemma3_text", byte_tokenizer, tmp_path)
    dense, real = opened(base), header_after

    def wrong(*given: Any) -> Any:
        key = "gemma3.attention.sliding_window_pattern"
        entries = real(*given)
        values, *types = entries[key]
        return entries | {key: ([not value for value in values], *types)}

    monkeypatch.setattr("ghostlayers.checkpoint.gguf_copy.header_after", wrong)
    with pytest.raises(GhostlayersError, match="differ by"):
        cut(dense, tmp_path / "small.gguf", None, (Span(2, 3),))
    assert not (tmp_path / "small.gguf").exists()
    assert sorted(tmp_path.glob(".*")) == []


def test_damage_is_named(byte_tokenizer: Any, tmp_path: Path) -> None:
    base = made("llama", byte_tokenizer, tmp_path, MIXED)
    short = tmp_path / "short.gguf"
    short.write_bytes(base.read_bytes()[:-20_000])
    with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
        opened(short)
    lacking = rewritten(base, tmp_path / "lacks.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelError):
        opened(lacking)
    with pytest.raises(ModelError, match=r"family 'mpt'.*expected one of bloom"):
        opened(a_header("mpt", 4, tmp_path))


@pytest.fixture(scope="module")
def told(byte_tokenizer: Any, some_text: list[str], tmp_path_factory: Any) -> dict[str, Any]:
    """`prune base.gguf -o small.gguf`, through the command line."""
    folder = tmp_path_factory.mktemp("told")
    base = made("llama", byte_tokenizer, folder, MIXED)
    (folder / "text.txt").write_text("\n\n".join(some_text))
    arguments = [
        "prune", str(base), "-o", str(folder / "small.gguf"), "--layers", "1", "--data",
        str(folder / "text.txt"), "--windows", "12", "--sequence-length", "48",
        "--dtype", "float32",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return {"folder": folder, "base": base, "arguments": arguments, "screen": result.output}


def test_one_command_makes_one_file(told: dict[str, Any]) -> None:
    small, screen = told["folder"] / "small.gguf", told["screen"]
    assert sorted(path.name for path in told["folder"].iterdir()) == [
        "base.gguf", "model", "plain.gguf", "small.gguf", "text.txt",
    ]  # fmt: skip
    assert "de-quantised; every loss below is of them." in screen
    assert "Encoded anew, as the repair changed them:" in screen
    assert "logits equal bit for bit" in screen
    record = ghostlayers.inspect(small)
    assert record["recipe"]["repair"] == "refit:3:ridge=auto"  # ghost has no place there
    assert len(record["cut"]["kept"]) == 4


def test_the_loss_is_that_of_the_file(told: dict[str, Any], byte_tokenizer: Any) -> None:
    """What the record says after encoding is what the file, opened anew, has."""
    small = told["folder"] / "small.gguf"
    record = ghostlayers.inspect(small)
    said = next(row for row in record["evidence"] if row["model"] == "encoded")
    pruned = ghostlayers.prune(
        str(told["base"]), layers=1, data=str(told["folder"] / "text.txt"), windows=12,
        sequence_length=48, repair="refit:3:ridge=auto", options=HOW,
    )  # fmt: skip
    assert pruned.held_out is not None
    again = evaluate_windows(opened(small).network, pruned.held_out, corpus="held out")
    assert said["loss_nats"] == pytest.approx(again.sums.loss_nats, rel=1e-6)
    repaired = next(row for row in record["evidence"] if row["model"] == "repaired")
    assert said["loss_nats"] != repaired["loss_nats"]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--repair", "ghost"], "adds an operator, which a GGUF file has no place for"),
        (["--save", "adapter"], "made from a checkpoint"),
        (["--gguf", "other.gguf"], "names a GGUF file already"),
        (["--gguf-fallback", "Q4_K"], "--gguf-fallback: expected one of"),
        (["--gguf-split", "4"], "--gguf-split: expected a size"),
        (["--repair", "normed", "--export", "stock-layer"], "needs a folder as the output"),
        ([], "exists already"),
    ],
)
def test_what_cannot_be_a_file_is_refused_before_the_model_is_opened(
    more: list[str], match: str, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostlayers.cli.prune.open_model", None)
    arguments = [*told["arguments"], *more]
    if more:
        arguments[3] = str(told["folder"] / "new.gguf")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert match in " ".join(result.output.split())
    assert not (told["folder"] / "new.gguf").exists()


@pytest.mark.slow
def test_a_folder_as_base_makes_a_file_alone(told: dict[str, Any]) -> None:
    arguments = list(told["arguments"])
    arguments[1] = str(told["folder"] / "model")
    arguments[3] = str(told["folder"] / "of-folder.gguf")
    arguments += ["--pre-tokenizer", "gpt-2"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    file = Path(arguments[3])
    assert opened(file).num_layers == 4
    file.unlink()
    assert sorted(told["folder"].glob(".*")) == []
    assert not (told["folder"] / "of-folder").exists()


def test_a_record_that_is_no_json_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    broken = rewritten(
        told["folder"] / "small.gguf", tmp_path / "x.gguf",
        changed={RECORD: ("{", GGUFValueType.STRING, None)},
    )  # fmt: skip
    with pytest.raises(ModelError):
        ghostlayers.inspect(broken)
    with pytest.raises(ModelError, match="holds no record"):
        ghostlayers.inspect(told["base"])
