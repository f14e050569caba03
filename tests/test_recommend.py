"""`recommend`: the best cuts, and commands that make what the table says."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ghostlayers
from ghostlayers.cli.app import app
from ghostlayers.errors import RecipeError
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.recommending import Wish
from ghostlayers.recommending.commands import prune_command
from ghostlayers.repairs import find_method

SMALL = (
    "--windows", "12", "--held-out-windows", "2", "--race-windows", "4", "--sequence-length", "64",
    "--max-windows", "2", "--continuations", "4", "--no-speed",
)  # fmt: skip


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def asked(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What the command wrote and said, of a model in a folder."""
    place = tmp_path_factory.mktemp("recommend")
    trained_llama.save_pretrained(place / "model")
    byte_tokenizer.save_pretrained(place / "model")
    (place / "fit it.txt").write_text("\n\n".join(some_text[:-8]))
    (place / "other.txt").write_text("\n\n".join(some_text[-8:]))
    command = (
        "recommend", place / "model", "--less", "10%,30%", "--data", place / "fit it.txt",
        "--eval-data", place / "other.txt", *SMALL, "-o", place / "out",
    )  # fmt: skip
    done = call(*command)
    assert done.exit_code == 0, done.output
    results = json.loads((place / "out" / "results.json").read_text())
    return place, command, done.output, results


def told_commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if line.startswith("ghostlayers ")]


def test_there_is_a_row_for_every_share_and_engine(asked: Any) -> None:
    _, _, _, results = asked
    rows = results["recommended"]
    assert [(row["less"], row["engine"], row["layers"]) for row in rows] == [
        ("10%", "transformers, vLLM", 1),
        ("10%", "llama.cpp", 1),
        ("30%", "transformers, vLLM", 2),
        ("30%", "llama.cpp", 2),
    ]
    for row in rows:
        assert row["engine"] != "llama.cpp" or find_method(row["method"]).form == "fold"
        assert row["excess_nats"] > 0
        assert 0 <= row["loops"] <= 1
        assert row["num_parameters"] < results["model"]["num_parameters"]


def test_its_figures_are_those_of_the_comparison(asked: Any) -> None:
    _, _, _, results = asked
    losses = {(c["layers"], c["repair"]): c["loss_nats"] for c in results["cells"]}
    for row in results["recommended"]:
        assert row["loss_nats"] == losses[row["layers"], row["repair"]]
        want = row["loss_nats"] - losses[0, "dense"]
        assert row["excess_nats"] == pytest.approx(want, abs=1e-9)


@pytest.mark.slow
def test_its_commands_make_what_the_table_says(
    asked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, _, told, results = asked
    monkeypatch.chdir(tmp_path)
    for words, row in zip(told_commands(told), results["recommended"], strict=True):
        out = words.index("-o") + 1
        assert words[out].endswith(".gguf") == (row["engine"] == "llama.cpp")
        words[out] = words[out].replace(".gguf", "-file")  # the same, which transformers reads, too
        done = call(*words[1:])
        assert done.exit_code == 0, done.output
        (one,) = ghostlayers.evaluate(
            words[out], data=str(place / "other.txt"), sequence_length=64, max_windows=2
        )
        assert one.sums.loss_nats == pytest.approx(row["loss_nats"], abs=1e-5)


def test_the_page_shows_them_and_no_folder_of_this_machine(asked: Any) -> None:
    place, _, _, results = asked
    page = (place / "out" / "report.html").read_text()
    assert '<h2 id="recommended">What to take</h2>' in page
    assert str(place) not in page + json.dumps(results)
    for row in results["recommended"]:
        assert f"--repair {row['method']}" in page


@pytest.mark.slow
def test_the_same_command_goes_on_with_what_is_done(asked: Any) -> None:
    place, command, told, results = asked
    again = call(*command)
    assert again.exit_code == 0, again.output
    assert told_commands(again.output) == told_commands(told)
    assert json.loads((place / "out" / "results.json").read_text())["cells"] == results["cells"]


def test_a_plan_writes_nothing(asked: Any, tmp_path: Path) -> None:
    _, command, _, _ = asked
    done = call(*command[:-1], tmp_path / "planned", "--plan")
    assert done.exit_code == 0, done.output
    assert "in all" in done.output
    assert not (tmp_path / "planned").exists()


def test_a_file_needs_another_text_to_measure_on(asked: Any) -> None:
    place, *_ = asked
    done = call("recommend", place / "model", "--data", place / "fit it.txt", "-o", place / "none")
    assert done.exit_code == 2
    assert "Give --eval-data another text" in " ".join(done.output.split())
    assert not (place / "none").exists()


def test_a_corpus_of_the_hub_has_a_part_of_its_own_to_measure_on() -> None:
    assert Wish.of(data="c4").comparison(30).eval_data == ("c4",)
    assert Wish.of(data="c4").comparison(30).layers == (3, 6, 9)
    assert Wish.of(data="c4", less=("50%",)).comparison(1 + 1).layers == (1,)


@pytest.mark.parametrize("share", ["0%", "100%", "some", "120%"])
def test_shares_that_leave_all_or_nothing_are_refused(share: str) -> None:
    with pytest.raises(RecipeError, match="'less'"):
        Wish.of(data="c4", less=(share,))


def test_a_command_says_all_that_the_fit_depends_on() -> None:
    recipe = Recipe(data="a b.txt", separator="\n", windows=3, seed=4, race_windows=9)
    words = shlex.split(prune_command("m", recipe, "3-4", "ghost", "out", RunOptions()))
    assert words == [
        "ghostlayers", "prune", "m", "-o", "out", "--remove", "3-4", "--repair", "ghost",
        "--data", "a b.txt", "--separator", "\\n", "--windows", "3", "--race-windows", "9",
        "--seed", "4",
    ]  # fmt: skip


@pytest.mark.slow
def test_it_is_asked_in_python_and_leaves_nothing(asked: Any) -> None:
    place, _, _, results = asked
    found = ghostlayers.recommend(
        place / "model",
        less=("30%",), data=str(place / "fit it.txt"), eval_data=(str(place / "other.txt"),),
        windows=12, held_out_windows=2, race_windows=4, sequence_length=64, max_windows=2,
        continuations=0, speed=False,
    )  # fmt: skip
    assert found is not None
    assert not found.written
    wanted = [row for row in results["recommended"] if row["less"] == "30%"]
    assert [(row.method, row.removed) for row in found.rows] == [
        (row["method"], row["removed"]) for row in wanted
    ]
    assert [row.loss_nats for row in found.rows] == pytest.approx([r["loss_nats"] for r in wanted])
    assert all(str(place) in (row.command or "") for row in found.rows)
