"""`--repair auto`: who may compete, what each costs, and that the best of them is taken."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import ghostlayers
from conftest import make_tiny_llama
from families import build
from ghostlayers.calibration.contest import hold_contest, judge, products_of_layers
from ghostlayers.checkpoint.card import contest_lines
from ghostlayers.cli.app import app
from ghostlayers.compare import Comparison, compare
from ghostlayers.errors import RecipeError, SingularError
from ghostlayers.model.dense import DenseModel
from ghostlayers.pipeline import plan
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method, linear
from ghostlayers.repairs.auto import AUTO, CONTESTANTS, NONE, Cost, decide, products_of_a_token
from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.spans import Span
from ghostlayers.statistics.race import Race
from ghostlayers.study import Study
from ghostlayers.surgery.eligible import contestants

TEXT = {"windows": 24, "sequence_length": 64, "held_out_windows": 2, "race_windows": 6}
OPERATORS = {name for name in CONTESTANTS if find_method(name).form != "fold"}


@pytest.fixture(scope="module")
def study(trained_llama: Any, byte_tokenizer: Any, some_text: list[str]) -> Study:
    return Study.open(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, repair=AUTO, remove="3-4", **TEXT
    )


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Deciding


@st.composite
def races(draw: st.DrawFn) -> tuple[Race, dict[str, Cost]]:
    """Losses of a few repairs on the same windows; some left, but none that the rest follow."""
    names = [NONE, *draw(st.lists(st.sampled_from("abcde"), unique=True, min_size=1))]
    count = draw(st.integers(2, 12))
    a_loss = st.floats(3.0, 3.4).map(lambda x: round(x, 3))
    losses = {
        name: torch.tensor(draw(st.lists(a_loss, min_size=count, max_size=count))).double()
        for name in names
    }
    overheads = draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    costs = {
        name: Cost(int(name != NONE), share / 100 if name != NONE else 0.0, share)
        for name, share in zip(names, overheads, strict=True)
    }
    return Race(losses), costs


def literal_choice(losses: dict[str, list[float]], costs: dict[str, Cost]) -> str:
    """The rule in plain numbers: all within a standard error of the lowest, the cheapest first."""
    means = {name: statistics.fmean(each) for name, each in losses.items()}
    best = min(means, key=lambda name: means[name])
    near = []
    for name, each in losses.items():
        behind = [a - b for a, b in zip(each, losses[best], strict=True)]
        error = statistics.stdev(behind) / len(behind) ** 0.5
        assume(name == best or abs(statistics.fmean(behind) - error) > 1e-9)  # rounding decides
        if statistics.fmean(behind) <= error:
            near.append(name)
    free = [name for name in near if costs[name].overhead == 0]
    cheap = NONE if NONE in near else min(free or near, key=lambda name: means[name])
    return cheap if means[cheap] < means[NONE] else NONE


@settings(deadline=None)
@given(races())
def test_the_cheapest_in_a_tie_is_taken_and_never_one_that_is_worse_than_none(
    drawn: tuple[Race, dict[str, Cost]],
) -> None:
    race, costs = drawn
    losses = {name: each.tolist() for name, each in race.losses.items()}
    taken = decide(race, costs)
    assert taken == literal_choice(losses, costs)
    assert statistics.fmean(losses[taken]) <= statistics.fmean(losses[NONE])


@pytest.mark.slow
@settings(deadline=None)
@given(races())
def test_the_reason_names_who_was_near(drawn: tuple[Race, dict[str, Cost]]) -> None:
    race, costs = drawn
    contest = judge(race, costs, {}, 3.0)
    assert contest.contestants[0].repair == contest.winner == decide(race, costs)
    assert contest.runner_up == contest.contestants[1].repair
    assert (race.best if race.best != contest.winner else contest.runner_up) in contest.reason
    assert [each.behind_nats for each in contest.contestants[1:]] == sorted(
        each.behind_nats for each in contest.contestants[1:]
    )


@pytest.mark.parametrize(
    ("operator", "products"),
    [
        (linear(torch.zeros(6, 6)), 36),
        (Operator({"reduce": torch.zeros(2, 6), "expand": torch.zeros(6, 2)}), 24),
        (Operator({"weight": torch.zeros(6, 6), "normed": torch.zeros(6, 6)}), 72),
        (Operator({"centroids": torch.zeros(4, 6), "pieces": torch.zeros(4, 6, 6)}), 24 + 36),
    ],
)
def test_an_operator_costs_the_numbers_that_a_token_meets(
    operator: Operator, products: int
) -> None:
    assert products_of_a_token(operator) == products
    cost = Cost.of([Repair("a", operator), Repair("a", operator)], 1000.0)
    assert cost.overhead == pytest.approx(2 * products / 1000)


def test_layers_cost_what_a_token_meets_in_them() -> None:
    model = DenseModel(build("mixtral"))
    config, layer = model.network.config, model.layers[0]
    whole = sum(weight.numel() for weight in layer.parameters() if weight.ndim > 1)
    expert = 3 * config.hidden_size * config.intermediate_size
    unused = config.num_local_experts - config.num_experts_per_tok
    assert unused > 0
    layers = model.num_layers - 2
    assert products_of_layers(model, [Span(1, 3)]) == layers * (whole - unused * expert)


# Holding a contest


@pytest.mark.slow
def test_it_is_one_of_the_repairs_as_it_is_alone(study: Study, some_text: list[str]) -> None:
    """Taken from one sweep, and with the weights that naming it gives."""
    cut = study.choose_repair(study.choose())
    assert cut.contest is not None
    assert cut.repairs is not None
    assert cut.recipe.repair == cut.contest.winner in CONTESTANTS
    built = study.build(cut, cut.repairs)
    alone = ghostlayers.prune(
        study.dense, data=some_text, remove="3-4", repair=cut.contest.winner, **TEXT
    )
    assert same_weights(built.model, alone.model)
    assert built.record["contest"]["winner"] == built.record["recipe"]["repair"]
    assert built.evidence["repaired"].loss_nats < built.evidence["cut"].loss_nats


@pytest.mark.slow
def test_prune_takes_what_the_verbs_take(study: Study, some_text: list[str]) -> None:
    pruned = ghostlayers.prune(study.dense, data=some_text, remove="3-4", repair=AUTO, **TEXT)
    ((name, repairs),) = study.fit(study.choose()).items()
    assert pruned.contest is not None
    assert pruned.contest.winner == name
    assert same_weights(pruned.model, study.build(study.choose(), repairs).model)


@pytest.mark.slow
def test_its_losses_are_those_of_the_windows(study: Study) -> None:
    """Whoever finishes has the loss that `losses` measures on the same windows."""
    contest, repairs = hold_contest(study, (Span(3, 5),))
    cut, winner = study.choose(), contest.of(contest.winner)
    measured = study.losses(cut, {"it": repairs}, on=study.held_out.first(winner.windows))
    assert winner.loss_nats == pytest.approx(measured["it"].loss_nats, abs=1e-6)
    none = contest.of(NONE)
    assert none.behind_nats == pytest.approx(
        study.losses(cut, on=study.held_out.first(none.windows))["cut"].loss_nats
        - study.losses(cut, {"it": repairs}, on=study.held_out.first(none.windows))["it"].loss_nats
        + winner.behind_nats,
        abs=2e-3,
    )


def test_layers_that_write_nothing_need_no_repair(
    byte_tokenizer: Any, some_text: list[str]
) -> None:
    model = make_tiny_llama(seed=3)
    for name, weight in model.model.layers[3].named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
    pruned = ghostlayers.prune(
        model, tokenizer=byte_tokenizer, data=some_text, remove="3", repair=AUTO, **TEXT
    )
    assert pruned.contest is not None
    assert pruned.contest.winner == pruned.recipe.repair == NONE
    assert list(pruned.evidence) == ["dense", "cut"]
    assert pruned.contest.dense_loss == pytest.approx(pruned.contest.of(NONE).loss_nats, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("choices", [{"engine": "llama.cpp"}, {"export": "fold", "repair": AUTO}])
def test_llama_cpp_gets_a_stock_checkpoint(
    choices: dict[str, str], trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    pruned = ghostlayers.prune(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, layers=2, **choices, **TEXT
    )
    assert pruned.contest is not None
    assert find_method(pruned.contest.winner).form == "fold"
    assert type(pruned.model) is type(trained_llama)
    assert pruned.contest.refused.keys() == OPERATORS


@pytest.mark.slow
def test_what_costs_too_much_is_left_out(study: Study) -> None:
    contest, _ = hold_contest(study.with_choices(overhead="0%"), (Span(3, 5),))
    assert find_method(contest.winner).form == "fold"
    assert "--overhead" in contest.refused["ghost:ridge=auto"]
    whole, _ = hold_contest(study.with_choices(overhead="100%"), (Span(3, 5),))
    assert not whole.refused


@pytest.mark.slow
def test_several_gaps_have_the_same_repair(study: Study) -> None:
    dear = study.with_choices(overhead="100%")
    cut = dear.choose_repair(dear.choose(remove="2,5"))
    assert cut.contest is not None
    assert cut.repairs is not None
    assert {repair.method for repair in cut.repairs.values()} == {cut.contest.winner}
    assert list(cut.repairs) == [Span(2, 3), Span(5, 6)]
    whole = products_of_layers(study.dense, cut.spans)
    assert cut.contest.of("linearpatch-diag").overhead == pytest.approx(2 * 48**2 / whole)


@pytest.mark.parametrize(
    ("family", "span", "left_out"),
    [
        ("gemma3_text", Span(2, 3), {"joint:x+z:ridge=auto", "piecewise:8:z:ridge=auto"}),
        ("llama", Span(0, 1), {n for n in CONTESTANTS if find_method(n).reach}),
    ],
)
def test_what_a_family_or_a_cut_has_no_place_for_is_left_out(
    family: str, span: Span, left_out: set[str]
) -> None:
    recipe = Recipe(repair=AUTO, layers=1, overhead="100%")
    names, refused = contestants(DenseModel(build(family)), recipe, (span,))
    assert refused.keys() == left_out
    assert NONE in names


def test_too_little_text_leaves_out_what_solves_for_more(trained_llama: Any) -> None:
    recipe = Recipe(repair=AUTO, layers=1, windows=1, sequence_length=60)
    names, refused = contestants(DenseModel(trained_llama), recipe, (Span(3, 5),))
    assert "ghost:ridge=auto" in names  # 48 unknowns
    assert "joint:x+z:ridge=auto" in refused  # 144
    assert "--fit-windows" in refused["joint:x+z:ridge=auto"]


def test_it_is_planned_as_more_than_one_repair(trained_llama: Any, byte_tokenizer: Any) -> None:
    how = {"tokenizer": byte_tokenizer, "remove": "3-4", "output": None, **TEXT}
    one, many = (plan(trained_llama, repair=name, **how) for name in ("ghost", AUTO))
    names = [line.name for line in many.lines]
    assert f"Fitting {len(CONTESTANTS)} repairs" in names
    assert f"Racing {len(CONTESTANTS)} repairs" in names
    assert many.flops > one.flops


# Asking for it


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"engine": "llama.cpp", "repair": "ghost"}, "--for llama.cpp"),
        ({"overhead": "2%", "repair": "ghost"}, "'overhead' is for repair 'auto'"),
        ({"overhead": "much"}, "'overhead' must be a share such as 2%"),
        ({"overhead": "101%"}, "'overhead' must be a share such as 2% or 0.02, from 0 to 1"),
        ({"repair": AUTO, "export": "custom"}, "--export custom"),
        ({"repair": AUTO, "export": "stock-layer"}, "--export stock-layer"),
        ({"repair": AUTO, "iterative": True, "refit": "none"}, "nothing left to choose"),
        (
            {"engine": "llama.cpp", "iterative": True, "select": "magnitude"},
            "Name one instead",
        ),
        ({"repair": AUTO, "iterative": True, "select": "magnitude"}, "it scores weights alone"),
        ({"repair": AUTO, "held_out_windows": 0, "remove": "1"}, "'auto' measures losses"),
        ({"engine": "llama"}, "'engine' must be one of any, transformers, vllm, llama.cpp"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(values: dict[str, Any], told: str) -> None:
    given = values if "remove" in values else {"layers": 1, **values}
    with pytest.raises(RecipeError, match=re.escape(told)):
        Recipe.from_dict(given)


def test_asking_for_an_engine_leaves_the_repair_to_the_contest() -> None:
    assert Recipe.from_dict({"engine": "vllm", "layers": 1}).repair == AUTO
    assert Recipe.from_dict({"overhead": "0.5%", "layers": 1}).most_overhead == 0.005
    assert Recipe.from_dict({"engine": "vllm", "layers": 1, "repair": "ghost"}).repair == "ghost"
    assert Recipe.from_dict({"layers": 1}).repair == "ghost"


def test_a_race_of_repairs_may_use_as_many_windows_as_one_of_spans() -> None:
    assert Recipe(remove="1", repair=AUTO).num_race_windows == Recipe(layers=1).num_race_windows
    assert Recipe(remove="1").num_race_windows == Recipe(remove="1").num_held_out_windows


def test_a_comparison_takes_it_for_an_engine_that_there_is() -> None:
    with pytest.raises(RecipeError, match="behind 'auto:' stands what must load the result"):
        Comparison(layers=(1,), repair=("auto:llama",), eval_data=("a.txt",))


@pytest.mark.slow
def test_a_comparison_measures_what_it_chooses(
    study: Study, some_text: list[str], tmp_path: Path
) -> None:
    """The rows of `auto` are those of the repair that `prune` would take."""
    evaluated = tmp_path / "some.txt"
    evaluated.write_text("\n\n".join(some_text[:12]))
    asked = Comparison.from_dict(
        {"layers": (2,), "select": ("streamline",), "repair": ("none", "auto", "auto:llama.cpp"),
         "eval_data": (str(evaluated),), "max_windows": 2, "yardstick": False, "speed": False,
         "prompt": "", "continuations": 0, "data": "given", **TEXT}
    )  # fmt: skip
    found = compare(study.dense, asked, tmp_path / "out", data=some_text)
    losses = {cell["repair"]: cell["loss_nats"] for cell in found["cells"]}
    for name, engine in (("auto", "any"), ("auto:llama.cpp", "llama.cpp")):
        named = study.with_choices(layers=2, select="streamline", engine=engine)
        cut = named.choose_repair(named.choose())
        assert cut.repairs is not None
        measured = named.losses(cut, {"it": cut.repairs}, on=str(evaluated), max_windows=2)
        assert losses[name] == pytest.approx(measured["it"].loss_nats, abs=1e-9)
        (model,) = [each for each in found["models"] if each["repair"] == name]
        assert {gap["method"] for gap in model["gaps"]} == {cut.recipe.repair}
        stock = find_method(cut.recipe.repair).form == "fold"
        assert model["checkpoint"] == ("stock" if stock else "custom")


@pytest.fixture(scope="module")
def made(tiny_folder: Path, some_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint by the command line, from a recipe in a file, and what the screen said."""
    place = tmp_path_factory.mktemp("auto")
    (place / "text.txt").write_text("\n\n".join(some_text))
    recipe = {
        "command": "prune", "model": str(tiny_folder), "output": str(place / "out"), "layers": 2,
        "data": str(place / "text.txt"), "repair": "auto", "for": "llama.cpp", "overhead": "1%",
        **TEXT,
    }  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = CliRunner().invoke(app, ["run", str(place / "recipe.yaml")])
    assert told.exit_code == 0, told.output
    return place, told.output


def test_screen_record_and_card_name_the_winner_the_reason_and_the_runner_up(made: Any) -> None:
    place, told = made
    record = json.loads((place / "out" / "ghostlayers.json").read_text())
    contest, recipe = record["contest"], record["recipe"]
    assert contest["winner"] == recipe["repair"] == contest["contestants"][0]["repair"]
    assert recipe["engine"] == "llama.cpp"
    assert f"Repair: {contest['winner']}, because " in " ".join(told.split())
    (line,) = contest_lines(record)
    card = (place / "out" / "README.md").read_text()
    assert line in card
    assert f"`{contest['runner_up']}`" in line
    assert "choice between the best candidates was made on them" in card


def test_a_gguf_file_is_for_llama_cpp(tiny_folder: Path, made: Any) -> None:
    place, _ = made
    told = CliRunner().invoke(
        app,
        ["prune", str(tiny_folder), "-o", str(place / "x.gguf"), "--layers", "2", "--for", "vllm",
         "--data", str(place / "text.txt")],
    )  # fmt: skip
    assert told.exit_code == 2
    assert "a file for llama.cpp" in " ".join(told.output.split())


# One that cannot be fitted


@pytest.mark.slow
def test_a_repair_that_cannot_be_fitted_is_left_out_by_name(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, repair=AUTO, remove="3-4", **TEXT
    )
    whole = study.choose_repair(study.choose()).contest
    broken = find_method(whole.winner)

    def fails(*_: Any, **__: Any) -> Any:
        raise SingularError("the normal equations have no solution.")

    monkeypatch.setattr(type(broken), "fit", fails)
    fell = {name for name in CONTESTANTS if isinstance(find_method(name), type(broken))}
    contest = study.choose_repair(study.choose()).contest
    left = [each for each in whole.contestants if each.repair not in fell]
    assert fell <= contest.refused.keys()
    assert all("no solution" in contest.refused[name] for name in fell)
    assert {each.repair for each in contest.contestants} == {each.repair for each in left}
    assert contest.winner not in fell


def test_where_nothing_can_be_fitted_that_is_said(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(
        trained_llama, tokenizer=byte_tokenizer, data=some_text, repair=AUTO, remove="3-4", **TEXT
    )

    def fails(*_: Any, **__: Any) -> Any:
        raise SingularError("the normal equations have no solution.")

    for name in CONTESTANTS:
        if name != NONE:
            monkeypatch.setattr(type(find_method(name)), "fit", fails)
    with pytest.raises(SingularError, match="no solution"):
        study.choose_repair(study.choose())
