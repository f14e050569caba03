"""Killed before any step on the disk, what was there or what comes is whole, and nothing stays."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ghostlayers.calibration import journal
from ghostlayers.calibration.journal import Journal, KeptPass, keeping
from ghostlayers.compare.store import Store, write_report_file
from ghostlayers.errors import OutputError
from ghostlayers.runtime.files import write_whole
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.outputs import RECORD, hashes, unlisted, whole_folder
from kills import kills


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def make_folder(out: Path, content: str, *, overwrite: bool = False) -> None:
    """A result of ours: some files and their record."""
    with whole_folder(out, overwrite=overwrite) as draft:
        (draft / "weights").write_text(content)
        (draft / "card").write_text(f"card of {content}")
        (draft / RECORD).write_text(json.dumps({"files": hashes(draft)}))


def is_whole(out: Path, *contents: str) -> bool:
    return unlisted(out) == [] and (out / "weights").read_text() in contents


@pytest.mark.slow
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "place"
    out, count = place / "new" / "out", 0
    for _ in kills(lambda: empty(place), lambda: make_folder(out, "new")):
        count += 1
        assert not out.exists() or is_whole(out, "new")
        make_folder(out, "new", overwrite=out.exists())
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert is_whole(out, "new")
    assert count > 8


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_one(
    tmp_path: Path, exchange: bool
) -> None:
    place = tmp_path / "place"
    out, count = place / "out", 0

    def prepare() -> None:
        empty(place)
        make_folder(out, "old")

    def replace() -> None:
        make_folder(out, "new", overwrite=True)

    for _ in kills(prepare, replace, exchange=exchange):
        count += 1
        if exchange:  # at every instant
            assert is_whole(out, "old", "new")
        with holding(out):  # what any next command does first
            assert is_whole(out, "old", "new")
        replace()
        assert [path.name for path in place.iterdir()] == ["out"]
        assert is_whole(out, "new")
    assert count > 12


@pytest.mark.slow
def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "place"
    path = place / "result.json"

    def prepare() -> None:
        empty(place)
        path.write_text("old")

    def work() -> None:
        with holding(path):
            write_whole(path, "new")

    count = 0
    for _ in kills(prepare, work):
        count += 1
        assert path.read_text() in ("old", "new")
        work()
        assert path.read_text() == "new"
        assert [other.name for other in place.iterdir()] == [path.name]
    assert count > 5


@pytest.mark.slow
def test_sums_of_a_run_are_the_old_or_the_new_ones(tmp_path: Path) -> None:
    folder, tensors = tmp_path / "kept", {"sum": torch.arange(3.0)}

    def write(done: int) -> None:
        with keeping(folder, {"what": "a test"}) as run:
            record = KeptPass(run, run._path("Sums", 1), "Sums")
            record.restore({name: tensor.clone() for name, tensor in tensors.items()})
            record.done = done
            record._write(record.share, tensors)

    def prepare() -> None:
        empty(tmp_path)
        write(1)

    for _ in kills(prepare, lambda: write(2)):
        with keeping(folder, {"what": "a test"}) as run:
            record = KeptPass(run, run._path("Sums", 1), "Sums")
            record.restore({name: tensor.clone() for name, tensor in tensors.items()})
        assert record.done in (1, 2)
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
        journal.finish(folder)
        assert not folder.exists()


@pytest.mark.slow
def test_a_comparison_killed_anywhere_goes_on(tmp_path: Path) -> None:
    folder, asked = tmp_path / "compared", {"request": {"layers": [1]}}

    def work() -> None:
        with holding(folder):
            store = Store(folder, asked)
            store.put("a part", {"loss": 1.5})
            write_report_file(folder / "results.json", "{}")

    for _ in kills(lambda: empty(tmp_path), work):
        work()
        assert Store(folder, asked).get("a part") == {"loss": 1.5}
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["parts", "request.json", "results.json", "written.json"]
        assert len(list((folder / "parts").iterdir())) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["compared"]


@pytest.mark.slow
def test_the_same_command_may_replace_what_it_made_before_it_was_killed(tmp_path: Path) -> None:
    """And no other one may, nor this one when it had ended well."""
    place = tmp_path / "place"
    out = place / "out"

    def run(request: str = "this") -> None:
        with holding(out, request):
            make_folder(out, "new")

    published = 0
    for _ in kills(lambda: empty(place), run):
        published += out.exists()
        if out.exists():
            with pytest.raises(OutputError, match="exists already"):
                run("another")
        run()
        assert is_whole(out, "new")
        assert [path.name for path in place.iterdir()] == ["out"]
    assert published
    with pytest.raises(OutputError, match="exists already"):
        run()


def test_a_journal_folder_of_others_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with keeping(tmp_path, {"what": "a test"}):
        assert (tmp_path / "request.json").is_file()
    journal.finish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_journal_knows_all_names_that_it_gives() -> None:
    record = Journal(Path("kept"))
    given = [record._path("A stage: of (some) kind", 3), record.file_for("Rows")]
    given.append(KeptPass(record, given[0], "A stage").whole)
    assert all(any(path.match(pattern) for pattern in journal.KEPT) for path in given)
