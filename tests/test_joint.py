"""The fold of a joint repair: exact where its operator can be inverted, bounded where it cannot."""

import torch

from ghostlayers.repairs.joint import WEAKEST, _foldable

HIDDEN, WIDTH = 12, 20


def maps_with(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Maps whose W = I + M has these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    whole = left @ torch.diag(values) @ right
    z = torch.randn(WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
    return {"x": whole - torch.eye(HIDDEN, dtype=torch.float64), "z": z}


def whole_of(maps: dict[str, torch.Tensor]) -> torch.Tensor:
    return maps["x"] + torch.eye(HIDDEN, dtype=torch.float64)


def test_a_fold_in_front_of_a_sound_operator_is_exact() -> None:
    maps = maps_with(torch.linspace(0.5, 2.0, HIDDEN, dtype=torch.float64))
    carried, inverse = _foldable(maps)
    assert inverse is not None
    assert torch.allclose(inverse, torch.linalg.inv(whole_of(maps)), rtol=1e-10, atol=1e-12)
    assert torch.allclose(carried["z"], maps["z"], rtol=1e-10, atol=1e-12)
    assert torch.equal(carried["x"], maps["x"])


def test_directions_that_the_operator_suppresses_are_given_up() -> None:
    values = torch.ones(HIDDEN, dtype=torch.float64)
    values[-1] = 1e-5
    maps = maps_with(values)
    carried, inverse = _foldable(maps)
    assert inverse is not None
    assert float(torch.linalg.matrix_norm(inverse, ord=2)) <= 1.0 / WEAKEST
    assert torch.allclose(carried["z"], maps["z"] @ inverse @ whole_of(maps))
    lost = maps["z"] - carried["z"]
    assert int(torch.linalg.matrix_rank(lost, rtol=1e-6)) == 1  # that direction, and no other


def test_half_precision_survives_the_fold() -> None:
    """What bfloat16 makes of (x + z B') W is near x W + z B; with the exact inverse it is not."""
    values = torch.ones(HIDDEN, dtype=torch.float64)
    values[-1] = 1e-5
    maps = maps_with(values)
    carried, inverse = _foldable(maps)
    assert inverse is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, HIDDEN, generator=generator, dtype=torch.float64)
    z = torch.randn(100, WIDTH, generator=generator, dtype=torch.float64)
    want = x @ whole_of(maps) + z @ carried["z"]

    def error(fold: torch.Tensor) -> float:
        stream = (x + z @ fold).bfloat16().double()
        return float((stream @ whole_of(maps) - want).norm() / want.norm())

    assert error(maps["z"] @ inverse) < 0.05
    assert error(maps["z"] @ torch.linalg.inv(whole_of(maps))) > 1.0


def test_without_an_operator_nothing_is_inverted() -> None:
    maps = {"z": torch.ones(WIDTH, HIDDEN, dtype=torch.float64)}
    assert _foldable(maps) == (maps, None)
