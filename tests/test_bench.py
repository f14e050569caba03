"""Timing models over a grid: what is counted, what is shared, what the command shows."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ghostlayers
from conftest import make_tiny_llama
from families import build
from ghostlayers.cli.app import app
from ghostlayers.evaluation.bench import (
    Point,
    Timing,
    _peak_of_process,
    cache_bytes,
    measure_grid,
    operator_share,
)
from ghostlayers.report.speed_plot import draw_speed
from ghostlayers.runtime.allocator import return_freed_memory


def point(model: str, prefill: float, decode: float, batch: int = 1) -> Point:
    return Point(model, batch, 16, Timing(prefill, 0.0, 1), Timing(decode, 0.0, 1), 0, 0)


def test_a_point_a_model_batch_and_length() -> None:
    models = {"dense": make_tiny_llama(), "cut": make_tiny_llama(num_hidden_layers=3)}
    points = measure_grid(models, batches=[1, 2], lengths=[8, 16], new_tokens=3, repeats=2)
    places = [(p.batch, p.length, p.model) for p in points]
    assert places == [(b, n, m) for b in (1, 2) for n in (8, 16) for m in models]
    for each in points:
        assert each.prefill.repeats == 2
        assert each.decode.repeats == 6
        assert each.prefill.median > 0
        assert each.decode.median > 0
        layers, heads, size = (6 if each.model == "dense" else 3), 2, 8
        assert each.cache_bytes == 2 * layers * each.batch * heads * each.length * size * 4
        assert each.peak_bytes >= 0
        assert each.to_dict()["decode_tokens_s"] == each.batch / each.decode.median


def test_what_is_written_is_what_generate_writes() -> None:
    """The cache is really used: tokens behind it are those of the model itself."""
    model = make_tiny_llama()
    ids = (torch.arange(8) % 256)[None]
    seen: list[int] = []
    real = model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            seen.append(int(kwargs["input_ids"]))
        return real(*args, **kwargs)

    model.forward = noted
    measure_grid({"": model}, batches=[1], lengths=[8], new_tokens=4, repeats=1, warmup=0)
    model.forward = real
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 8:].tolist()
    assert seen == [*expected, expected[0]]  # the last one where memory is measured


def test_peaks_are_of_what_is_held_meanwhile() -> None:
    """Neither what was freed before nor what is freed afterwards."""
    held = torch.ones(2**24)  # 64 MiB
    del held
    return_freed_memory()
    with _peak_of_process() as peak:
        held = torch.ones(2**24)
        time.sleep(0.1)
        del held
    assert 60 * 2**20 < peak() < 100 * 2**20
    with _peak_of_process() as peak:
        time.sleep(0.05)
    assert peak() < 2**24


def test_a_recurrent_state_counts_as_cache() -> None:
    model = build("jamba", vocab_size=64)
    with torch.no_grad():
        short, long = (
            cache_bytes(model(torch.arange(n)[None] % 64, use_cache=True).past_key_values)
            for n in (4, 8)
        )
    assert 0 < short < long < 2 * short


def test_times_are_summarised_by_median_and_quartiles() -> None:
    found = Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.spread, found.repeats) == (3.0, 2.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 0.0, 1)


def test_the_operators_share_of_the_time_it_replaced() -> None:
    points = [
        point("dense", 10.0, 1.0),
        point("cut", 6.0, 0.6),
        point("repaired", 6.4, 0.64),
    ]
    assert operator_share(points, "dense", "cut", "repaired") == pytest.approx(0.1)
    assert operator_share(points[:2], "dense", "cut", "repaired") is None
    slower = [point("dense", 5.0, 1.0), point("cut", 6.0, 1.1), point("repaired", 6.0, 1.1)]
    assert operator_share(slower, "dense", "cut", "repaired") is None


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    points = [point(m, 0.1 * b, 0.01 * b, b) for m in ("dense", "cut") for b in (1, 2, 4)]
    draw_speed(points, tmp_path / "speed.png", title="tiny")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def repaired(
    tiny_folder: Path, some_text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    pruned = ghostlayers.prune(
        str(tiny_folder), data=some_text, remove="2-3", windows=16, sequence_length=64
    )
    pruned.save(out)
    return out


GRID = ["--batch", "1,2", "--length", "16", "--new-tokens", "2", "--repeats", "2"]


def test_the_command_sets_three_models_side_by_side(
    repaired: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    path, png = tmp_path / "bench.json", tmp_path / "bench.png"
    given = [str(repaired), "--against", str(tiny_folder), "--json", str(path), "--png", str(png)]
    done = CliRunner().invoke(app, ["bench", *given, *GRID])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert [p["model"] for p in found["points"]] == ["dense", "cut", "repaired"] * 2
    dense, cut, ours = found["points"][:3]
    assert cut["cache_bytes"] == ours["cache_bytes"] == dense["cache_bytes"] * 4 / 6
    assert found["processor"]
    assert png.exists()
    assert "batch 2, prompts of 16 tokens" in done.output
    assert max(map(len, done.output.splitlines()[:8])) <= 80


def test_a_fold_has_no_cut_of_its_own(
    tiny_folder: Path, some_text: list[str], tmp_path: Path
) -> None:
    """It has the bare cut's architecture, so that the cut would be timed twice."""
    out, path = tmp_path / "folded", tmp_path / "bench.json"
    ghostlayers.prune(
        str(tiny_folder), data=some_text, remove="2-3", repair="refit:2", windows=16,
        sequence_length=64,
    ).save(out)  # fmt: skip
    given = [str(out), "--against", str(tiny_folder), "--json", str(path)]
    done = CliRunner().invoke(app, ["bench", *given, *GRID])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert [p["model"] for p in found["points"]] == ["dense", "repaired"] * 2
    assert found["operator_share"] is None


def test_places_where_nothing_can_be_written_are_told_at_once(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    for option, place, told in (
        ("--json", tmp_path / "absent" / "a.json", "there is no folder"),
        ("--png", tmp_path / "folder.png", "it is a folder; name a file"),
    ):
        done = CliRunner().invoke(app, ["bench", str(tiny_folder), option, str(place), *GRID])
        assert done.exit_code == 1
        assert told in " ".join(done.output.split())
        assert "Loading" not in done.output


def test_the_command_without_a_dense_model(tiny_folder: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(tiny_folder), *GRID])
    assert done.exit_code == 0, done.output
    assert "model" in done.output


def test_another_dense_model_is_refused(
    repaired: Path, tmp_path: Path, byte_tokenizer: Any
) -> None:
    other = tmp_path / "other"
    make_tiny_llama(num_hidden_layers=5).save_pretrained(other)
    byte_tokenizer.save_pretrained(other)
    done = CliRunner().invoke(app, ["bench", str(repaired), "--against", str(other), *GRID])
    assert done.exit_code == 1
    assert "was made from a model of 6" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--batch", "many", "whole numbers such as"),
        ("--length", "0", "whole numbers such as"),
        ("--length", "4096", "the longest prompt that works is --length 112"),
    ],
)
def test_bad_grids_are_refused(tiny_folder: Path, option: str, value: str, told: str) -> None:
    done = CliRunner().invoke(app, ["bench", str(tiny_folder), option, value])
    assert done.exit_code in (1, 2)
    assert told in " ".join(done.output.split())
