"""Products from slices are as exact as float64's, on streams like those of real models."""

from fractions import Fraction

import pytest
import torch

from ghostlayers.repairs import FitOptions
from ghostlayers.repairs.solve import solve_ridge
from ghostlayers.statistics import moments
from ghostlayers.statistics.moments import Accumulator
from ghostlayers.statistics.products import (
    BITS,
    MOST_PIECES,
    ROWS_PER_BLOCK,
    add_product,
    blocks_of_rows,
    cut,
    slow_at_float64,
)


def stream(
    rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Channels of sizes from 1e-3 to 1e3 that depend on one another; a massive activation."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator)
    mixed = base @ torch.randn(width, width, generator=generator) / width**0.5
    mixed[:, width // 2 :] = mixed[:, : width - width // 2] + 1e-4 * base[:, width // 2 :]
    mixed *= torch.logspace(-3, 3, width)
    mixed[0, 1] *= 3e3
    return mixed.to(dtype)


def add_all(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """A'B over blocks of rows, as the sums of a fit do."""
    for rows in blocks_of_rows(a.shape[0]):
        left = cut(a[rows])
        add_product(total, left, left if a is b else cut(b[rows]))


def exact(a: torch.Tensor, b: torch.Tensor) -> list[list[Fraction]]:
    """A'B in rational numbers."""
    left = [[Fraction(float(v)) for v in column] for column in a.T]
    right = [[Fraction(float(v)) for v in column] for column in b.T]
    return [[sum(x * y for x, y in zip(p, q, strict=True)) for q in right] for p in left]


def error(got: torch.Tensor, want: list[list[Fraction]], scale: torch.Tensor) -> float:
    """The largest error, each entry relative to the norms of its two columns."""
    return max(
        abs(float(Fraction(float(got[i, j])) - value)) / float(scale[i, j])
        for i, row in enumerate(want)
        for j, value in enumerate(row)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_float64(dtype: torch.dtype) -> None:
    a, b = stream(300, 6, dtype), stream(300, 5, dtype, seed=1)
    got = torch.zeros(6, 5, dtype=torch.float64)
    add_all(got, a, b)
    norms = a.double().norm(dim=0)[:, None] * b.double().norm(dim=0)[None, :]
    want = exact(a, b)
    theirs = error(a.double().T @ b.double(), want, norms)
    assert error(got, want, norms) <= max(2 * theirs, 1e-15)
    plain = error((a.float().T @ b.float()).double(), want, norms)
    assert plain > 1e-9  # what float32 alone would do


@pytest.mark.parametrize("rows", [1, ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK, 3 * ROWS_PER_BLOCK + 7])
def test_all_rows_count_and_totals_are_added_to(rows: int) -> None:
    a = stream(rows, 8)
    total = torch.full((8, 8), 2.0, dtype=torch.float64)
    add_all(total, a, a)
    want = a.double().T @ a.double() + 2
    assert torch.allclose(total, want, rtol=1e-14, atol=1e-14 * float(want.abs().max()))
    assert torch.allclose(total, total.T, rtol=1e-14)


def test_pieces_are_small_whole_numbers_and_make_up_the_matrix() -> None:
    matrix = stream(50, 7)
    slices = cut(matrix)
    scale, pieces = slices.scale, slices.pieces
    made = sum(p.double() * 2.0 ** (-BITS * (i + 1)) for i, p in enumerate(pieces)) * scale
    assert len(pieces) <= MOST_PIECES
    assert float((made - matrix.double()).abs().max() / matrix.abs().max()) < 2.0**-50
    for piece in pieces:
        assert torch.equal(piece, piece.round())
        assert float(piece.abs().max()) < 2**BITS


def test_short_numbers_take_few_pieces() -> None:
    assert len(cut(torch.arange(-64.0, 64.0)[:, None]).pieces) == 1
    assert len(cut(torch.arange(-200.0, 200.0)[:, None]).pieces) == 2
    assert len(cut(torch.zeros(4, 3)).pieces) == 1


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30, 3e38])
def test_numbers_near_the_ends_of_float32(size: float) -> None:
    a = torch.tensor([[size, 1.0], [size / 2, -size]])
    total = torch.zeros(2, 2, dtype=torch.float64)
    add_all(total, a, a)
    assert torch.allclose(total, a.double().T @ a.double(), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("kind", ["uniform", "balanced", "relative"])
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_a_repair_from_slices_is_the_repair(kind: moments.TokenWeight, ridge: float) -> None:
    """On a stream whose equilibrated Gram matrix has a condition number of 1e8."""
    x = stream(600, 24)
    y = x + 0.3 * stream(600, 24, seed=2)
    weights = moments.token_weights(y, kind)
    found = []
    for split in (False, True):
        sums = Accumulator((("x", 24),), 24, split=split)
        sums.add(x, y, [x], weights)
        found.append(sums.moments())
    gram = found[0].gram
    equilibrated = gram / gram.diagonal().sqrt()[:, None] / gram.diagonal().sqrt()[None, :]
    assert float(torch.linalg.cond(equilibrated)) > 1e8
    assert found[1].num_tokens == found[0].num_tokens
    assert found[1].total_weight == pytest.approx(found[0].total_weight)
    assert found[1].target_energy == pytest.approx(found[0].target_energy, rel=1e-6)
    # Weights may be rounded, features not: that would be 6e-8.
    lengths = found[1].gram.diagonal().sqrt()
    if kind == "uniform":
        assert float(((found[1].gram - gram) / lengths[:, None] / lengths).abs().max()) < 1e-13
    else:
        rounded = weights.double().sqrt().float().double().square()  # type: ignore[union-attr]
        wanted = (x.double() * rounded[:, None]).T @ x.double()
        assert float(((found[1].gram - wanted) / lengths[:, None] / lengths).abs().max()) < 1e-13
    deltas = [solve_ridge(each, FitOptions(ridge=ridge)) for each in found]
    residuals = [
        float(
            ((y - x).double() - x.double() @ delta).square().sum(dim=1)
            @ (torch.ones(600) if weights is None else weights).double()
        )
        for delta in deltas
    ]
    assert residuals[1] == pytest.approx(residuals[0], rel=1e-6)
    assert float((deltas[0] - deltas[1]).norm() / deltas[0].norm()) < 1e-3


def test_processors_keep_to_float64() -> None:
    assert not slow_at_float64(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "slow"),
    [((8, 0), False), ((9, 0), False), ((8, 9), True), ((12, 0), True), ((7, 5), True)],
)
def test_cards_are_known_by_their_capability(
    capability: tuple[int, int], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert slow_at_float64(torch.device("cuda")) == slow
