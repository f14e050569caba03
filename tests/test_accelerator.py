"""What an accelerator computes is what the processor computes. Skipped where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import ghostlayers
from conftest import make_documents
from ghostlayers.cli import app
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs import ALL
from ghostlayers.selection.choices import SELECTIONS
from ghostlayers.statistics.moments import Accumulator

pytestmark = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="needs an accelerator that torch can see"
)
THERE = str(torch.accelerator.current_accelerator() or "cpu")
SAVED = [each for each in ALL if not {"o", "phi"} & set(each.replace(":", "+").split("+"))]
SIZES: dict[str, Any] = {
    "windows": 48,
    "fit_windows": 48,
    "held_out_windows": 4,
    "sequence_length": 64,
}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    trained_llama: LlamaForCausalLM,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The trained Llama as a folder."""
    out = tmp_path_factory.mktemp("accelerated") / "dense"
    trained_llama.save_pretrained(out)
    byte_tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def text_file(folder: Path) -> Path:
    """Documents of the same grammar, a line each."""
    path = folder.parent / "text.jsonl"
    documents = make_documents(200, seed=9)
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return path


def options(device: str, **changes: Any) -> RunOptions:
    return RunOptions(**{"device": device, "dtype": "float32", **changes})


def pruned_on(device: str, folder: Path, **choices: Any) -> ghostlayers.PrunedModel:
    placed = choices.pop("options", options(device))
    documents = make_documents(120, seed=9)
    return ghostlayers.prune(str(folder), data=documents, options=placed, **{**SIZES, **choices})


def logits(model: Any) -> torch.Tensor:
    ids = (torch.arange(2 * 48).view(2, 48) * 7) % 256
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids.to(model.device)).logits
    return found.float().cpu()


@pytest.mark.parametrize("repair", SAVED)
def test_repairs_are_the_same(folder: Path, repair: str) -> None:
    here, there = (
        logits(pruned_on(device, folder, remove="3-4", repair=repair).model)
        for device in ("cpu", THERE)
    )
    assert there.isfinite().all()
    assert float((here - there).norm() / here.norm()) < 2e-3


def test_gaps_behind_repaired_gaps_are_the_same(folder: Path) -> None:
    here, there = (
        logits(pruned_on(device, folder, remove="2,4,6", repair="ghost").model)
        for device in ("cpu", THERE)
    )
    assert float((here - there).norm() / here.norm()) < 2e-3


@pytest.mark.parametrize("selection", [*SELECTIONS, "perplexity:one-shot", "recoverable:greedy"])
def test_selections_are_the_same(folder: Path, selection: str) -> None:
    count = 1 if selection == "lorp" else 2
    here, there = (
        pruned_on(device, folder, layers=count, select=selection).removed
        for device in ("cpu", THERE)
    )
    assert here == there


def test_iterative_selection_runs(folder: Path) -> None:
    here, there = (
        pruned_on(device, folder, layers=2, select="shortgpt", iterative=True).removed
        for device in ("cpu", THERE)
    )
    assert here == there


@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
@pytest.mark.parametrize("repair", ["ghost", "refit:2"])
def test_layers_elsewhere_give_the_same_bits(folder: Path, elsewhere: str, repair: str) -> None:
    found = []
    for offload in ("none", elsewhere):
        pruned = pruned_on(
            THERE, folder, layers=2, repair=repair, options=options(THERE, offload=offload)
        )
        found.append((pruned.removed, {k: vars(v) for k, v in pruned.evidence.items()}))
    assert found[0] == found[1]


@pytest.mark.parametrize("export", ["custom", "stock-layer", "fold"])
def test_a_saved_model_reloads_on_it(folder: Path, tmp_path: Path, export: str) -> None:
    repair = {"custom": "ghost", "stock-layer": "normed", "fold": "refit:2"}[export]
    pruned = pruned_on(THERE, folder, remove="3-4", repair=repair, export=export)
    pruned.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map=THERE
    ).eval()
    assert torch.allclose(logits(loaded), logits(pruned.model), atol=2e-3)
    ids = torch.arange(20)[None].to(loaded.device)
    same = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = loaded.generate(ids, **same)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **same))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(folder: Path, dtype: str) -> None:
    pruned = pruned_on(
        THERE, folder, layers=2, repair="joint:x+z", options=options(THERE, dtype=dtype)
    )
    assert pruned.evidence["repaired"].loss < pruned.evidence["cut"].loss


def test_sums_are_the_same() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3000, 64), torch.randn(3000, 64)
    found = []
    for device in ("cpu", THERE):
        sums = Accumulator((("x", 64),), 64, torch.device(device))
        sums.add(x.to(device), y.to(device), [x.to(device)])
        found.append(sums.moments())
    for name in ("gram", "cross"):
        here, there = (getattr(each, name).cpu() for each in found)
        assert float((here - there).norm() / here.norm()) < 1e-13


def test_scores_are_the_same(folder: Path) -> None:
    tables = [
        ghostlayers.score(
            str(folder), data=make_documents(120, seed=9), layers=2, select="recoverable",
            options=options(device), **SIZES,
        )
        for device in ("cpu", THERE)
    ]  # fmt: skip
    for here, there in zip(tables[0].spans, tables[1].spans, strict=True):
        assert here.cosine == pytest.approx(there.cosine, abs=1e-4)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--device", THERE], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_run_on_it(folder: Path, text_file: Path, tmp_path: Path) -> None:
    sizes = ("--windows", "24", "--fit-windows", "24", "--held-out-windows", "4")
    length = ("--sequence-length", "64")
    data = ("--data", str(text_file))
    run("score", str(folder), "--layers", "2", *data, *sizes[:2], *length)
    out = str(tmp_path / "out")
    run("prune", str(folder), "--layers", "2", *data, *sizes, *length, "-o", out)
    run("eval", out, "--data", str(text_file), "--max-windows", "4", *length)
    run("bench", out, "--against", str(folder), "--batch", "1,2", "--length", "16",
        "--new-tokens", "4", "--repeats", "2", "--json", str(tmp_path / "bench.json"))  # fmt: skip
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert "cpu" not in json.dumps(measured.get("device", ""))
    compared = str(tmp_path / "compared")
    repairs = "none,ghost,refit:2,joint:x+z,joint:x+o+phi,piecewise:4"
    run("compare", str(folder), "--layers", "1,2", "--select", "streamline,recoverable",
        "--repair", repairs, *data, "--eval-data", str(text_file),
        "--max-windows", "4", *sizes, *length, "-o", compared)  # fmt: skip
    cells = json.loads((Path(compared) / "results.json").read_text())["cells"]
    assert len(cells) > 10
    assert (Path(compared) / "report.html").is_file()
