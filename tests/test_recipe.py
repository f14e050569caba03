"""Recipes: what is refused, what the paper's preset means, and that they travel unchanged."""

import dataclasses
import json

import pytest

from ghostlayers import PRESETS
from ghostlayers.errors import RecipeError, SpanError
from ghostlayers.preparation import make_recipe
from ghostlayers.presets import find_preset
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import METHODS


def message(**choices):
    with pytest.raises(RecipeError) as caught:
        Recipe(**choices)
    return str(caught.value)


# Unknown keys and names


@pytest.mark.parametrize(
    ("key", "near"),
    [("layer", "layers"), ("fit_window", "fit_windows"), ("cosine", "cosine_axis")],
)
def test_an_unknown_key_suggests_a_near_one(key, near):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({key: 1})
    known = ", ".join(sorted(field.name for field in dataclasses.fields(Recipe)))
    assert str(caught.value) == (
        f"unknown key '{key}' in a recipe. Did you mean '{near}'? Known: {known}."
    )


def test_a_key_like_no_other_gets_the_list_only():
    with pytest.raises(RecipeError, match=r"unknown key 'xyzzy' in a recipe\. Known: absolute_r"):
        Recipe.from_dict({"xyzzy": 1})


def test_an_unknown_selection_suggests_a_near_one():
    assert message(select="streamlined") == (
        "unknown selection 'streamlined'. Did you mean 'streamline'? "
        "Known: angular, lorp, magnitude, perplexity, recoverable, shortgpt, streamline, taylor."
    )


def test_an_unknown_repair_suggests_a_near_one():
    assert message(repair="ghosts") == (
        "unknown repair 'ghosts'. Did you mean 'ghost'? Known: " + ", ".join(sorted(METHODS)) + "."
    )


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("cosine_axis", "hidden, tokens"),
        ("refit", "all, none"),
        ("sampling", "grid, random, single-document"),
        ("inputs", "repaired, original"),
        ("token_weight", "auto, uniform, balanced, relative"),
        ("bos", "auto, always, never"),
    ],
)
def test_an_unknown_choice_lists_all(name, allowed):
    assert message(**{name: "sideways"}) == (f"'{name}' must be one of {allowed}, got 'sideways'.")


# Wrong types and numbers


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layers", "7", "int or NoneType"),
        ("layers", 7.0, "int or NoneType"),
        ("layers", True, "int or NoneType"),
        ("remove", [1, 2], "str or NoneType"),
        ("windows", None, "int"),
        ("windows", 12.5, "int"),
        ("seed", "0", "int"),
        ("ridge", "1e-6", "int or float"),
        ("ridge", False, "int or float"),
        ("bos", None, "str"),
        ("separator", 3, "str"),
        ("iterative", 1, "bool"),
        ("iterative", "yes", "bool"),
    ],
)
def test_a_wrong_type_is_refused(name, value, expected):
    assert message(**{name: value}) == f"'{name}' must be {expected}, got {value!r}."


@pytest.mark.parametrize("name", ["windows", "fit_windows", "search_windows", "sequence_length"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_must_be_positive(name, value):
    assert message(**{name: value}) == f"'{name}' must be at least 1, got {value}."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("held_out_windows", -1),
        ("ridge", -1e-9),
        ("absolute_ridge", -1),
        ("ridge", float("nan")),
    ],
)
def test_numbers_that_must_not_be_negative(name, value):
    assert message(**{name: value}) == f"'{name}' must not be negative, got {value}."


def test_a_whole_number_does_for_a_ridge():
    assert Recipe(ridge=0, absolute_ridge=1).absolute_ridge == 1


# Contradictions


def test_layers_and_remove_contradict_each_other():
    assert message(layers=2, remove="1-2") == (
        "give either the number of layers or which to remove, not both."
    )


def test_a_fit_or_a_search_may_read_more_windows_than_the_scores():
    assert Recipe(windows=8).num_calibration_windows == 8
    assert Recipe(windows=8, fit_windows=9).num_calibration_windows == 9
    assert Recipe(windows=8, fit_windows=9, search_windows=12).num_calibration_windows == 12


def test_a_race_may_use_four_times_the_held_out_windows_unless_told_otherwise():
    assert Recipe(layers=2, held_out_windows=5).num_race_windows == 32
    assert Recipe(layers=2, held_out_windows=10).num_race_windows == 40
    assert Recipe(layers=2, held_out_windows=5, race_windows=9).num_race_windows == 9
    assert Recipe(layers=2, held_out_windows=5, race_windows=1).num_race_windows == 5
    assert Recipe(layers=2, held_out_windows=5, select="shortgpt").num_race_windows == 5
    assert Recipe(remove="1", held_out_windows=5).num_race_windows == 5


@pytest.mark.parametrize("text", ["", "first", "first:", "middle:2", "first:1,first:2", "last:-1"])
def test_edges_that_cannot_be_read_are_refused(text):
    with pytest.raises(RecipeError, match="expected numbers of layers such as first:4,last:2"):
        _ = Recipe(keep_layers=text)


def test_edges_are_read():
    assert Recipe().kept_edges is None
    assert Recipe(keep_layers="last:2").kept_edges == (0, 2)
    assert Recipe(keep_layers=" first:4 , last:2").kept_edges == (4, 2)


@pytest.mark.parametrize("select", ["recoverable", "recoverable:greedy"])
def test_recoverable_needs_held_out_windows(select):
    assert message(layers=2, select=select, held_out_windows=0) == (
        "'recoverable' measures losses: 'held_out_windows' must be at least 1."
    )


@pytest.mark.parametrize("choice", [{"remove": "3"}, {"layers": 1, "select": "streamline"}])
def test_others_do_without(choice):
    assert Recipe(**choice, held_out_windows=0).num_held_out_windows == 0


def test_iterative_contradicts_named_layers():
    assert message(remove="1-2", iterative=True) == (
        "'iterative' chooses layers one at a time, but 'remove' names them all; drop one of the "
        "two."
    )


@pytest.mark.parametrize(
    ("select", "why"),
    [
        ("perplexity", "it measures the model anew after every removed layer already"),
        ("recoverable:greedy", "it measures the model anew after every removed layer already"),
        ("lorp", "it shares all layers out among clusters at once, and ranks no single layer"),
    ],
)
def test_what_cannot_be_iterated_says_why(select, why):
    assert message(layers=2, select=select, iterative=True).startswith(
        f"'{select}' cannot be combined with 'iterative': {why}. Drop 'iterative', or take "
    )


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("perplexity:oneshot", "'perplexity:oneshot': unknown argument 'oneshot'. Did you mean"),
        ("streamline:x", "'streamline:x': unknown argument 'x'. It takes none."),
        ("lorp:k=two", "'lorp:k=two': the number of clusters k must be a whole number from 1"),
        ("taylor:", "cannot read the selection 'taylor:'"),
    ],
)
def test_arguments_of_selections_that_mean_nothing(select, expected):
    assert message(select=select).startswith(expected)


# Numbers that depend on others


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 8), ({"windows": 5}, 5), ({"search_windows": 50}, 50)]
)
def test_search_windows_by_default(given, expected):
    assert Recipe(**given).num_search_windows == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 32), ({"windows": 12}, 12), ({"fit_windows": 50}, 50)]
)
def test_fit_windows_by_default(given, expected):
    assert Recipe(**given).num_fit_windows == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 8), ({"windows": 12}, 4), ({"windows": 320}, 20), ({"held_out_windows": 1}, 1)],
)
def test_held_out_windows_by_default(given, expected):
    assert Recipe(**given).num_held_out_windows == expected


# Named layers


def test_named_layers_are_parsed():
    assert Recipe(remove="10-12,14").removed() == [10, 11, 12, 14]
    assert Recipe(layers=2).removed() is None


def test_named_layers_that_cannot_be_read_are_refused():
    with pytest.raises(SpanError, match="cannot read 'x'"):
        Recipe(remove="x").removed()


# The paper's preset


def test_the_paper_preset():
    assert PRESETS["ghosted"].choices == {
        "select": "streamline",
        "repair": "ghost:per=layer",
        "cosine_axis": "tokens",
        "keep_layers": "first:1,last:1",
        "inputs": "original",
        "token_weight": "uniform",
        "ridge": 0.0,
        "absolute_ridge": 1e-6,
        "windows": 128,
        "fit_windows": 32,
        "sequence_length": 2048,
        "data": "c4",
        "sampling": "single-document",
        "bos": "never",
        "seed": 0,
    }
    assert find_preset("paper") is PRESETS["ghosted"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_recipe(preset):
    choices = PRESETS[preset].choices
    recipe = Recipe.from_dict({"preset": preset, "layers": 7})
    assert {name: getattr(recipe, name) for name in choices} == choices
    assert recipe.preset == preset


# Values that do not change


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().layers = 3


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(layers=7),
        Recipe(remove="1-2,5", select="shortgpt", separator=" ", seed=11, ridge=0),
        Recipe.from_dict({"preset": "paper", "layers": 3}),
    ],
    ids=["defaults", "layers", "removed", "paper"],
)
def test_a_recipe_survives_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_choices_replace_fields_of_a_recipe_and_leave_it_unchanged():
    base = Recipe(layers=2, seed=5)
    made = make_recipe(base, {"layers": 3})
    assert (made.layers, made.seed, base.layers) == (3, 5, 2)


def test_choices_alone_make_a_recipe():
    assert make_recipe(None, {"remove": "1"}) == Recipe(remove="1")


def test_choices_that_contradict_the_recipe_are_refused():
    with pytest.raises(RecipeError, match="not both"):
        make_recipe(Recipe(layers=2), {"remove": "1"})
