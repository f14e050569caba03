"""Every repair against an oracle; one table, every method."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.gathering import HELD_OUT_SHARE, Gatherer, Layout, gathered_features
from ghostlayers.errors import (
    InputError,
    InsufficientTokensError,
    NonFiniteError,
    RecipeError,
    SingularError,
)
from ghostlayers.modeling import unit_rms
from ghostlayers.repairs import ALL, METHODS, FitOptions, Repair, condition, find_method
from ghostlayers.repairs.base import Evidence, Needs
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.repairs.piecewise import PRIORS, choose_prior, common_directions, spherical_kmeans
from ghostlayers.repairs.solve import RIDGES, choose_ridge, regress, solve_ridge
from ghostlayers.statistics.moments import TokenWeight, token_weights
from oracles import literal_ghost

HIDDEN = 12
WIDE = 20
"""Channels of z and of phi."""


def stream(count: int = 400, hidden: int = HIDDEN, seed: int = 0) -> Tensor:
    """Tokens with channels of very different size, as real streams have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 3, hidden, dtype=torch.float64)
    return torch.randn(count, hidden, generator=generator, dtype=torch.float64) * scale


def noise(x: Tensor, seed: int = 5) -> Tensor:
    return random(*x.shape, seed=seed)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def output_projection() -> Tensor:
    """The last kept layer's MLP output projection as a row map."""
    return random(WIDE, HIDDEN, seed=21)


def features_of(x: Tensor) -> dict[str, Tensor]:
    """Everything that a repair can regress on, the stream being x."""
    hidden = x.shape[1]
    # z goes into x as a layer's output does, so the two are correlated.
    z = random(len(x), WIDE, seed=22) + 0.1 * x @ random(hidden, WIDE, seed=23) / 1e3
    return {
        "x": x,
        "norm": unit_rms(x, 1e-6).double(),
        "z": z,
        "m": z @ random(WIDE, hidden, seed=21),
        "o": random(len(x), hidden, seed=24),
        "phi": torch.relu(x @ random(hidden, WIDE, seed=25) / 1e3),
        "one": x.new_ones(len(x), 1),
    }


def gather(x: Tensor, y: Tensor, needs: Needs, weight: TokenWeight = "uniform") -> Evidence:
    read = features_of(x)
    centroids = {count: common_directions(x, count) for count in needs.pieces}
    widths = {name: feature.shape[1] for name, feature in read.items()}
    layout = Layout(widths, -(-len(x) // 40), 40, x.dtype)
    gatherer = Gatherer(needs, layout, token_weight=weight, centroids=centroids)
    for first, part in enumerate(torch.arange(len(x)).split(40)):
        gatherer.add(
            first, x[part], y[part], {name: feature[part] for name, feature in read.items()}
        )
    return gatherer.evidence(1e-6, (random(WIDE, x.shape[1], seed=21), None))


def fit(
    name: str, x: Tensor, y: Tensor, weight: TokenWeight = "uniform", **options: float
) -> Repair:
    method = find_method(name)
    fitting = Fitting(method, FitOptions(**options), stored_dtype=torch.float64)
    return fitting.fit(gather(x, y, method.needs, weight))


def predict(repair: Repair, x: Tensor) -> Tensor:
    """The stream after a repair, folds first, from the formula of each part."""
    read = features_of(x)
    stream = x.clone()
    for fold in repair.folds:
        stream = stream + read["z"] @ fold.delta
        if fold.bias is not None:
            stream = stream + fold.bias
    stream = stream * repair.scale
    if repair.operator is None:
        return stream
    return repair.operator.apply(stream, lambda name: read[name])


def family_member(name: str, x: Tensor) -> Tensor:
    """A stream after the gap that the method can reach exactly."""
    read = features_of(x)
    d = 0.5 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    matrix = 0.2 * random(HIDDEN, HIDDEN, seed=12)
    base = name.split(":")[0]
    if base == "none":
        return x.clone()
    if base == "magnitude":
        return 1.7 * x
    if base in {"linearpatch-diag", "diagonal"}:
        return x * d
    if base in {"linearpatch-hadamard", "hadamard"}:
        return x @ hadamard(HIDDEN) @ torch.diag(d) @ hadamard(HIDDEN).T
    if base == "symmetric":
        return x + x @ (matrix + matrix.T)
    if base == "procrustes":
        return 1.3 * x @ torch.linalg.qr(matrix).Q
    if base == "replaceme":
        return x + read["m"] @ matrix
    if base == "refit":
        return x + read["z"] @ random(WIDE, HIDDEN, seed=13)
    if base == "normed":
        return x + read["norm"] @ matrix
    if base == "joint":
        maps = {
            n: 0.2 * random(read[n].shape[1], HIDDEN, seed=14)
            for n in name.split(":")[1].split("+")
        }
        return x + sum(read[n] @ weight for n, weight in maps.items())
    if "rank" in name:
        return x + x @ random(HIDDEN, 3, seed=15) @ random(3, HIDDEN, seed=16)
    if base == "piecewise":
        count = int(name.split(":")[1])
        unit = torch.nn.functional.normalize(x, dim=1)
        nearest = (unit @ common_directions(x, count).double().T).argmax(dim=1)
        maps = 0.2 * random(count, HIDDEN, HIDDEN, seed=17)
        return x + torch.einsum("th,thk->tk", x, maps[nearest])
    return x + x @ matrix + (3.0 if "affine" in name else 0.0)


DESCENDED = {"replaceme:cosine", "replaceme:cosine:accurate", "replaceme:cosine-from-ls"}
OF_THEIR_OWN = {"refit:2", "refit:3", "ghost:rank=64", *DESCENDED}
TABLE = [
    *(name for name in ALL if name not in OF_THEIR_OWN),
    "ghost:rank=3",
    "ghost:rank=3:affine",
    "ghost:ridge=1e-9",
]


@pytest.mark.parametrize("name", TABLE)
def test_an_operator_of_the_methods_own_family_is_recovered(name: str) -> None:
    x = stream()
    y = family_member(name, x)
    tuned = name if "piecewise" not in name else f"{name}:prior=1"
    repair = fit(tuned, x, y, ridge=0.0)
    scale = (y - x).norm(dim=0) + 1e-9
    # A prior of one token in 400 is all that keeps the pieces from their own maps.
    bound = 0.2 if "piecewise" in name else 1e-5
    assert float(((predict(repair, x) - y) / scale).abs().max()) < bound
    assert repair.relative_residual < (1e-2 if "piecewise" in name else 1e-8)


@pytest.mark.parametrize("name", [*TABLE, "refit:2", "refit:3"])
def test_evidence_is_used_up_only_by_its_last_fit(name: str) -> None:
    x = stream()
    y = x + 0.3 * noise(x) + 0.1 * family_member("ghost", x)
    method = find_method(name)
    fitting = Fitting(method, FitOptions(), stored_dtype=torch.float64)
    evidence, untouched = (gather(x, y, method.needs) for _ in range(2))
    first, again = fitting.fit(evidence), fitting.fit(evidence)
    assert torch.equal(evidence.moments.gram, untouched.moments.gram)
    assert torch.equal(evidence.moments.cross, untouched.moments.cross)
    last = fitting.fit(evidence, last=True)
    for repair in (again, last):
        assert torch.equal(predict(repair, x), predict(first, x))
        assert repair.relative_residual == first.relative_residual
        assert repair.condition_number == first.condition_number


@pytest.mark.parametrize("weight", ["uniform", "balanced", "relative"])
@pytest.mark.parametrize("name", TABLE)
def test_residual_is_that_of_the_data(name: str, weight: TokenWeight) -> None:
    x = stream()
    y = x + 0.3 * noise(x) + 0.1 * family_member("ghost", x)
    repair = fit(name, x, y, weight)
    w = token_weights(y, weight)
    w = torch.ones(len(x), dtype=torch.float64) if w is None else w
    left = ((y - predict(repair, x)).square().sum(dim=1) * w).sum()
    whole = ((y - x).square().sum(dim=1) * w).sum()
    assert repair.relative_residual == pytest.approx(float(left / whole), rel=1e-5)
    assert repair.num_tokens == 400


CONTAINED = (
    ("none", "magnitude*"),
    ("magnitude*", "diagonal"),
    ("linearpatch-diag", "diagonal"),
    ("linearpatch-hadamard", "hadamard"),
    ("diagonal", "symmetric"),
    ("hadamard", "symmetric"),
    ("symmetric", "ghost"),
    ("procrustes", "ghost"),
    ("ghost:rank=3", "ghost"),
    ("ghost", "ghost:affine"),
    ("replaceme", "refit:1"),
    ("replaceme", "joint:x+m"),
    ("joint:x+m", "joint:x+z"),
    ("refit:1", "joint:x+z"),
    ("ghost", "joint:x+z"),
    ("ghost", "joint:x+norm"),
    ("normed", "joint:x+norm"),
    ("ghost", "joint:x+phi"),
    ("joint:x+z", "joint:x+o+z"),
    ("joint:o+z", "joint:x+o+z"),
    ("ghost:affine", "joint:x+z+one"),
    ("ghost", "piecewise:4:prior=1"),
)
"""Pairs of families of which the second contains the first."""


@pytest.mark.parametrize(("smaller", "larger"), CONTAINED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_family_never_leaves_more_than_one_that_it_contains(
    smaller: str, larger: str, seed: int
) -> None:
    """With ridge 0 and equal token weights, on the tokens of the fit (the ordering theorem)."""
    x = stream(seed=seed)
    y = x + noise(x, seed=seed + 5) * x.std(0) + 0.3 * family_member("joint:x+z+phi", x)

    def residual(name: str) -> float:
        if name == "magnitude*":  # the fitted scalar, which the published ratio approximates
            d = y - x
            step = float((x * d).sum() / x.square().sum())
            return float((d - step * x).square().sum() / d.square().sum())
        return fit(name, x, y, ridge=0.0).relative_residual

    assert residual(larger) <= residual(smaller) + 1e-10


def test_refit_with_a_bias_in_the_projection() -> None:
    x = stream()
    read = features_of(x)
    y = x + read["z"] @ random(WIDE, HIDDEN, seed=13) + 2.0
    evidence = dataclasses.replace(
        gather(x, y, Needs(("z", "one"))), mlp_bias=torch.zeros(HIDDEN, dtype=torch.float64)
    )
    repair = find_method("refit").fit(evidence, FitOptions(ridge=0.0))
    (fold,) = repair.folds
    torch.testing.assert_close(fold.bias, torch.full((HIDDEN,), 2.0).double())
    torch.testing.assert_close(predict(repair, x), y)


def test_the_mlp_output_is_made_from_its_activations() -> None:
    x = stream()
    y = x + noise(x)
    direct = gather(x, y, Needs(("x", "m")))
    assert gathered_features(Needs(("x", "m", "z"))) == ("x", "z", "one")
    made = gather(x, y, Needs(("x", "m", "z"))).select(("x", "m"))
    torch.testing.assert_close(made.moments.gram, direct.select(("x", "m")).moments.gram)
    torch.testing.assert_close(made.moments.cross, direct.select(("x", "m")).moments.cross)


def test_the_cosine_objective_lowers_the_cosine_distance() -> None:
    x = features_of(stream(2000))["norm"] * 3
    y = x + 0.5 * features_of(x)["m"] + noise(x)

    def distance(name: str) -> float:
        predicted = predict(fit(name, x, y), x)
        return float((1 - torch.nn.functional.cosine_similarity(predicted, y)).mean())

    assert distance("replaceme:cosine-from-ls") < distance("replaceme") < distance("none")
    assert distance("replaceme:cosine:accurate") < distance("none")  # from the identity


@pytest.mark.parametrize("one_map", [True, False])
def test_held_out_tokens_choose_the_prior_that_a_search_finds(one_map: bool) -> None:
    x = features_of(stream(1000))["norm"]
    y = family_member("ghost" if one_map else "piecewise:4", x)
    y = y + 0.1 * noise(x)
    evidence = gather(x, y, find_method("piecewise:4:prior=auto").needs)
    pieces, options = evidence.pieces[4], FitOptions()

    batch = torch.arange(len(x)) // 40
    chooses = batch % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    nearest = (x @ pieces.centroids.double().T).argmax(dim=1)

    def held_out_error(prior: float) -> float:
        """From the tokens themselves."""
        at, d = x[~chooses], (y - x)[~chooses]
        whole = torch.linalg.lstsq(at, d).solution
        pulled = (prior / len(at)) ** 0.5 * at
        error = 0.0
        for piece in range(4):
            own = nearest[~chooses] == piece
            weight = torch.linalg.lstsq(
                torch.cat([at[own], pulled]), torch.cat([d[own], pulled @ whole])
            ).solution
            judged = chooses & (nearest == piece)
            error += float(((y - x)[judged] - x[judged] @ weight).square().sum())
        return error

    prior = choose_prior(pieces, evidence.select(("x",)), options)
    assert prior == min(PRIORS, key=held_out_error)
    assert (prior >= 8000) if one_map else (prior == min(PRIORS)), prior


def test_pieces_held_out_and_not_make_up_the_whole() -> None:
    x = stream()
    y = x + noise(x)
    with_auto = gather(x, y, find_method("piecewise:4:prior=auto").needs).pieces[4]
    without = gather(x, y, find_method("piecewise:4").needs).pieces[4]
    assert sum(part.num_tokens for part in with_auto.held_out) == 40  # the eighth batch of ten
    for whole, want in zip(with_auto.moments, without.moments, strict=True):
        assert whole.num_tokens == want.num_tokens
        torch.testing.assert_close(whole.gram, want.gram)
        torch.testing.assert_close(whole.cross, want.cross)


def test_solving_in_place_holds_three_matrices() -> None:
    """The Gram matrix becomes the factor, F'WD stays, the solution is the third."""
    x = stream()
    evidence = gather(x, x + noise(x), Needs())
    gram, cross = evidence.moments.gram, evidence.moments.cross.clone()
    solution = regress(evidence, FitOptions(), overwrite=True)
    assert gram.tril(-1).count_nonzero() == 0  # Cholesky's factor, transposed, lies in its place
    assert torch.equal(evidence.moments.cross, cross)
    assert solution.weight.T.is_contiguous()


def test_held_out_tokens_choose_the_ridge_that_a_search_finds() -> None:
    x, far = stream(60), stream(400, seed=3)
    matrix = 0.2 * random(HIDDEN, HIDDEN, seed=12)
    training = gather(x, x + x @ matrix + 30 * noise(x), Needs()).moments
    held_out = gather(far, far + far @ matrix, Needs()).moments

    def error(ridge: float) -> float:
        weight = solve_ridge(training, FitOptions(ridge=ridge))
        return float((far @ (weight - matrix)).square().sum())

    errors = {ridge: error(ridge) for ridge in RIDGES}
    got = choose_ridge(training, held_out, FitOptions())
    assert errors[got] == pytest.approx(min(errors.values()), rel=1e-6)
    assert errors[got] < 0.9 * max(errors.values())
    assert fit("ghost:ridge=auto", x, x + noise(x)).ridge in RIDGES


def test_clusters_are_those_that_were_planted() -> None:
    centres = torch.nn.functional.normalize(random(3, HIDDEN, seed=31), dim=1)
    labels = torch.arange(300) % 3
    tokens = (centres[labels] + 0.05 * random(300, HIDDEN, seed=32)) * (1 + labels[:, None])
    centroids = spherical_kmeans(tokens, 3).double()
    assert torch.allclose(
        (centres @ centroids.T).max(dim=1).values, torch.ones(3).double(), atol=5e-3
    )
    assert len((centroids @ centres.T).argmax(dim=1).unique()) == 3


def test_long_channels_do_not_decide_alone() -> None:
    """Groups that differ in small channels are found beside a large one that tells nothing."""
    centres = random(3, HIDDEN, seed=33)
    labels = torch.arange(300) % 3
    tokens = centres[labels] + 0.1 * random(300, HIDDEN, seed=34)
    tokens[:, 0] = 100.0 * random(300, seed=35).sign()

    def mixed(centroids: torch.Tensor) -> int:
        nearest = (tokens @ centroids.to(tokens.dtype).T).argmax(dim=1)
        return sum(len(nearest[labels == one].unique()) - 1 for one in range(3))

    assert mixed(common_directions(tokens, 3)) == 0
    assert mixed(spherical_kmeans(tokens, 3)) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gost", r"unknown repair 'gost'\. Did you mean 'ghost'\?"),
        ("ghost:rnk=3", r"unknown argument 'rnk'\. Did you mean 'rank'\?"),
        ("ghost:rank=0", r"rank must be a whole number from 1 to 100,000, got '0'"),
        ("ghost:ridge=-1", r"ridge must be auto or a number >= 0 \(and finite\), got '-1'"),
        ("ghost:weight=heavy", r"weight must be uniform, balanced or relative, got 'heavy'"),
        ("none:3", r"unknown argument '3'\. It takes none"),
        ("joint:x+q", r"unknown feature 'q'"),
        ("joint:x+x", r"names a feature twice"),
        ("piecewise:many", r"number of pieces must be a whole number"),
        ("refit:x", r"number of layers must be a whole number"),
        ("replaceme:adam", r"objective must be ls, cosine or cosine-from-ls, got 'adam'"),
        ("ghost::", r"cannot read the repair"),
    ],
)
def test_names_and_arguments_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_method(name)


def test_every_row_of_the_table_is_tested() -> None:
    tested: Sequence[str] = [name.split(":")[0] for name in TABLE]
    assert set(tested) == set(METHODS)


def test_ghost_is_least_squares() -> None:
    x = stream()
    y = x + noise(x)
    want = torch.linalg.lstsq(x, y - x, driver="gelsd").solution
    torch.testing.assert_close(fit("ghost", x, y, ridge=0.0).delta, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("weight", "power"), [("relative", 1.0), ("balanced", 0.5)])
def test_weights_are_weighted_least_squares(weight: TokenWeight, power: float) -> None:
    x = stream()
    y = x + noise(x)
    root = y.norm(dim=1, keepdim=True) ** -power
    want = torch.linalg.lstsq(root * x, root * (y - x), driver="gelsd").solution
    got = fit("ghost", x, y, weight, ridge=0.0).delta
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


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
    y = family_member("ghost", x)
    y[0] = 1e7 * noise(x)[0]
    good = 0.2 * random(HIDDEN, HIDDEN, seed=12)

    def error(delta: Tensor) -> float:
        return float((x[1:] @ (delta - good)).norm() / (x[1:] @ good).norm())

    assert error(fit("ghost", x, y, "relative").delta) < 0.05
    assert error(fit("ghost", x, y).delta) > 1.0


def test_condition_number_is_that_of_the_scaled_gram_matrix() -> None:
    x = stream()
    unit = x / x.norm(dim=0)
    want = torch.linalg.cond(unit.T @ unit)
    got = fit("ghost", x, x + noise(x), ridge=0.0).condition_number
    assert got == pytest.approx(float(want), rel=1e-6)


def spectrum_of(kind: str, n: int) -> torch.Tensor:
    """Eigenvalues like those of real streams, and harder ones."""
    return {
        "falling": torch.logspace(0, -8, n, dtype=torch.float64),
        "ridge": torch.logspace(0, -8, n, dtype=torch.float64).clamp_min(1e-6),
        "massive": torch.cat([torch.tensor([1e3]), torch.rand(n - 1) + 0.01]).double(),
        "flat": torch.ones(n, dtype=torch.float64),
        "linear": torch.linspace(1e-4, 1, n, dtype=torch.float64),
    }[kind]


@pytest.mark.parametrize("kind", ["falling", "ridge", "massive", "flat", "linear"])
@pytest.mark.parametrize("n", [40, condition.EXACT_UP_TO + 200])
def test_condition_numbers_from_a_factor(kind: str, n: int) -> None:
    torch.manual_seed(0)
    values = spectrum_of(kind, n)
    directions, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    factor = torch.linalg.cholesky(directions * values @ directions.T)
    want = float(values.max() / values.min())
    assert 0.9 * want <= condition.condition_number(factor) <= 1.001 * want


def test_operators_are_rounded_as_they_will_be_stored() -> None:
    x = stream()
    fitting = Fitting(find_method("ghost"), stored_dtype=torch.bfloat16)
    delta = fitting.fit(gather(x, x + noise(x), Needs())).delta
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
    evidence = gather(stream(), stream(seed=1), Needs())
    sums = evidence.moments
    broken = dataclasses.replace(
        evidence, moments=dataclasses.replace(sums, cross=sums.cross * float("nan"))
    )
    with pytest.raises(NonFiniteError):
        find_method("ghost").fit(broken, FitOptions())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 192, 576, 640, 768, 896, 1152, 2560])
def test_hadamard_matrices_are_orthogonal_and_flat(size: int) -> None:
    h = hadamard(size)
    torch.testing.assert_close(h @ h.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(
        h.abs(), torch.full((size, size), size**-0.5).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", [3, 6, 92, 100])
def test_a_size_without_hadamard_matrix_names_sizes_that_work(size: int) -> None:
    with pytest.raises(InputError, match=rf"order {size} .* such as \d+ and \d+\."):
        hadamard(size)


@pytest.mark.slow
def test_the_largest_published_sizes_can_be_built() -> None:
    for size in (3584, 4096, 5120):
        row = hadamard(size)[1]
        assert abs(float(row @ hadamard(size)[2])) < 1e-12
