"""Every repair against an oracle; one table, every method."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ghostlayers import moments
from ghostlayers.calibration import Fitting
from ghostlayers.errors import (
    InputError,
    InsufficientTokensError,
    NonFiniteError,
    RecipeError,
    SingularError,
)
from ghostlayers.repairs import METHODS, FitOptions, Repair, find_method
from ghostlayers.repairs.hadamard import hadamard

HIDDEN = 12


def stream(count: int = 400, hidden: int = HIDDEN, seed: int = 0) -> Tensor:
    """Tokens with channels of very different size, as real streams have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 3, hidden, dtype=torch.float64)
    return torch.randn(count, hidden, generator=generator, dtype=torch.float64) * scale


def noise(x: Tensor, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*x.shape, generator=generator, dtype=torch.float64)


def fit(name: str, x: Tensor, y: Tensor, *, relative: bool = False, **options: float) -> Repair:
    fitting = Fitting(
        find_method(name),
        FitOptions(**options),
        relative_weights=relative,
        stored_dtype=torch.float64,
    )
    return fitting.fit(fitting.update_tokens(None, x, y))


def planted(name: str, hidden: int = HIDDEN) -> Tensor:
    """An operator M of the method's own family."""
    generator = torch.Generator().manual_seed(11)
    d = 0.5 + torch.rand(hidden, generator=generator, dtype=torch.float64)
    basis = hadamard(hidden) if name == "linearpatch-hadamard" else torch.eye(hidden).double()
    if name == "none":
        return torch.zeros(hidden, hidden, dtype=torch.float64)
    if name.startswith("linearpatch"):
        return basis @ torch.diag(d) @ basis.T - torch.eye(hidden, dtype=torch.float64)
    return 0.2 * torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)


TABLE = list(METHODS)


@pytest.mark.parametrize("name", TABLE)
def test_an_operator_of_the_methods_own_family_is_recovered(name: str) -> None:
    x, m = stream(), planted(name)
    repair = fit(name, x, x + x @ m, ridge=0.0)
    if repair.delta is None:
        assert name == "none"
        return
    torch.testing.assert_close(repair.delta, m, rtol=1e-7, atol=1e-9)
    assert repair.relative_residual < 1e-12


@pytest.mark.parametrize("name", TABLE)
def test_residual_is_that_of_the_data(name: str) -> None:
    x = stream()
    y = x + 0.3 * noise(x) + x @ planted("ghost") * 0.1
    repair = fit(name, x, y)
    delta = torch.zeros(HIDDEN, HIDDEN).double() if repair.delta is None else repair.delta
    direct = (y - x - x @ delta).square().sum() / (y - x).square().sum()
    assert repair.relative_residual == pytest.approx(float(direct), rel=1e-8)
    assert repair.num_tokens == 400


@pytest.mark.parametrize("name", TABLE)
def test_ghost_leaves_the_least_on_its_own_tokens(name: str) -> None:
    x = stream()
    y = x + 0.3 * noise(x) * x.std(0) + x @ planted("ghost") * 0.3
    best = fit("ghost", x, y, ridge=0.0).relative_residual
    assert best <= fit(name, x, y).relative_residual + 1e-12
    assert best < 1.0


def test_ghost_is_least_squares() -> None:
    x = stream()
    y = x + noise(x)
    want = torch.linalg.lstsq(x, y - x, driver="gelsd").solution
    torch.testing.assert_close(fit("ghost", x, y, ridge=0.0).delta, want, rtol=1e-8, atol=1e-12)


def test_relative_weights_are_weighted_least_squares() -> None:
    x = stream()
    y = x + noise(x)
    root = 1 / y.norm(dim=1, keepdim=True)
    want = torch.linalg.lstsq(root * x, root * (y - x), driver="gelsd").solution
    got = fit("ghost", x, y, relative=True, ridge=0.0).delta
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def literal_ghost(x: Tensor, y: Tensor) -> Tensor:
    """The paper, written out: (X'X + 1e-6 I) M = X'(Y - X) in float64."""
    x, y = x.double(), y.double()
    eps = 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(x.T @ x + eps, x.T @ (y - x))


def literal_linearpatch(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """H diag(mean|YH| / mean|XH|) H' - I, channel by channel."""
    xh, yh = x.double() @ h, y.double() @ h
    d = [float(yh[:, k].abs().mean() / xh[:, k].abs().mean()) for k in range(h.shape[0])]
    return h @ torch.diag(torch.tensor(d).double()) @ h.T - torch.eye(h.shape[0]).double()


def test_ghost_as_published() -> None:
    x = stream()
    y = x + noise(x)
    got = fit("ghost", x, y, ridge=0.0, absolute_ridge=1e-6).delta
    torch.testing.assert_close(got, literal_ghost(x, y), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("hidden", [12, 20, 28, 36, 64])
def test_linearpatch_as_published(hidden: int) -> None:
    x = stream(hidden=hidden)
    y = x + noise(x)
    got = fit("linearpatch-hadamard", x, y).delta
    torch.testing.assert_close(got, literal_linearpatch(x, y, hadamard(hidden)))
    got = fit("linearpatch-diag", x, y).delta
    torch.testing.assert_close(got, literal_linearpatch(x, y, torch.eye(hidden).double()))


def test_a_large_ridge_leaves_the_stream_alone() -> None:
    x = stream()
    assert fit("ghost", x, x + noise(x), ridge=1e12).delta.abs().max() < 1e-8


def test_a_relative_ridge_does_not_depend_on_the_scale_of_the_stream() -> None:
    x = stream()
    y = x + noise(x)
    a = fit("ghost", x, y, ridge=1e-2).delta
    torch.testing.assert_close(fit("ghost", 1e4 * x, 1e4 * y, ridge=1e-2).delta, a)


def test_a_dead_channel_is_left_alone() -> None:
    x = stream()
    x[:, 3] = 0.0
    y = x + noise(x)
    y[:, 3] = 0.0
    for name in ("ghost", "linearpatch-diag"):
        delta = fit(name, x, y).delta
        assert torch.isfinite(delta).all()
        assert not delta[3].any()


def test_one_enormous_token_does_not_take_the_weighted_fit() -> None:
    x = stream()
    y = x + x @ planted("ghost")
    y[0] = 1e7 * noise(x)[0]
    good = planted("ghost")

    def error(delta: Tensor) -> float:
        return float((x[1:] @ (delta - good)).norm() / (x[1:] @ good).norm())

    assert error(fit("ghost", x, y, relative=True).delta) < 0.05
    assert error(fit("ghost", x, y).delta) > 1.0


def test_condition_number_is_that_of_the_scaled_gram_matrix() -> None:
    x = stream()
    unit = x / x.norm(dim=0)
    want = torch.linalg.cond(unit.T @ unit)
    got = fit("ghost", x, x + noise(x), ridge=0.0).condition_number
    assert got == pytest.approx(float(want), rel=1e-6)


def test_operators_are_rounded_as_they_will_be_stored() -> None:
    x = stream()
    fitting = Fitting(find_method("ghost"), stored_dtype=torch.bfloat16)
    delta = fitting.fit(fitting.update_tokens(None, x, x + noise(x))).delta
    assert delta.dtype is torch.float64
    torch.testing.assert_close(delta, delta.to(torch.bfloat16).double(), rtol=0, atol=0)


def test_too_few_tokens() -> None:
    x = stream(count=HIDDEN - 1)
    with pytest.raises(InsufficientTokensError, match="11 calibration tokens cannot fit a map of"):
        fit("ghost", x, x + noise(x))


def test_singular_without_a_ridge() -> None:
    x = stream()
    x[:, 1] = x[:, 0]
    y = x + noise(x)
    with pytest.raises(SingularError, match=r"singular at ridge 0 .* raise --ridge to 1e-6"):
        fit("ghost", x, y, ridge=0.0)
    assert torch.isfinite(fit("ghost", x, y).delta).all()


def test_non_finite_moments() -> None:
    sums = moments.update(moments.empty(HIDDEN, HIDDEN), stream(), stream(seed=1))
    broken = dataclasses.replace(sums, cross=sums.cross * float("nan"))
    with pytest.raises(NonFiniteError):
        find_method("ghost").fit(broken, FitOptions())


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 192, 576, 640, 768, 896, 1152, 2560])
def test_hadamard_matrices_are_orthogonal_and_flat(size: int) -> None:
    h = hadamard(size)
    torch.testing.assert_close(h @ h.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(
        h.abs(), torch.full((size, size), size**-0.5).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", [3, 6, 52, 100])
def test_a_size_without_hadamard_matrix_names_sizes_that_work(size: int) -> None:
    with pytest.raises(InputError, match=rf"order {size} .* such as \d+ and \d+\."):
        hadamard(size)


def test_the_largest_published_sizes_can_be_built() -> None:
    for size in (3584, 4096, 5120):
        row = hadamard(size)[1]
        assert abs(float(row @ hadamard(size)[2])) < 1e-12


def test_unknown_repair_suggests_a_near_one() -> None:
    with pytest.raises(RecipeError, match=r"unknown repair 'gost'\. Did you mean 'ghost'\?"):
        find_method("gost")
