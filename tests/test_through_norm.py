"""Refitting a projection together with the norm behind it."""

import copy
from itertools import product
from typing import Any

import pytest
import torch

from families import build
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps, fit_many
from ghostlayers.calibration.passes import Runner
from ghostlayers.errors import InputError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import FitOptions
from ghostlayers.repairs.through_norm import ChannelSums, Writing, whitened
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from oracles import CUTS, fitted, left_behind, logits, random_windows, token_ids

NORMED = ("exaone4", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3")


def test_a_planted_projection_and_gain_are_recovered() -> None:
    """Where all channels of what should be written are alike in norm(z V), in one solve."""
    width = 8
    z = torch.tensor(list(product([-1.0, 1.0], repeat=width)))
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
    was = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
    gain = 0.5 + torch.rand(width, generator=generator).double()
    wanted = Writing(turn, 0.0).normalised(z).double() * gain
    features = Writing(was, 0.0).scaled(z).double()
    weights = torch.rand(len(z), generator=generator)
    root = weights.double().sqrt()[:, None]
    solution = torch.linalg.lstsq(features * root, wanted * root).solution
    sums = ChannelSums(width)
    sums.add(wanted, torch.zeros_like(wanted), wanted, weights)
    writing = Writing(whitened(solution, sums.power, float(weights.double().sum())), 0.0)
    last = ChannelSums(width)
    last.add(wanted, writing.normalised(z), wanted, weights)
    written = writing.normalised(z).double() * last.gain
    assert (written - wanted).norm() < 0.1 * wanted.norm()  # the weights make channels unlike
    even = ChannelSums(width)
    even.add(wanted, torch.zeros_like(wanted), wanted, None)
    solution = torch.linalg.lstsq(features, wanted).solution
    writing = Writing(whitened(solution, even.power, len(z)), 0.0)
    last = ChannelSums(width)
    last.add(wanted, writing.normalised(z), wanted, None)
    torch.testing.assert_close(writing.weight, turn, rtol=0, atol=1e-6)
    torch.testing.assert_close(last.gain, gain, rtol=1e-5, atol=0)
    assert last.left < 1e-9 * last.discrepancy


def test_the_gain_is_the_regression_of_every_channel_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    wanted, made, change = (torch.randn(50, 3, generator=generator).double() for _ in range(3))
    made[:, 2] = 0.0
    weights = torch.rand(50, generator=generator).double()
    sums = ChannelSums(3)
    for rows in (slice(0, 20), slice(20, 50)):
        sums.add(wanted[rows], made[rows], change[rows], weights[rows])
    left = 0.0
    for channel in range(3):
        r, n = wanted[:, channel], made[:, channel]
        bottom = float((weights * n * n).sum())
        gain = float((weights * n * r).sum()) / bottom if bottom else 0.0
        assert float(sums.gain[channel]) == pytest.approx(gain, rel=1e-12)
        left += float((weights * (r - gain * n) ** 2).sum())
    assert sums.left == pytest.approx(left, rel=1e-12)
    assert sums.discrepancy == pytest.approx(float((weights[:, None] * change**2).sum()), rel=1e-12)


def test_a_channel_to_which_nothing_should_be_written_gets_nothing() -> None:
    weight = whitened(torch.ones(4, 2).double(), torch.tensor([8.0, 0.0]).double(), 2.0)
    assert weight.tolist() == [[0.5, 0.0]] * 4


def literal(dense: Any, span: Span, ridge: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """V, c and what is left, from hooks and stored activations, relative token weights."""
    layer = find_decoder_layers(dense)[span.start - 1]
    norm = layer.get_submodule(DenseModel(dense).anatomy.mlp_post_norm or "")
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].flatten(0, 1).double())

    layers = find_decoder_layers(dense)
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(keep("z")),
        norm.register_forward_hook(lambda _, __, out: seen.update(u=out.flatten(0, 1).double())),
        layers[span.start].register_forward_pre_hook(keep("x")),
        layers[span.stop].register_forward_pre_hook(keep("y")),
    ]
    logits(dense, random_windows().input_ids)
    for handle in handles:
        handle.remove()
    z, x, y = seen["z"], seen["x"], seen["y"]
    wanted = seen["u"] + y - x
    root = 1 / y.norm(dim=1, keepdim=True)
    size = ((root * wanted).square().sum(dim=0) / root.square().sum()).sqrt()
    eps = dense.config.rms_norm_eps
    weight = layer.mlp.down_proj.weight.detach().T.double()
    for _ in range(2):
        features = root * z / ((z @ weight).square().mean(dim=1, keepdim=True) + eps).sqrt()
        scale = features.norm(dim=0)
        unit = features / scale
        gram = unit.T @ unit + ridge * torch.eye(z.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, unit.T @ (root * wanted)) / scale[:, None]
        weight = solution / size
    made = z @ weight
    made = made / (made.square().mean(dim=1, keepdim=True) + eps).sqrt()
    gain = torch.stack(
        [
            torch.linalg.lstsq(root * made[:, [k]], root * wanted[:, [k]]).solution[0, 0]
            for k in range(wanted.shape[1])
        ]
    )
    left = (root * (wanted - gain * made)).square().sum() / (root * (y - x)).square().sum()
    return weight, gain, float(left)


@pytest.mark.parametrize("name", NORMED)
def test_a_refit_through_the_norm_is_the_literal_recipe(name: str) -> None:
    dense, span = build(name), Span(2, 4)
    (repair,) = fitted(dense, "refit:1", (span,)).values()
    weight, gain, left = literal(dense, span, 1e-4)
    (fold,) = repair.folds
    was = find_decoder_layers(dense)[1].mlp.down_proj.weight.detach().T.double()
    assert fold.gain is not None
    torch.testing.assert_close(was + fold.delta, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fold.gain, gain, rtol=1e-3, atol=1e-5)
    assert repair.relative_residual == pytest.approx(left, rel=1e-3)
    assert left < 0.9


@pytest.mark.parametrize("repair", ["refit:1", "refit:3"])
@pytest.mark.parametrize("name", NORMED)
def test_the_residual_told_is_what_the_repaired_stream_leaves(name: str, repair: str) -> None:
    dense, span = build(name), Span(3, 5)
    (fit,) = (repairs := fitted(dense, repair, (span,))).values()
    assert fit.relative_residual == pytest.approx(left_behind(dense, repairs, span)[0], rel=1e-3)
    assert [fold.layers_back for fold in fit.folds] == list(range(int(repair[-1]), 0, -1))


@pytest.mark.parametrize("cut", ["middle", "last", "two gaps"])
@pytest.mark.parametrize("name", NORMED)
def test_what_is_measured_is_what_is_built(name: str, cut: str) -> None:
    dense, spans = build(name), CUTS[cut]
    before = copy.deepcopy(dense.state_dict())
    repairs = fitted(dense, "refit:2", spans)
    built = removal.prune_layers(DenseModel(dense), spans, repairs)
    layerwise = DenseModel(dense)
    batch, stream = layerwise.begin(token_ids())
    ready = Cut(layerwise, repairs)
    for layer in range(ready.fork):
        stream = layerwise.run_layer(layer, batch, stream)
    want = layerwise.logits(batch, ready.run(batch, stream))
    assert torch.equal(logits(built, token_ids()), want)
    assert not torch.allclose(
        logits(removal.prune_layers(DenseModel(dense), spans), token_ids()), want
    )
    assert type(built) is type(dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.slow
def test_fitted_beside_others_it_is_what_it_is_alone() -> None:
    dense, spans = build("gemma3_text"), CUTS["two gaps"]
    names = ("ghost", "refit:1", "refit:2:ridge=auto", "none")
    fittings = {name: Fitting(find_method(name), FitOptions(ridge=1e-4)) for name in names}
    layerwise = DenseModel(dense)
    together = fit_many(Runner(layerwise), random_windows(), spans, fittings)
    for name, fitting in fittings.items():
        alone = fit_gaps(Runner(layerwise, 3), random_windows(), spans, fitting)
        for span in spans:
            one, other = alone[span], together[name][span]
            assert one.relative_residual == pytest.approx(other.relative_residual, rel=1e-6)
            for a, b in zip(one.folds, other.folds, strict=True):
                torch.testing.assert_close(a.delta, b.delta, rtol=1e-4, atol=1e-6)
                assert a.gain is not None
                torch.testing.assert_close(a.gain, b.gain, rtol=1e-5, atol=1e-7)


def test_a_norm_that_is_not_the_last_word_is_found_out() -> None:
    """A layer that changes the norm's output, or adds to what comes into it."""
    dense = build("gemma3_text")
    assert DenseModel(dense).anatomy.mlp_post_norm == "post_feedforward_layernorm"

    def doubled(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return 2.0 * output

    for place in ("post_feedforward_layernorm", "mlp"):
        changed = copy.deepcopy(dense)
        for layer in changed.model.layers:
            layer.get_submodule(place).register_forward_hook(doubled)
        anatomy = DenseModel(changed).anatomy_or_reason
        assert not isinstance(anatomy, str)
        assert anatomy.mlp_post_norm is None
        with pytest.raises(InputError, match=r"no linear map can be folded into it"):
            fitted(changed, "refit:1", CUTS["middle"])


def test_what_cannot_go_through_the_norm_is_told_of_what_can() -> None:
    with pytest.raises(InputError, match=r"'joint:x\+z' .* or refit, which fits that norm too"):
        fitted(build("olmo2"), "joint:x+z", CUTS["middle"])
