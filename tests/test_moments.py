"""Moments against sums written out, and the properties that streaming rests on."""

import pytest
import torch

from ghostlayers.statistics import moments


def tokens(count: int, hidden: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
    return x, x + 0.3 * torch.randn(count, hidden, generator=generator, dtype=torch.float64)


def gather(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, split: int) -> moments.Moments:
    sums = moments.empty(x.shape[1], x.shape[1])
    for part in torch.arange(x.shape[0]).split(split):
        sums = moments.update(sums, x[part], y[part], weights=None if w is None else w[part])
    return sums


def assert_equal(a: moments.Moments, b: moments.Moments) -> None:
    assert a.num_tokens == b.num_tokens
    assert a.total_weight == pytest.approx(b.total_weight, rel=1e-12)
    assert a.target_energy == pytest.approx(b.target_energy, rel=1e-12)
    for name in ("gram", "cross", "abs_source", "abs_target"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_a_loop_over_tokens(weighted: bool) -> None:
    x, y = tokens(37)
    w = torch.linspace(0.1, 2.0, 37, dtype=torch.float64) if weighted else torch.ones(37).double()
    got = gather(x, y, w if weighted else None, 37)
    d = y - x
    gram = sum(w[t] * torch.outer(x[t], x[t]) for t in range(37))
    cross = sum(w[t] * torch.outer(x[t], d[t]) for t in range(37))
    torch.testing.assert_close(got.gram, gram)
    torch.testing.assert_close(got.cross, cross)
    assert got.target_energy == pytest.approx(float((w * (d * d).sum(1)).sum()))
    assert got.total_weight == pytest.approx(float(w.sum()))
    torch.testing.assert_close(got.abs_source, x.abs().sum(0))
    torch.testing.assert_close(got.abs_target, y.abs().sum(0))


@pytest.mark.parametrize("split", [1, 5, 36, 100])
def test_batch_size_does_not_matter(split: int) -> None:
    x, y = tokens(100)
    w = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_equal(gather(x, y, w, split), gather(x, y, w, 100))


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = tokens(100)
    whole = gather(x, y, None, 100)
    monkeypatch.setattr(moments, "TOKENS_PER_BLOCK", 7)
    assert_equal(gather(x, y, None, 100), whole)


def test_merge_is_addition_in_any_order() -> None:
    x, y = tokens(90)
    a, b, c = (gather(x[i : i + 30], y[i : i + 30], None, 30) for i in (0, 30, 60))
    assert_equal(moments.merge(moments.merge(a, b), c), gather(x, y, None, 90))
    assert_equal(moments.merge(c, moments.merge(b, a)), gather(x, y, None, 90))
    assert_equal(moments.merge(a, moments.empty(6, 6)), a)


def test_update_leaves_its_argument_alone() -> None:
    x, y = tokens(10)
    before = moments.empty(6, 6)
    moments.update(before, x, y)
    assert before.num_tokens == 0
    assert not before.gram.any()


def test_half_precision_streams_are_summed_in_float64() -> None:
    x, y = (each.to(torch.bfloat16) for each in tokens(500))
    assert_equal(gather(x, y, None, 50), gather(x.double(), y.double(), None, 500))


def test_wider_features_than_the_stream() -> None:
    x, y = tokens(40)
    features = torch.cat([x, x.square()], dim=1)
    got = moments.update(moments.empty(12, 6), x, y, features=features)
    torch.testing.assert_close(got.gram, features.T @ features)
    torch.testing.assert_close(got.cross, features.T @ (y - x))


@pytest.mark.parametrize("weighted", [False, True])
def test_residual_from_moments_is_the_residual_from_data(weighted: bool) -> None:
    x, y = tokens(64)
    w = moments.relative_weights(y) if weighted else torch.ones(64).double()
    m = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    direct = float((w * (y - x - x @ m).square().sum(1)).sum())
    assert moments.residual_energy(gather(x, y, w, 64), m) == pytest.approx(direct, rel=1e-10)


def test_relative_weights_of_a_zero_token_are_zero() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert moments.relative_weights(y).tolist() == [pytest.approx(1 / 25), 0.0]


def test_finished_sums_are_the_sums() -> None:
    """Without a copy, whether or not all products are asked for."""
    blocks = (("x", 400), ("z", 300))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 400, generator=generator)
    z = torch.randn(50, 300, generator=generator)
    for together in (None, [frozenset({"x"}), frozenset({"z"})]):
        sums = moments.Accumulator(blocks, 400, together=together)
        sums.add(x, x * 1.1, [x, z])
        copied, taken = sums.moments(), sums.finished()
        assert torch.equal(copied.gram.nan_to_num(-1.0), taken.gram.nan_to_num(-1.0))
        assert torch.equal(copied.cross, taken.cross)
        assert (taken.gram is sums._upper) == (together is None)
        again = sums.finished()
        assert torch.equal(again.gram.nan_to_num(-1.0), copied.gram.nan_to_num(-1.0))
