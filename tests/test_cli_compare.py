"""The commands `compare` and `run`, as typed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import ghostlayers
from ghostlayers.cli.run import read_recipe
from ghostlayers.errors import RecipeError
from ghostlayers.repairs import REPAIR_REGISTRY
from ghostlayers.repairs.arguments import arguments_of
from ghostlayers.selection.methods import SELECTION_REGISTRY
from test_cli import call, words

SMALL = [
    *("--windows", "12", "--fit-windows", "12", "--held-out-windows", "2"),
    *("--sequence-length", "64", "--max-windows", "2", "--device", "cpu"),
    *("--no-speed", "--no-yardstick"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, some_text: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name, part in (("fit.jsonl", some_text[:-4]), ("test.jsonl", some_text[-4:])):
        lines = [json.dumps({"text": document}) + "\n" for document in part]
        (folder / name).write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def compare(model: Any, *more: str) -> Any:
    return call(
        "compare", model, "-n", "2", "--select", "streamline", "-d", "fit.jsonl",
        "--eval-data", "test.jsonl", "--continuations", "1", *SMALL, *more,
    )  # fmt: skip


@pytest.mark.slow
def test_compare_shows_a_table_and_writes_four_files(tiny_folder: Any) -> None:
    result = compare(tiny_folder, "-o", "cmp", "--repair", "none,ghost,joint:x+z,refit:2")
    assert result.exit_code == 0, result.output
    text = words(result.stdout)
    assert re.search(r"At most \d+ minutes? to go on this machine", text)
    assert re.search(r"2 layers by streamline: \d-\d \(dense \d\.\d{3}\)", text)
    for name in ("none", "ghost", "joint:x+z", "refit:2"):
        assert name in text
    results = json.loads(Path("cmp/results.json").read_text())
    assert {each["repair"] for each in results["cells"]} == {
        "dense", "none", "ghost", "joint:x+z", "refit:2",
    }  # fmt: skip
    assert "| ghost" in Path("cmp/results.md").read_text()
    assert Path("cmp/results.csv").read_text().count("\n") == 1 + 5
    page = Path("cmp/report.html").read_text()
    assert "joint:x+z" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_compare_goes_on_in_its_own_folder_and_refuses_anothers(tiny_folder: Any) -> None:
    first = compare(tiny_folder, "-o", "again", "--repair", "none,ghost")
    assert first.exit_code == 0, first.output
    second = compare(tiny_folder, "-o", "again", "--repair", "none,ghost")
    assert second.exit_code == 0
    assert "Choosing" in first.stdout
    assert "Choosing" not in second.stdout  # nothing is measured twice
    other = compare(tiny_folder, "-o", "again", "--repair", "none")
    assert other.exit_code == 1
    assert "holds another comparison (it differs in request.repair" in words(other.output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--repair", "gost"), 2, "unknown repair 'gost'. Did you mean 'ghost'?"),
        (("--repair", "ghost:rank=x"), 2, "rank must be a whole number from 1 to 100,000, got 'x'"),
        (("-n", "two"), 2, "--layers: expected whole numbers such as 3,5,7, got 'two'"),
        (("-n", "60"), 1, "cannot remove 60 of 6 decoder layers"),
        (("--eval-data", "absent.txt"), 1, "no corpus and no file is called 'absent.txt'"),
        (("--published", "absent.yaml"), 2, "'absent.yaml' cannot be read"),
        (("--held-out-windows", "0"), 2, "'held_out_windows' must be at least 1: a comparison"),
        (("--limit", "3"), 2, "'limit' mean nothing without 'tasks'"),
        (
            ("-n", "5", "--select", "perplexity", "--keep-layers", "first:1,last:1"),
            1,
            "only 4 of the model's 6",
        ),
        (
            ("-n", "2,5", "--select", "every", "--keep-layers", "first:1,last:1"),
            1,
            "no span of 5 layers fits",
        ),
        (("-n", "2,5", "--select", "lorp"), 1, "cannot remove 5 layers by 'lorp'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tiny_folder: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = compare(tiny_folder, "-o", "never", *arguments)
    assert result.exit_code == code, result.output
    assert message in words(result.output)
    assert not Path("never").exists()


def recipe(**values: Any) -> str:
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(values))
    return str(path)


RECIPE: dict[str, Any] = {
    "command": "compare",
    "layers": [2],
    "select": ["streamline"],
    "repair": ["none", "ghost"],
    "data": "fit.jsonl",
    "eval_data": ["test.jsonl"],
    "windows": 12,
    "fit-windows": 12,
    "held_out_windows": 2,
    "sequence_length": 64,
    "max_windows": 2,
    "device": "cpu",
    "speed": False,
    "yardstick": False,
}


@pytest.mark.slow
def test_run_is_the_command_that_the_recipe_spells(tiny_folder: Any) -> None:
    direct = compare(tiny_folder, "-o", "direct", "--repair", "none,ghost")
    assert direct.exit_code == 0, direct.output
    result = call("run", recipe(**RECIPE, model=str(tiny_folder)), "-o", "from-recipe")
    assert result.exit_code == 0, result.output
    one, two = (
        json.loads(Path(name, "results.json").read_text()) for name in ("direct", "from-recipe")
    )
    assert one["cells"] == two["cells"]


@pytest.mark.slow
def test_run_varies_keys_and_sets_the_losses_side_by_side(tiny_folder: Any) -> None:
    path = recipe(**RECIPE, vary={"token_weight": ["uniform", "relative"]})
    result = call("run", path, "--model", tiny_folder, "-o", "varied", "--set", "max_windows=1")
    assert result.exit_code == 0, result.output
    text = words(result.stdout)
    assert "compare with token_weight uniform" in text
    assert re.search(r"mean loss token_weight uniform token_weight relative", text)
    folders = sorted(each.name for each in Path("varied").iterdir())
    assert folders == ["token_weight-relative", "token_weight-uniform"]
    found = json.loads(Path("varied", folders[0], "results.json").read_text())
    assert found["recipe"]["token_weight"] == "relative"
    assert all(each["num_tokens"] == 63 for each in found["cells"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"command": "comparee"}, "'command' must say what to run, got 'comparee'. Did you mean"),
        ({"layer": 3}, "unknown key 'layer' for compare. Did you mean 'layers'?"),
        ({"vary": {"seed": 3}}, "'vary' must give a list of values for each key"),
        ({"vary": {"seed": []}}, "'vary' must give a list of values for each key"),
        ({"data": {"a": 1}}, "'data' must be a value or a list, got a mapping"),
        ({"overwrite": "no"}, "'overwrite' must be true or false, got 'no'"),
        ({"max_windows": "x"}, "'max_windows' must be a whole number, got 'x'"),
        ({"max_windows": 0}, "'max_windows' must be at least 1, got 0"),
        ({"max-windows": 1}, "'max_windows' is given twice"),
        ({"batch-size": -3}, "'batch_size' must be at least 0, got -3"),
        ({"preset": "bogus"}, "unknown preset 'bogus'. Known: ghosted"),
        ({"dtype": "half"}, "'dtype' must be one of auto, float32, bfloat16, float16, got 'half'"),
    ],
)
def test_recipes_that_mean_nothing(values: dict[str, Any], message: str) -> None:
    result = call("run", recipe(**{**RECIPE, "model": "m", "output": "never", **values}))
    assert result.exit_code == 2, result.output
    assert message in words(result.output)
    assert not Path("never").exists()


def test_a_choice_that_is_no_option_is_refused() -> None:
    path = Path(recipe(command="prune", model="m", output="o", save="bogus"))
    with pytest.raises(RecipeError, match="'save' must be one of checkpoint, adapter, got 'bogus'"):
        read_recipe(path, {})


def test_a_key_that_is_set_varies_no_more() -> None:
    values = {**RECIPE, "model": "m", "output": "o", "vary": {"token-weight": ["uniform"]}}
    path = Path(recipe(**values, seed=1))
    (varied,) = read_recipe(path, {})
    assert varied.arguments["token_weight"] == "uniform"
    assert varied.arguments["output"] == Path("o/token_weight-uniform")
    (fixed,) = read_recipe(path, {"token_weight": "relative", "max-windows": 1})
    assert fixed.arguments["token_weight"] == "relative"
    assert fixed.arguments["max_windows"] == 1
    assert fixed.arguments["output"] == Path("o")


def test_yaml_that_would_run_code_is_refused() -> None:
    Path("evil.yaml").write_text("command: !!python/object/apply:os.system ['touch evil']\n")
    result = call("run", "evil.yaml")
    assert result.exit_code == 2
    assert "is not YAML" in words(result.output)
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    "path",
    sorted(Path(__file__).parents[1].glob("recipes/**/*.yaml")),
    ids=lambda path: path.stem,
)
def test_the_recipes_that_come_with_the_project_can_be_read(path: Path) -> None:
    from ghostlayers.cli.compare import read_published

    if path.parent.name == "published":
        assert read_published(path)
        return
    runs = read_recipe(path, {})
    assert all(run.command == "compare" for run in runs)
    from ghostlayers.cli.options import names_in
    from ghostlayers.repairs import find_method

    for run in runs:
        for name in names_in(run.arguments.get("repair"), "--repair"):
            if name != "all":
                find_method(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "high"}, "cell 1: 'value' must be a number, got 'high'"),
        ({"layers": 7.5}, "cell 1: 'layers' must be a whole number, got 7.5"),
        ({"select": None}, "cell 1: 'select' must be text, got None"),
        ({"metric": "speed"}, "'metric' must begin with one of acc, ppl, loss, got 'speed'"),
    ],
)
def test_published_figures_are_checked(changes: dict[str, Any], message: str) -> None:
    from ghostlayers.cli.compare import read_published

    cell = {"source": "a", "layers": 7, "select": "s", "repair": "ghost", "metric": "acc"}
    path = Path("published.yaml")
    path.write_text(yaml.safe_dump([{**cell, "value": 1.5}]))
    assert read_published(path)[0]["value"] == 1.5
    path.write_text(yaml.safe_dump([{**cell, "value": 1.5, **changes}]))
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_published(path)


def test_the_command_in_the_results_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghostlayers.cli.compare import command_line

    monkeypatch.setattr("sys.argv", ["x", "compare", "/here/m", "--prompt", "a b's", "-d", "/x/y"])
    told = command_line()
    assert shlex.split(told) == ["ghostlayers", "compare", "m", "--prompt", "a b's", "-d", "y"]


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(RecipeError, match="compare also needs model, output"):
        read_recipe(Path(recipe(**RECIPE)), {})


@pytest.mark.slow
def test_a_plan_leaves_what_is_there_alone(tiny_folder: Path) -> None:
    assert compare(tiny_folder, "-o", "kept", "--repair", "none").exit_code == 0
    before = {path: path.read_bytes() for path in Path("kept").rglob("*") if path.is_file()}
    result = compare(tiny_folder, "-o", "kept", "--repair", "ghost", "--plan", "--overwrite")
    assert result.exit_code == 0, result.output
    assert {p: p.read_bytes() for p in Path("kept").rglob("*") if p.is_file()} == before
    assert compare(tiny_folder, "-o", "new", "--repair", "ghost", "--plan").exit_code == 0
    assert not Path("new").exists()


# Published methods, each by its own choices

PRESET_SMALL = [
    *("-d", "fit.jsonl", "--eval-data", "test.jsonl", "--sequence-length", "64", "--windows", "8"),
    *("--fit-windows", "8", "--search-windows", "4", "--held-out-windows", "2"),
    *("--max-windows", "2", "--no-speed", "--device", "cpu", "--keep-layers", "first:1,last:1"),
]


@pytest.mark.slow
def test_methods_are_compared_by_their_own_choices(tiny_folder: Any) -> None:
    command = ("compare", tiny_folder, "-n", "1,2", "--presets", "all", *PRESET_SMALL, "-o", "own")
    result = call(*command)
    assert result.exit_code == 0, result.output
    text = words(result.stdout)
    assert "Each method by its own choices of layers, repair and calibration text" in text
    results = json.loads(Path("own/results.json").read_text())
    assert set(results["presets"]) == set(ghostlayers.PRESETS)
    rows = {(row["layers"], row["select"]) for row in results["models"]} - {(0, "")}
    assert rows == {(n, name) for n in (1, 2) for name in ghostlayers.PRESETS}
    used = results["presets"]
    assert used["sleb"]["select"] == "perplexity"
    assert used["prune-and-comp"]["refit"] == "none"
    assert {each["windows"] for each in used.values()} == {8}  # the caller's choice wins
    assert len({each["sampling"] for each in used.values()}) == 3  # the others stay the methods'
    page = Path("own/report.html").read_text()
    assert "each method by its own choices" in page
    assert "Methods side by side" in page
    assert "Quality against layers removed" not in page
    markdown = Path("own/results.md").read_text()
    assert all(f"| {name} |" in markdown for name in ghostlayers.PRESETS)
    again = call(*command)
    assert again.exit_code == 0
    assert "layers as" not in again.stdout  # nothing is measured twice


@pytest.mark.slow
def test_one_set_of_choices_for_all_says_so(tiny_folder: Any) -> None:
    assert compare(tiny_folder, "-o", "one", "--repair", "none,ghost").exit_code == 0
    page = Path("one/report.html").read_text()
    assert "one protocol for all" in page
    assert "Methods side by side" not in page


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--presets", "sleb,slab"), 2, "unknown preset 'slab'. Did you mean 'sleb'?"),
        (("--presets", "sleb", "--select", "lorp"), 2, "choose and repair by themselves"),
        (("--presets", "sleb", "--repair", "ghost"), 2, "choose and repair by themselves"),
        (("--presets", ","), 2, "--presets names nothing"),
        (("--presets", "sleb", "-n", "60"), 1, "cannot remove 60 of 6 decoder layers"),
        (("--presets", "sleb", "-n", "5"), 1, "only 4 of the model's 6"),
        (("--presets", "sleb", "--eval-length", "4096"), 1, "works is --eval-length 128"),
        (("--presets", "sleb", "--preset", "lorp"), 2, "'preset' and 'presets' mean different"),
    ],
)
def test_mistakes_with_presets_are_told_before_anything_is_written(
    tiny_folder: Any, more: tuple[str, ...], code: int, message: str
) -> None:
    result = call("compare", tiny_folder, "-n", "2", *PRESET_SMALL, *more, "-o", "none-of-it")
    assert result.exit_code == code, result.output
    assert message in words(result.output)
    assert not Path("none-of-it").exists()


def test_methods_lists_papers_code_and_choices() -> None:
    shown = words(call("methods").stdout)
    for preset in ghostlayers.PRESETS.values():
        assert preset.name in shown
        assert preset.paper in shown
    one = words(call("methods", "paper").stdout)
    assert "Ghosted Layers (--preset ghosted, paper)" in one
    assert "arXiv:2605.15491" in one
    assert "'ghost:per=layer'" in one
    wrong = call("methods", "papier")
    assert wrong.exit_code == 2
    assert "unknown method 'papier'. Did you mean 'paper'?" in words(wrong.output)


@pytest.mark.parametrize(
    ("option", "keyword", "cls"),
    [("--repair", *item) for item in REPAIR_REGISTRY.own.items()]
    + [("--select", *item) for item in SELECTION_REGISTRY.own.items()],
)
def test_methods_shows_every_repair_and_selection_with_its_arguments(
    option: str, keyword: str, cls: Any
) -> None:
    assert f"{keyword}: {cls.summary()}" in words(call("methods").stdout)
    one = call("methods", keyword).stdout
    assert f"{option} {keyword}" in words(one)
    assert "Attributes:" not in one
    for argument in arguments_of(cls):
        name = argument.name.upper() if argument.placed else argument.key
        (said,) = re.findall(rf"^  :{name}(?:=VALUE)?  (.*)$", one, re.MULTILINE)
        assert said.strip(), f"{keyword} does not say what {argument.name} is"


def test_a_preset_prints_and_records_every_choice(tiny_folder: Any) -> None:
    result = call(
        "prune", tiny_folder, "-n", "2", "--preset", "prune-and-comp", "-d", "fit.jsonl",
        "--windows", "8", "--fit-windows", "8", "--sequence-length", "64", "-o", "cut",
        "--held-out-windows", "2", "--device", "cpu", "--keep-layers", "first:1,last:1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = words(result.stdout)
    assert "Prune&Comp, by Block Influence, arXiv:2507.18212" in text
    assert "windows 8 (not 128)" in text
    assert "refit 'none'" in text
    assert "not as there: the last layer stays" in text
    record = json.loads(Path("cut/ghostlayers.json").read_text())
    assert record["recipe"]["preset"] == "prune-and-comp"
    assert (record["recipe"]["refit"], record["recipe"]["sampling"]) == ("none", "random")
    assert record["recipe"]["repair"] == "magnitude:mean=ratios"


@pytest.mark.parametrize("key", ["trust-remote-code", "trust_remote_code", "trust_tasks"])
def test_a_recipe_grants_no_trust_by_itself(tiny_folder: Any, key: str) -> None:
    path = recipe(**RECIPE, model=str(tiny_folder), **{key: True})
    result = call("run", path, "-o", "never")
    assert result.exit_code == 2
    name = key.replace("-", "_")
    assert f"asks for '{name}', which lets others' code run" in words(result.output)
    assert f"--{name.replace('_', '-')}" in result.output


def test_who_types_the_command_may_grant_trust(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(recipe(**RECIPE, model=str(tiny_folder), trust_remote_code=True))
    asked = {"trust_remote_code": True}
    (found,) = read_recipe(path, {"output": Path("out"), **asked})
    assert found.arguments["trust_remote_code"] is True


def test_a_recipe_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("command: compare\nlayers: 2\nlayers: 3\n")
    result = call("run", tmp_path / "twice.yaml")
    assert result.exit_code == 2
    assert "the key 'layers' is given twice" in words(result.output)
