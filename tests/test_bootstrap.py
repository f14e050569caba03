"""The paired bootstrap against a literal loop, a closed form, and planted differences."""

import math

import pytest
import torch

from ghostlayers.errors import InputError
from ghostlayers.evaluation import Answers, paired_bootstrap
from ghostlayers.statistics import bootstrap


def answers(values: list[float], first: int = 0) -> Answers:
    names = tuple(f"document {first + i}" for i in range(len(values)))
    return Answers(names, tuple(float(value) for value in values))


def random_answers(count: int, share: float, seed: int) -> Answers:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return answers((drawn < share).double().tolist())


def two_tasks(seed: int) -> dict[str, Answers]:
    return {"x": random_answers(30, 0.6, seed), "y": random_answers(50, 0.4, seed + 1)}


@pytest.mark.parametrize("at_once", [2**22, 97])
def test_it_is_a_literal_loop_over_resamples(monkeypatch, at_once: int) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", at_once)
    a, b = two_tasks(1), two_tasks(3)
    result = paired_bootstrap(a, b, samples=200, seed=7)

    generator = torch.Generator().manual_seed(7)
    by_task = []
    for task in ("x", "y"):
        differences = [p - q for p, q in zip(a[task].values, b[task].values, strict=True)]
        means = []
        for _ in range(200):
            total = 0.0
            for _ in differences:
                total += differences[
                    int(torch.randint(len(differences), (1,), generator=generator))
                ]
            means.append(total / len(differences))
        by_task.append(means)
    resampled = [(x + y) / 2 for x, y in zip(*by_task, strict=True)]
    mean = sum(resampled) / 200
    variance = sum((value - mean) ** 2 for value in resampled) / 199
    ordered = sorted(resampled)

    def percentile(share: float) -> float:
        place = share * 199
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])

    assert result.error == pytest.approx(math.sqrt(variance))
    assert result.low == pytest.approx(percentile(0.025))
    assert result.high == pytest.approx(percentile(0.975))
    sign = math.copysign(1, result.difference)
    other = sum(sign * value <= 0 for value in resampled)
    assert result.p_value == pytest.approx(min(1.0, 2 * other / 200))
    assert (result.num_documents, result.samples) == (80, 200)


def test_the_difference_is_the_plain_mean_over_tasks() -> None:
    a = {"x": answers([1, 1, 0, 0]), "y": answers([1] * 10)}
    b = {"x": answers([0, 0, 0, 0]), "y": answers([1] * 9 + [0])}
    assert paired_bootstrap(a, b, samples=10).difference == pytest.approx((0.5 + 0.1) / 2)


def test_the_error_is_the_closed_form() -> None:
    a, b = random_answers(400, 0.7, 0), random_answers(400, 0.6, 1)
    differences = torch.tensor(a.values) - torch.tensor(b.values)
    expected = float(differences.double().std(correction=0)) / math.sqrt(400)
    result = paired_bootstrap({"x": a}, {"x": b}, samples=20_000)
    assert result.error == pytest.approx(expected, rel=0.03)  # five errors of the estimate
    assert result.low == pytest.approx(result.difference - 1.96 * expected, abs=0.2 * expected)
    assert result.high == pytest.approx(result.difference + 1.96 * expected, abs=0.2 * expected)


def test_a_model_does_not_differ_from_itself() -> None:
    result = paired_bootstrap(two_tasks(0), two_tasks(0), samples=100)
    assert (result.difference, result.error, result.low, result.high) == (0, 0, 0, 0)
    assert result.p_value == 1


def planted(fixed: int) -> tuple[dict[str, Answers], dict[str, Answers]]:
    """The same answers on 1,000 documents, of which the first model has some more right."""
    weaker = list(random_answers(1000, 0.6, 0).values)
    wrong = [i for i, value in enumerate(weaker) if value == 0][:fixed]
    better = [1.0 if i in wrong else value for i, value in enumerate(weaker)]
    return {"x": answers(better)}, {"x": answers(weaker)}


def test_a_small_difference_between_alike_models_is_seen() -> None:
    better, weaker = planted(12)  # 1.2 points, less than the error of either accuracy
    result = paired_bootstrap(better, weaker)
    alone = math.sqrt(0.6 * 0.4 / 1000)
    assert result.difference == pytest.approx(0.012)
    assert result.difference < alone
    assert result.error < alone / 4
    assert result.p_value < 0.01
    assert result.low > 0


def test_the_other_way_round_is_the_negative() -> None:
    better, weaker = planted(12)
    there, back = paired_bootstrap(better, weaker), paired_bootstrap(weaker, better)
    assert back.difference == -there.difference
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p_value == there.p_value


def test_no_difference_is_seen_where_there_is_none() -> None:
    p_values = []
    for seed in range(20):
        a, b = random_answers(300, 0.5, 2 * seed), random_answers(300, 0.5, 2 * seed + 1)
        p_values.append(paired_bootstrap({"x": a}, {"x": b}, samples=1000).p_value)
    assert sum(p < 0.05 for p in p_values) <= 4  # of 20; more has a chance of 0.3 %


def test_plain_values_hold_every_field() -> None:
    result = paired_bootstrap(two_tasks(0), two_tasks(2), samples=10)
    assert result.to_dict() == vars(result)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ({}, {}, "other tasks (none; none)"),
        ({"x": answers([1])}, {"y": answers([1])}, "other tasks (x; y)"),
        ({"x": answers([1])}, {"x": answers([1, 0])}, "task 'x' differ (1 and 2"),
        ({"x": answers([1])}, {"x": answers([1], first=5)}, "task 'x' differ (1 and 1"),
        ({"x": answers([])}, {"x": answers([])}, "task 'x' differ (0 and 0"),
    ],
)
def test_answers_that_do_not_pair_are_refused(a, b, text: str) -> None:
    with pytest.raises(InputError) as caught:
        paired_bootstrap(a, b)
    assert text in str(caught.value)


def test_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="'samples' must be at least 1, got 0"):
        paired_bootstrap(two_tasks(0), two_tasks(0), samples=0)
