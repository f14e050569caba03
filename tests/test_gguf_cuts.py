"""Cuts that no GGUF file could hold are refused before anything is computed for them."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from typer.testing import CliRunner

import ghostlayers
from gguf_models import family, with_a_merge, write
from ghostlayers.checkpoint.gguf_cuts import GgufCuts
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.checkpoint.output import Output
from ghostlayers.cli import app
from ghostlayers.errors import OutputError, RecipeError, UnsupportedModelError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.spans import Span
from test_gguf_copy import contents, made, rewritten

HOW = RunOptions(dtype="float32", device="cpu")
TEXT = {"windows": 2, "fit_windows": 2, "held_out_windows": 1, "sequence_length": 32}
PERIOD = 3


@pytest.fixture(scope="module")
def ruled(byte_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A file of 9 layers, whose header says that every third one is of another kind."""
    folder = tmp_path_factory.mktemp("ruled")
    base = made("llama", byte_tokenizer, folder, num_hidden_layers=9)
    rule = {"llama.full_attention_interval": (PERIOD, GGUFValueType.UINT32, None)}
    return rewritten(base, folder / "ruled.gguf", changed=rule)


@pytest.fixture(scope="module")
def dense(ruled: Path) -> DenseModel:
    return load_model(str(ruled), HOW, exact=True)


@pytest.fixture(scope="module")
def smollm3(byte_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A folder of 9 layers of which llama.cpp rotates all but every fourth."""
    folder = tmp_path_factory.mktemp("smollm3") / "model"
    rotated = [int((layer + 1) % 4 != 0) for layer in range(9)]
    model = family("smollm3", num_hidden_layers=9, no_rope_layers=rotated)
    return with_a_merge(write(model, byte_tokenizer, folder))


def keeps(span: Span, depth: int, period: int) -> bool:
    """The oracle, layer by layer."""
    left = [layer for layer in range(depth) if layer not in span.layers]
    return all((old + 1) % period == 0 for old in left if (left.index(old) + 1) % period == 0) and (
        sum((old + 1) % period == 0 for old in left) == len(left) // period
    )


@pytest.mark.parametrize("length", range(1, 8))
def test_a_run_is_refused_where_the_rule_breaks(length: int, dense: DenseModel) -> None:
    cuts = GgufCuts(dense, copied=True)
    refused = []
    for start in range(9 - length + 1):
        span = Span(start, start + length)
        try:
            cuts.check((span,))
        except UnsupportedModelError:
            refused.append(span)
        assert (span not in refused) is keeps(span, 9, PERIOD)
    assert bool(refused) is (length % PERIOD != 0)


def test_it_is_said_what_could_go(dense: DenseModel) -> None:
    cuts = GgufCuts(dense, copied=True)
    with pytest.raises(UnsupportedModelError) as refused:
        cuts.check_choice(Recipe(layers=2))
    message = str(refused.value)
    assert "computes one of 3 layers of this model otherwise (full_attention_interval)" in message
    assert "Of runs of 2, 7-8 can go (name it with --remove)" in message
    assert "runs of 3, 6 layers can go wherever they lie (--layers)." in message
    cuts.check((Span(7, 9),))
    cuts.check_choice(Recipe(layers=3))
    cuts.check_choice(Recipe(layers=6, keep_layers="first:1,last:1"))
    with pytest.raises(UnsupportedModelError, match="'shortgpt' chooses layers one by one"):
        cuts.check_choice(Recipe(layers=3, select="shortgpt"))
    with pytest.raises(UnsupportedModelError, match="'recoverable' chooses layers one by one"):
        cuts.check_choice(Recipe(layers=3, iterative=True))


@pytest.mark.parametrize("asked", [{"layers": 2}, {"remove": "2-3"}])
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_the_command_line_refuses_before_the_text_is_read(
    asked: dict[str, Any], plan: list[str], ruled: Path, tmp_path: Path
) -> None:
    (option, value), out = next(iter(asked.items())), tmp_path / "small.gguf"
    arguments = ["prune", ruled, f"--{option}", value, "--data", tmp_path / "none.txt", "-o", out]
    arguments += ["--sequence-length", 32, *plan]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 1
    assert "one of 3 layers of this model otherwise" in " ".join(result.output.split())
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
def test_a_checkpoint_that_becomes_a_file_is_held_to_the_same(
    alone: bool, smollm3: Path, some_text: list[str], tmp_path: Path
) -> None:
    out = tmp_path / ("small.gguf" if alone else "small")
    beside = None if alone else tmp_path / "beside.gguf"
    output = Output(gguf=beside, folder=out, pre_tokenizer="gpt-2")
    for choice in ({"layers": 3}, {"remove": "2-4"}):
        with pytest.raises(UnsupportedModelError, match="positions out of every fourth layer"):
            ghostlayers.prune(
                str(smollm3), data=str(tmp_path / "none.txt"), output=output, **TEXT, **choice
            )
    ghostlayers.prune(
        str(smollm3), data=some_text, layers=4, repair="none", output=output, options=HOW, **TEXT
    )


def test_layers_are_looked_at_again_once_they_are_chosen(
    smollm3: Path, some_text: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing could be told before the choice, at least nothing is fitted after it."""
    monkeypatch.setattr(Output, "check_base", lambda *_: None)
    monkeypatch.setattr("ghostlayers.study.fit_many", None)
    with pytest.raises(UnsupportedModelError, match=r"every fourth layer.*Chosen were layers \d"):
        ghostlayers.prune(
            str(smollm3), data=some_text, layers=3, repair="refit:1", options=HOW, **TEXT,
            output=Output(folder=tmp_path / "small.gguf"),
        )  # fmt: skip


# ---- a file of what was no file


@pytest.fixture(scope="module")
def llama(byte_tokenizer: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return with_a_merge(write(family("llama"), byte_tokenizer, folder))


def test_python_makes_the_file_that_export_makes(
    llama: Path, some_text: list[str], tmp_path: Path
) -> None:
    pruned = ghostlayers.prune(
        str(llama), data=some_text, remove="2-3", repair="refit:1", options=HOW, **TEXT
    )
    saved = pruned.save_gguf(tmp_path / "small.gguf", pre_tokenizer="gpt-2")
    assert saved.verification.identical
    assert saved.paths == (tmp_path / "small.gguf",)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]
    pruned.save(tmp_path / "folder")
    other = export_gguf(tmp_path / "folder", tmp_path / "other.gguf", pre_tokenizer="gpt-2")
    assert contents(saved.paths[0]) == contents(other)
    with pytest.raises(OutputError, match="exists already"):
        pruned.save_gguf(tmp_path / "small.gguf", pre_tokenizer="gpt-2")
    with pytest.raises(RecipeError, match="copied from a GGUF file"):
        pruned.save_gguf(tmp_path / "parts.gguf", pre_tokenizer="gpt-2", split="1M")
    with pytest.raises(UnsupportedModelError, match="name it with --pre-tokenizer"):
        pruned.save(tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_what_is_no_file_is_refused_before_a_folder_is_written(
    llama: Path, some_text: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ghostlayers.checkpoint.saving.whole_folder", None)
    pruned = ghostlayers.prune(
        str(llama), data=some_text, remove="2-3", repair="ghost", options=HOW, **TEXT
    )
    with pytest.raises(UnsupportedModelError, match="no place for an operator"):
        pruned.save(tmp_path / "small.gguf")
    (tmp_path / "text").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        pruned.save(tmp_path / "text" / "small.gguf")
    with pytest.raises(UnsupportedModelError, match="no place for an operator"):
        pruned.save(tmp_path / "none" / "small.gguf")
    (tmp_path / "text").unlink()
    assert list(tmp_path.iterdir()) == []
