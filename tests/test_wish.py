"""Budgets as they are typed: what is read, and what is refused by name."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostlayers.errors import RecipeError
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.wish import (
    DETAILS,
    HOW_MANY,
    bytes_in,
    factor_in,
    nats_in,
    place_in,
    share_in,
)

quick = settings(deadline=None)
plain = st.decimals(min_value=0, max_value=10**6, allow_nan=False, places=3)
blanks = st.sampled_from(["", " ", "  "])


@quick
@given(plain, blanks, blanks)
def test_percentages_below_a_hundred_are_shares(number: Any, before: str, between: str) -> None:
    text = f"{before}{number}{between}%"
    if 0 < number < 100:
        assert share_in(text) == pytest.approx(float(number) / 100)
    else:
        with pytest.raises(RecipeError, match="--smaller"):
            share_in(text)


@quick
@given(plain, st.sampled_from(["", "x", "X", " x"]))
def test_factors_above_one_are_speeds(number: Any, sign: str) -> None:
    text = f"{number}{sign}"
    if number > 1:
        assert factor_in(text) == pytest.approx(float(number))
    else:
        with pytest.raises(RecipeError, match="--faster"):
            factor_in(text)


@quick
@given(st.text(max_size=12))
def test_anything_else_is_refused_and_nothing_breaks(text: str) -> None:
    for read in (share_in, factor_in, bytes_in):
        try:
            value = read(text)
        except RecipeError:
            continue
        assert 0 < value < math.inf
    try:
        batch, length = place_in(text)
    except RecipeError:
        return
    assert min(batch, length) >= 1


@quick
@given(st.floats())
def test_losses_are_positive_and_finite(value: float) -> None:
    if 0 < value < math.inf:
        assert nats_in(value) == value
    else:
        with pytest.raises(RecipeError, match="--max-loss"):
            nats_in(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("6GB", 6 * 10**9), ("6 gib", 6 * 2**30), ("1.5gb", 15 * 10**8)],
)
def test_sizes_mean_the_same_in_any_case(text: str, size: int) -> None:
    assert bytes_in(text) == size


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"smaller": "0.2"}, "--smaller 0.2: is that a share or a percentage?"),
        ({"smaller": "0%"}, "above 0% and below 100%, such as 20%, got '0%'"),
        ({"smaller": "100%"}, "got '100%'"),
        ({"smaller": "nan%"}, "got 'nan%'"),
        ({"smaller": "-5%"}, "got '-5%'"),
        ({"faster": "1x"}, "a number above 1 such as 1.25x, got '1x'"),
        ({"faster": "1e400x"}, "got '1e400x'"),
        ({"faster": "inf"}, "got 'inf'"),
        ({"faster": "25%"}, "a quarter faster is 1.25x, not 25%"),
        ({"fits": "-6GiB"}, "--fits: '-6GiB' is no size; expected one such as 4GiB or 500MB."),
        ({"fits": "nanGiB"}, "--fits: 'nanGiB' is no size"),
        ({"fits": "1e400GiB"}, "--fits: '1e400GiB' is no size"),
        ({"max_loss": 0.0}, "--max-loss: expected nats a token above the dense model"),
        ({"max_loss": float("nan")}, "got nan"),
        ({"max_loss": 0.1, "held_out_windows": 3}, "4 of them at the least"),
        ({"layers": 2, "smaller": "20%"}, "--layers and --smaller are given"),
        ({"remove": "3", "fits": "1GiB"}, "--remove and --fits are given"),
        ({"faster": "2x", "max_loss": 0.1}, "--faster and --max-loss are given"),
        ({"smaller": "5%", "at": "1x8"}, "--at belongs to --faster, which is not given"),
        ({"layers": 1, "as_type": "q8_0"}, "--as belongs to --fits, which is not given"),
        ({"fits": "1GiB", "as_type": "q9"}, "--as: the size of a model in 'q9' is not known"),
        ({"fits": "1GiB", "as_type": "Q8_0"}, "no place for the operators of 'ghost'"),
        ({"faster": "2x", "at": "512"}, "--at: expected sequences at a time and tokens"),
        ({"faster": "2x", "at": "0x512"}, "--at: expected sequences"),
        ({"fits": "1GiB", "context": 0}, "'context' must be at least 1"),
    ],
)
def test_a_recipe_refuses_by_name(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**choices)
    assert said in str(caught.value)


def test_budgets_survive_a_record() -> None:
    recipe = Recipe(fits="6GiB", context=8192, as_type="q4_k_m", repair="refit:1")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert str(recipe.wish) == "--fits 6GiB"
    assert str(Recipe(max_loss=0.1).wish) == "--max-loss 0.1"
    assert Recipe(layers=2).wish is None
    assert {*HOW_MANY, *DETAILS} <= recipe.to_dict().keys()


def test_a_budget_of_loss_is_settled_and_reported_on_the_same_windows() -> None:
    recipe = Recipe(max_loss=0.1, windows=32)
    assert recipe.num_held_out_windows == recipe.num_race_windows == 32
    assert Recipe(max_loss=0.1, held_out_windows=9).num_race_windows == 9


def test_a_type_means_the_same_in_any_case() -> None:
    for name in ("Q4_K_M", "q4_K_m", "FLOAT32"):
        asked = Recipe(fits="1GiB", as_type=name, repair="refit:3:ridge=auto")
        assert asked.as_type == name.lower()


def test_a_loss_of_hundreds_of_digits_is_refused() -> None:
    with pytest.raises(RecipeError, match="--max-loss: expected nats"):
        Recipe(max_loss=10**400)
