"""What a run is said to take: counts against what a run really does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ghostlayers
from conftest import make_tiny_llama
from families import build
from ghostlayers import pipeline
from ghostlayers.calibration.fits import sums_bytes
from ghostlayers.calibration.gradients import BACKWARD
from ghostlayers.calibration.passes import Pass
from ghostlayers.checkpoint.output import Output
from ghostlayers.cli.app import app
from ghostlayers.model import stream
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan import probe
from ghostlayers.plan.expected import Expected, expected_spans, plan_prune
from ghostlayers.plan.probe import Speed, layer_flops
from ghostlayers.plan.units import Plan, Predicted, Prices
from ghostlayers.recipe import Recipe
from ghostlayers.spans import Span

LAYER_ONLY = Speed(layer=1.0, head=0.0, product=0.0, solution=0.0)
GIVEN: dict[str, Any] = {
    "windows": 16,
    "fit_windows": 16,
    "held_out_windows": 4,
    "sequence_length": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {"layers": 3, "select": "recoverable"},
        {"layers": 3, "select": "streamline", "repair": "piecewise:2"},
        {"layers": 2, "select": "shortgpt", "repair": "joint:x+z"},
        {"layers": 2, "select": "perplexity"},
        {"layers": 2, "select": "perplexity:one-shot", "repair": "refit:2"},
        {"layers": 3, "select": "recoverable:greedy"},
        {"layers": 2, "select": "taylor:unprotected"},
        {"layers": 2, "select": "shortgpt", "iterative": True},
        {"layers": 2, "select": "magnitude:unprotected", "repair": "none"},
        {"remove": "2-4"},
    ],
    ids=lambda each: "-".join(map(str, each.values())),
)
def test_layers_that_run_are_counted(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    choices: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows times layers, the unit that decides the time of large models."""
    _check_layers(trained_llama, byte_tokenizer, some_text, choices, monkeypatch)


def test_layers_that_run_through_a_norm_are_counted(
    byte_tokenizer: Any, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    gemma = build("gemma3_text", vocab_size=256, num_hidden_layers=8, layer_types=kinds)
    choices = {"remove": "3-4,6", "repair": "refit:2"}
    _check_layers(gemma, byte_tokenizer, some_text, choices, monkeypatch)


def _check_layers(
    model: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    choices: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = 0.0
    real = DenseModel.run_layer

    def counted(self: Any, index: int, batch: Any, hidden: Any, *more: Any, **named: Any) -> Any:
        nonlocal ran
        ran += hidden.shape[0] * (BACKWARD if named.get("differentiable") else 1)
        return real(self, index, batch, hidden, *more, **named)

    monkeypatch.setattr(DenseModel, "run_layer", counted)
    pruned = ghostlayers.prune(model, tokenizer=byte_tokenizer, data=some_text, **GIVEN, **choices)
    planned = plan_prune(
        pruned.dense,
        Recipe(**GIVEN, **choices),
        LAYER_ONLY,
        started=0.0,
        output=None,
    )
    assert planned.seconds == pytest.approx(ran, rel=0.35)


def expected(model: Any, **choices: Any) -> Expected:
    return Expected.of(DenseModel(model), Recipe(**{"layers": 3, **GIVEN, **choices}))


def test_memory_of_a_fit_grows_with_the_square_of_its_features(trained_llama: Any) -> None:
    spans = (Span(3, 6),)
    narrow = expected(trained_llama, repair="ghost")
    wide = expected(trained_llama, repair="joint:x+z")
    assert wide.fit(spans).held > narrow.fit(spans).held
    width = 48 + 96
    assert wide.fit(spans).held >= sums_bytes(wide.model, wide.fitting, spans)
    assert wide.fit(spans).solutions > narrow.fit(spans).solutions * (width / 48) ** 2


def test_a_fit_takes_no_more_than_the_stream_and_a_few_matrices(trained_llama: Any) -> None:
    """Sums of features x features and features x hidden, solving's copies, and streams."""
    found = expected(trained_llama, repair="ghost").fit((Span(3, 6),)).held
    hidden = trained_llama.config.hidden_size
    assert found <= (2 + 4 + 4) * hidden**2 * 8


def test_processes_share_windows_but_not_solving(trained_llama: Any) -> None:
    recipe = Recipe(layers=3, **GIVEN)
    model = DenseModel(trained_llama)

    def seconds(speed: Speed, processes: int) -> float:
        return plan_prune(
            model, recipe, speed, started=0.0, output=None, processes=processes
        ).seconds

    assert seconds(LAYER_ONLY, 4) == pytest.approx(seconds(LAYER_ONLY, 1) / 4)
    solving = Speed(layer=0.0, head=0.0, product=0.0, solution=1.0)
    assert seconds(solving, 4) == seconds(solving, 1)


def test_arithmetic_of_a_layer(trained_llama: Any) -> None:
    """Against torch's own counter, to the share of norms and rotations."""
    from torch.utils.flop_counter import FlopCounterMode

    model = DenseModel(trained_llama)
    batch, hidden = model.begin(torch.arange(64)[None])
    with FlopCounterMode(display=False) as counted, stream.torch.no_grad():
        model.run_layer(0, batch, hidden)
    assert layer_flops(model, 64) == pytest.approx(counted.get_total_flops(), rel=0.25)


def test_lines_add_up() -> None:
    one = Pass("one", "One", layers=2, heads=1, held=10, disk=5, fixed=1.0)
    two = Pass("two", "Two", layers=3, products=7, held=20, disk=5, fixed=2.0)
    here = Prices(DenseModel(make_tiny_llama()), 8, Speed(1.0, 1.0, 1.0), held_now=0)
    first, second, both = here.of(one), here.of(two), here.together("both", [one, two])
    assert (both.seconds, both.flops) == (16.0, first.flops + second.flops)
    assert (both.memory, both.disk) == (second.memory, 10)
    plan = Plan((Predicted("a", 1.0, 10.0, 5, 2), Predicted("b", 2.0, 5.0, 9, 0)))
    assert (plan.seconds, plan.flops, plan.memory, plan.disk) == (3.0, 15.0, 9, 2)
    assert Plan().memory == 0


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("select", ["recoverable", "shortgpt"])
def test_expected_spans_are_as_many_layers_as_asked_for(layers: int, select: str) -> None:
    spans = expected_spans(Recipe(layers=layers, select=select), 8)
    assert sum(map(len, spans)) == layers
    assert spans[0].start >= 0
    assert spans[-1].stop <= 8


def test_the_command_plans_and_writes_nothing(
    tiny_folder: Path, tmp_path: Path, some_text: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text))
    out = tmp_path / "out"
    given = [str(tiny_folder), "--data", str(text), "-o", str(out), "--windows", "16"]
    given += ["--sequence-length", "64", "--layers", "2", "--plan"]
    done = CliRunner().invoke(app, ["prune", *given])
    assert done.exit_code == 0, done.output
    for word in (
        "Scoring layers",
        "Racing the shortlist",
        "Fitting the repairs",
        "in all",
        "GiB",
        "Beside the",
    ):
        assert word in done.output
    assert not out.exists()
    given += ["--eval-data", str(text), "--max-windows", "4", "--repair", "none,ghost"]
    done = CliRunner().invoke(app, ["compare", *given])
    assert done.exit_code == 0, done.output
    assert "Losses of every repair on every text" in done.output
    assert not out.exists()


def test_writing_is_timed_where_the_result_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tmp_path / "not" / "yet" / "there"
    assert probe.writing_seconds(2**20, wanted) == 0.0
    monkeypatch.setattr(probe, "WRITTEN_UNNOTICED", 0)
    monkeypatch.setattr(probe, "PROBED_BYTES", 2**16)
    clock = iter((10.0, 10.5))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert probe.writing_seconds(2**20, wanted) == 0.5 * 16
    assert not list(tmp_path.iterdir())  # nothing stays behind


@pytest.mark.parametrize(
    ("repair", "save"),
    [
        ("ghost", "checkpoint"),
        ("joint:x+z", "adapter"),
        ("refit:3", "checkpoint"),
        ("refit:3", "adapter"),
        ("piecewise:2", "adapter"),
    ],
)
def test_bytes_that_are_written(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    tmp_path: Path,
    repair: str,
    save: Any,
) -> None:
    choices = {**GIVEN, "remove": "3-5", "repair": repair}
    planned = pipeline.plan(
        trained_llama, tokenizer=byte_tokenizer, output=Output(save), **choices
    ).lines[-1]
    pruned = ghostlayers.prune(trained_llama, tokenizer=byte_tokenizer, data=some_text, **choices)
    write = pruned.save if save == "checkpoint" else pruned.save_adapter
    write(tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert planned.disk == pytest.approx(size, rel=0.02, abs=6000)
    assert ("adapter" in planned.name) == (save == "adapter")


def test_a_gguf_file_is_planned_too(trained_llama: Any, byte_tokenizer: Any) -> None:
    choices = {**GIVEN, "remove": "3-5", "repair": "refit:3"}
    *_, saving, gguf = pipeline.plan(
        trained_llama,
        tokenizer=byte_tokenizer,
        output=Output(gguf=Path("model.gguf"), pre_tokenizer="gpt-2"),
        **choices,
    ).lines
    assert "GGUF" in gguf.name
    assert gguf.disk == saving.disk > 0
