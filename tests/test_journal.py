"""A run that is killed goes on where it was, and ends with the same bits."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ghostlayers
from conftest import make_documents, make_tiny_llama
from ghostlayers.calibration import journal, passes
from ghostlayers.calibration.fingerprint import model_fingerprint
from ghostlayers.calibration.journal import Journal, keeping
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.errors import (
    DistributedError,
    InputError,
    ModelError,
    NoGainError,
    NumericalError,
    OutputError,
    ResumeError,
    VerificationError,
)
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions
from ghostlayers.text.tokens import Windows

KILLS = 8


KILLED = (
    "recoverable,ghost,none",
    "recoverable,ghost,disk",
    "recoverable:greedy,ghost,none",
    "perplexity,refit:2,none",
    "taylor:unprotected,piecewise:2,none",
    "shortgpt,joint:x+z,none",
    "streamline,ghost:ridge=auto,none",
    "streamline,auto,none",
)
"""Selection, repair and offloading of runs that are killed."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every case gave, whole and killed."""
    program, folder = Path(__file__).with_name("killed.py"), tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(KILLS), *KILLED],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(KILLED, map(json.loads, done.stdout.splitlines()[-len(KILLED) :]), strict=True))


def test_what_takes_long_to_write_is_written_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that every write moves on by ten seconds: a twentieth of the time goes into it."""
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    save = journal.save_file

    def slow(*given: Any, **more: Any) -> None:
        now[0] += 10.0
        save(*given, **more)

    monkeypatch.setattr(journal, "save_file", slow)
    with journal.keeping(tmp_path / "kept", {"what": "a test"}) as run:
        record, writes = run.next_pass("slow"), []
        record._written = 0.0
        for step in range(100):
            now[0] += 10.0
            before = now[0]
            record.note(step, {"sum": torch.zeros(3)})
            writes += [before] if now[0] > before else []
    assert writes[0] == 30.0
    assert all(later - earlier >= 200.0 for earlier, later in itertools.pairwise(writes))
    assert len(writes) > 3


@pytest.mark.parametrize("case", KILLED)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    killed: dict[str, Any], case: str
) -> None:
    outcome = killed[case]
    assert outcome["killed"] == outcome["whole"]
    assert outcome["kills"] >= 1
    assert outcome["resumed"] > 0


class Total:
    """A sum of token ids, and which windows are in it."""

    def __init__(self, windows: int) -> None:
        self.total = torch.zeros(1, dtype=torch.float64)
        self.seen = torch.zeros(windows, dtype=torch.int64)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"total": self.total, "seen": self.seen}


def some_windows(count: int = 6, length: int = 16) -> Windows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (count, length), generator=generator)
    return Windows(ids, bos=False, available=count, documents=())


def visit_some(
    folder: Path, *, stop_after: int | None = None, batch_size: int = 1
) -> tuple[Total, int]:
    """Add up windows, perhaps only some of them before an interruption."""
    windows, model = some_windows(), DenseModel(make_tiny_llama())
    sums, visited = Total(len(windows)), 0
    with keeping(folder, {"what": "a test"}, seconds_between=0.0) as journal:
        runner = Runner(model, batch_size, journal=journal)
        for first, ids in runner.visit(Pass("sums", "Sums"), windows, sums):
            if visited == stop_after:
                raise KeyboardInterrupt
            sums.total += ids.sum()
            sums.seen[first : first + len(ids)] += 1
            visited += len(ids)
    return sums, visited


@pytest.mark.parametrize("stop_after", range(1, 6))
def test_windows_that_are_in_the_sums_are_not_visited_again(
    tmp_path: Path, stop_after: int
) -> None:
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        visit_some(folder, stop_after=stop_after)
    sums, visited = visit_some(folder)
    assert visited == 6 - stop_after
    assert sums.seen.tolist() == [1] * 6
    assert float(sums.total) == float(some_windows().input_ids.sum())


@pytest.mark.parametrize(("first_process_says", "visited_again"), [(None, 3), (2, 6)])
def test_a_pass_goes_on_with_its_groups_unless_the_first_process_has_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first_process_says: int | None,
    visited_again: int,
) -> None:
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        visit_some(folder, stop_after=3)
    (file,) = folder.glob("*.safetensors")
    if first_process_says:  # it was killed before it had kept any
        monkeypatch.setattr(passes, "from_first", lambda _: first_process_says)
    sums, visited = visit_some(folder, batch_size=2)
    assert visited == visited_again
    assert sums.seen.tolist() == [1] * 6
    assert not file.exists()


def test_a_finished_pass_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    visit_some(folder)
    sums, visited = visit_some(folder)
    assert visited == 0
    assert sums.seen.tolist() == [1] * 6


def keep_whole(journal: Journal, sums: Total, fill: Callable[[], None] = lambda: None) -> None:
    """A pass of three windows that is kept as a whole."""
    Runner(DenseModel(make_tiny_llama()), journal=journal).whole("all", 3, sums, fill)


def test_a_pass_kept_whole_is_not_filled_again(tmp_path: Path) -> None:
    filled = []
    for _ in range(2):
        sums = Total(3)

        def fill(sums: Total = sums) -> None:
            sums.seen += 1
            filled.append(1)

        with keeping(tmp_path / "kept", {}, seconds_between=0.0) as journal:
            keep_whole(journal, sums, fill)
        assert sums.seen.tolist() == [1, 1, 1]
    assert filled == [1]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    visit_some(folder)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ResumeError, match=f"{file.name}' cannot be read.*; delete ") as refused:
        visit_some(folder)
    assert "prune" not in str(refused.value)  # other commands keep what they do, too


def test_sums_of_other_shapes_are_refused(tmp_path: Path) -> None:
    sums = Total(3)
    with keeping(tmp_path / "kept", {}, seconds_between=0.0) as journal:
        keep_whole(journal, sums)
    with (
        keeping(tmp_path / "kept", {}, seconds_between=0.0) as journal,
        pytest.raises(ResumeError, match="another stage"),
    ):
        keep_whole(journal, Total(4))


def test_another_request_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    visit_some(tmp_path / "kept")
    with (
        pytest.raises(ResumeError, match='what: "a test" then, "another" now'),
        keeping(tmp_path / "kept", {"what": "another"}),
    ):
        pass


def test_a_run_that_was_killed_at_once_is_in_nobodys_way(tmp_path: Path) -> None:
    with keeping(tmp_path / "kept", {"what": "a test"}):
        request = (tmp_path / "kept" / "request.json").read_text()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "request.json").write_text(request)  # what kill -9 leaves
    with keeping(tmp_path / "kept", {"what": "another"}):
        pass
    assert not (tmp_path / "kept").exists()


def test_sums_of_two_runs_at_the_same_time_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with keeping(folder, {"what": "a test"}, seconds_between=0.0) as journal:
        keep_whole(journal, Total(3))
    (folder / "request.json").write_text('{"what": "another"}')
    with (
        keeping(folder, {"what": "another"}) as journal,
        pytest.raises(ResumeError, match="written by a run of another request"),
    ):
        keep_whole(journal, Total(3))


def test_nothing_worth_keeping_leaves_nothing(tmp_path: Path) -> None:
    with keeping(tmp_path / "kept", {}):
        assert (tmp_path / "kept" / "request.json").is_file()
    assert not (tmp_path / "kept").exists()


# What belongs to a request


def test_a_changed_weight_is_another_model(tiny_folder: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return model_fingerprint(load_model(str(folder), RunOptions()))

    same, other = tmp_path / "same", tmp_path / "other"
    tokenizer = load_model(str(tiny_folder), RunOptions()).tokenizer
    for folder, change in ((same, 0.0), (other, 1e-3)):
        model = make_tiny_llama()
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[5, 7] += change
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    assert fingerprint(same) == fingerprint(tiny_folder)
    assert fingerprint(other) != fingerprint(tiny_folder)


@pytest.fixture
def interrupted(
    tmp_path: Path, trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> tuple[Path, dict[str, Any]]:
    """What a run kept that was stopped after its repairs were fitted, and its arguments."""
    given = {
        "tokenizer": byte_tokenizer,
        "data": some_text,
        "layers": 2,
        "windows": 20,
        "sequence_length": 64,
        "keep": tmp_path / "kept",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SECONDS_BETWEEN", 0.0)
        patch.setattr("ghostlayers.calibration.scoring.find_births", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ghostlayers.prune(trained_llama, **given)
    return tmp_path / "kept", given


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": 3}, "recipe"),
        ({"data": make_documents(40, seed=5)}, "text"),
        ({"options": RunOptions(batch_size=3)}, "batch_size"),
        ({"options": RunOptions(dtype="bfloat16")}, ""),
    ],
    ids=["recipe", "text", "batch size", "what does not matter"],
)
def test_another_recipe_text_or_batch_size_is_refused(
    interrupted: tuple[Path, dict[str, Any]],
    trained_llama: Any,
    change: dict[str, Any],
    named: str,
) -> None:
    _, given = interrupted
    if not named:  # a model in memory has its own type
        ghostlayers.prune(trained_llama, **{**given, **change})
        return
    with pytest.raises(ResumeError, match=f"{named}: "):
        ghostlayers.prune(trained_llama, **{**given, **change})


def test_another_model_is_refused(
    interrupted: tuple[Path, dict[str, Any]], trained_llama: Any
) -> None:
    _, given = interrupted
    weight = trained_llama.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight += 1e-3
        with pytest.raises(ResumeError, match="model: "):
            ghostlayers.prune(trained_llama, **given)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_saved_result_leaves_nothing_kept(
    interrupted: tuple[Path, dict[str, Any]], trained_llama: Any, tmp_path: Path
) -> None:
    folder, given = interrupted
    assert list(folder.glob("*.safetensors"))
    pruned = ghostlayers.prune(trained_llama, **given)
    assert dataclasses.asdict(pruned.recipe)["layers"] == 2
    assert folder.exists()
    pruned.save(tmp_path / "out")
    assert not folder.exists()


def ended_by(error: type[BaseException], kept: Path) -> None:
    """A run that has kept something ends by an error."""
    with journal.keeping(kept, {"a": 1}) as run:
        save_file({"a": torch.ones(1)}, run.folder / "sums-1-of-process-0-1.safetensors")
        raise error("no")


@pytest.mark.parametrize("error", [NumericalError, InputError, NoGainError, ModelError])
def test_what_a_refused_request_kept_is_in_nobodys_way(
    error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error):
        ended_by(error, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "error", [OutputError, DistributedError, VerificationError, MemoryError, KeyboardInterrupt]
)
def test_what_a_bad_day_ended_can_go_on(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        ended_by(error, tmp_path / "kept")
    assert any((tmp_path / "kept").glob("*.safetensors"))
