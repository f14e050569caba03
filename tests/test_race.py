"""The race: what its statistics promise, by simulation, and how it spends its windows."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from ghostlayers.statistics.race import FIRST_WINDOWS, Race, run_race, student_quantile

TIMES = 2000


def simulate(
    generator: torch.Generator, gaps: Sequence[float], windows: int, spread: float = 0.05
) -> tuple[Race, list[tuple[int, int, int]]]:
    """Candidates that truly lose so much more, on windows of very different difficulty."""
    hard = 0.5 * torch.randn(windows, generator=generator, dtype=torch.float64)
    noise = spread * torch.randn(len(gaps), windows, generator=generator, dtype=torch.float64)
    losses = 4.0 + hard + noise + torch.tensor(gaps, dtype=torch.float64)[:, None]
    asked = []

    def measure(names: Sequence[str], start: int, stop: int) -> Mapping[str, Tensor]:
        asked.append((len(names), start, stop))
        return {name: losses[int(name), start:stop] for name in names}

    return run_race([str(i) for i in range(len(gaps))], measure, windows), asked


@pytest.mark.slow
@pytest.mark.parametrize("windows", [8, 32])
def test_one_of_two_equals_is_seldom_given_up(windows: int) -> None:
    """At most three or four looks at 0.5 % each, and either of the two may lead."""
    generator = torch.Generator().manual_seed(0)
    left = sum(bool(simulate(generator, [0.0, 0.0], windows)[0].left) for _ in range(TIMES))
    assert 0 < left / TIMES < 0.05


@pytest.mark.slow
def test_the_best_of_six_seldom_leaves_and_mostly_wins() -> None:
    generator = torch.Generator().manual_seed(1)
    gaps = [0.0, 0.005, 0.02, 0.03, 0.2, 1.0]
    races = [simulate(generator, gaps, 32)[0] for _ in range(TIMES // 4)]
    assert sum("0" in race.left for race in races) / len(races) < 0.05
    regret = sum(gaps[int(race.best)] for race in races) / len(races)
    assert regret < 0.004
    assert all("5" in race.left for race in races)


@pytest.mark.slow
def test_more_windows_lower_the_regret() -> None:
    gaps = [0.0, 0.01, 0.02, 0.03]
    generator = torch.Generator().manual_seed(2)
    regrets = [
        sum(gaps[int(simulate(generator, gaps, n)[0].best)] for _ in range(TIMES // 4))
        for n in (4, 16, 64)
    ]
    assert regrets[0] > regrets[1] > regrets[2]


def test_the_leader_apart_ends_the_race_early() -> None:
    race, asked = simulate(torch.Generator().manual_seed(3), [0.0, 2.0, 2.0], 64)
    assert asked == [(3, 0, FIRST_WINDOWS)]
    assert race.best == "0"


def test_windows_double_and_no_window_is_measured_twice() -> None:
    race, asked = simulate(torch.Generator().manual_seed(4), [0.0, 0.0], 29, spread=0.0)
    assert [question[1:] for question in asked] == [(0, 4), (4, 8), (8, 16), (16, 29)]
    assert len(race.losses["0"]) == len(race.losses["1"]) == 29


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_too_few_windows_give_nobody_up_and_the_lowest_loss_wins(windows: int) -> None:
    race, _ = simulate(torch.Generator().manual_seed(5), [1.0, 0.0, 2.0], windows)
    assert race.best == "1"
    assert not race.left


def test_a_candidate_that_left_does_not_win_by_its_easy_windows() -> None:
    losses = {"stays": torch.tensor([3.0, 3.0, 5.0, 5.0]), "left": torch.tensor([3.5, 3.5])}
    race = Race(losses, frozenset({"left"}))
    assert race.best == "stays"
    assert race.behind("left") == (0.5, 0.0)


def test_a_lone_candidate_is_measured_once() -> None:
    race, asked = simulate(torch.Generator().manual_seed(6), [0.0], 32)
    assert asked == [(1, 0, FIRST_WINDOWS)]
    assert race.best == "0"


@pytest.mark.parametrize(
    ("p", "freedom", "want", "within"),
    [
        (0.995, 3, 5.841, 0.05),
        (0.995, 7, 3.499, 0.01),
        (0.995, 31, 2.744, 0.001),
        (0.975, 15, 2.131, 0.001),
        (0.5, 5, 0.0, 1e-12),
    ],
)
def test_students_quantile(p: float, freedom: int, want: float, within: float) -> None:
    """Against the printed table."""
    assert student_quantile(p, freedom) == pytest.approx(want, rel=within, abs=1e-12)
