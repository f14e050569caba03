"""Scores, fits and losses against slow transcriptions that use hooks and stored streams."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

import ghostlayers
from ghostlayers.calibration import cuts as measuring
from ghostlayers.calibration import fitting as fits
from ghostlayers.calibration import scoring
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.passes import Runner
from ghostlayers.repairs import FitOptions, find_method
from ghostlayers.repairs.base import Repair, linear
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.selection.births import NormProfile
from ghostlayers.spans import Span
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.tokens import Windows, make_windows
from oracles import literal_ghost, literal_streams

PAPER = FitOptions(ridge=0.0, absolute_ridge=1e-6)
GAPS = (Span(1, 3), Span(4, 5), Span(6, 7))


@pytest.fixture(scope="module")
def windows(byte_tokenizer: Any, some_text: list[str]) -> Windows:
    corpus = Corpus("text", tuple(some_text))
    return make_windows(corpus, byte_tokenizer, sequence_length=64, count=30, seed=0)


def flat_streams(model: Any, ids: Tensor, deltas: dict[Span, Tensor] | None = None) -> Tensor:
    """The stream at every boundary, [boundaries, tokens, hidden]."""
    return literal_streams(model, ids, deltas).flatten(1, 2)


def fitting(**changes: Any) -> Fitting:
    settings: dict[str, Any] = {
        "method": find_method("ghost"),
        "options": PAPER,
        "token_weight": "uniform",
        "repaired_inputs": False,
        "stored_dtype": torch.float64,
    }
    return Fitting(**{**settings, **changes})


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_ghost_as_published_on_trained_weights(layerwise: Any, windows: Windows) -> None:
    got = fits.fit_gaps(Runner(layerwise, 7), windows, GAPS, fitting())
    streams = flat_streams(layerwise.network, windows.input_ids)
    for span in GAPS:
        want = literal_ghost(streams[span.start], streams[span.stop])
        assert relative_error(got[span].delta, want) < 1e-6


@pytest.mark.parametrize("name", ["linearpatch-diag", "linearpatch-hadamard"])
def test_linearpatch_as_published_on_trained_weights(
    layerwise: Any, windows: Windows, name: str
) -> None:
    method = find_method(name)
    got = fits.fit_gaps(Runner(layerwise, 7), windows, GAPS, fitting(method=method))
    streams = flat_streams(layerwise.network, windows.input_ids).double()
    h = hadamard(48) if name == "linearpatch-hadamard" else torch.eye(48).double()
    for span in GAPS:
        xh, yh = streams[span.start] @ h, streams[span.stop] @ h
        scale = yh.abs().mean(dim=0) / xh.abs().mean(dim=0)
        want = h @ torch.diag(scale) @ h.T - torch.eye(48).double()
        assert relative_error(got[span].delta, want) < 1e-6


def test_later_gaps_are_fitted_on_the_repaired_stream(layerwise: Any, windows: Windows) -> None:
    got = fits.fit_gaps(Runner(layerwise, 7), windows, GAPS, fitting(repaired_inputs=True))
    dense = flat_streams(layerwise.network, windows.input_ids)
    done: dict[Span, Tensor] = {}
    for span in GAPS:
        repaired = flat_streams(layerwise.network, windows.input_ids, done)
        done[span] = literal_ghost(repaired[span.start], dense[span.stop])
        assert relative_error(got[span].delta, done[span]) < 1e-5
    original = fits.fit_gaps(Runner(layerwise), windows, GAPS, fitting())
    assert relative_error(original[GAPS[1]].delta, got[GAPS[1]].delta) > 1e-2


def test_fits_do_not_depend_on_the_batch_size(layerwise: Any, windows: Windows) -> None:
    for repaired in (False, True):
        how = fitting(repaired_inputs=repaired, token_weight="relative", options=FitOptions())
        one = fits.fit_gaps(Runner(layerwise, 1), windows, GAPS, how)
        many = fits.fit_gaps(Runner(layerwise, 30), windows, GAPS, how)
        for span in GAPS:
            assert relative_error(one[span].delta, many[span].delta) < 1e-3  # float32 streams
            assert one[span].num_tokens == many[span].num_tokens == 30 * 64


def test_scores_are_those_of_stored_streams(layerwise: Any, windows: Windows) -> None:
    spans = [Span(i, i + 2) for i in range(7)]
    table, sample = scoring.measure_scores(Runner(layerwise, 7), windows, spans)
    streams = flat_streams(layerwise.network, windows.input_ids)
    for score in table.spans:
        cosines = cosine_similarity(streams[score.span.start], streams[score.span.stop], dim=-1)
        assert score.cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    for layer, influence in enumerate(table.block_influence):
        cosines = cosine_similarity(streams[layer], streams[layer + 1], dim=-1)
        assert influence == pytest.approx(1 - float(cosines.mean()), abs=1e-5)
    torch.testing.assert_close(table.norms.norms, streams.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert sample is not None
    assert sample.streams.shape == (9, 5 * 48, 48)


def test_the_published_cosine_is_over_tokens(layerwise: Any, windows: Windows) -> None:
    spans = [Span(i, i + 2) for i in range(7)]
    table, _ = scoring.measure_scores(
        Runner(layerwise, 7), windows, spans, cosine_axis="tokens", residuals=False
    )
    streams = flat_streams(layerwise.network, windows.input_ids).unflatten(1, (30, 64))
    for score in table.spans:
        a, b = streams[score.span.start], streams[score.span.stop]
        samples = [cosine_similarity(a[i : i + 1], b[i : i + 1]).mean() for i in range(30)]
        assert score.cosine == pytest.approx(float(torch.stack(samples).mean()), abs=1e-5)
        assert score.residual is None


def test_the_residual_of_a_span_is_that_of_its_sampled_tokens(
    layerwise: Any, windows: Windows
) -> None:
    span = Span(2, 5)
    table, sample = scoring.measure_scores(Runner(layerwise), windows, [span])
    assert sample is not None
    x, y = sample.streams[2].double(), sample.streams[5].double()
    held_out = sample.held_out()
    m = torch.linalg.lstsq(x[~held_out], (y - x)[~held_out], driver="gelsd").solution
    error = (y - x - x @ m).square().sum(1) / y.square().sum(1)
    assert table.spans[0].residual == pytest.approx(float(error[held_out].mean()), rel=1e-2)
    whole = flat_streams(layerwise.network, windows.input_ids)
    positions = {tuple(row) for row in whole[2].tolist()}
    assert all(tuple(row) in positions for row in sample.streams[2][:20].tolist())


@pytest.mark.parametrize("cut", [(Span(0, 2),), (Span(3, 5),), (Span(6, 8),), GAPS])
def test_losses_are_those_of_the_built_model(
    layerwise: Any, windows: Windows, cut: tuple[Span, ...]
) -> None:
    operators = fits.fit_gaps(Runner(layerwise), windows, cut, fitting(stored_dtype=torch.float32))
    few = windows.first(5)
    got = measuring.measure_cuts(Runner(layerwise, 2), few, {"cut": operators})
    built = ghostlayers.surgery.removal.prune_layers(layerwise, cut, operators)
    with torch.no_grad():
        q = built(input_ids=few.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        p = layerwise.network(input_ids=few.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = few.input_ids[:, 1:].flatten()
    assert got["dense"].loss_nats == pytest.approx(float(cross_entropy(p, targets)), rel=1e-5)
    assert got["cut"].loss_nats == pytest.approx(float(cross_entropy(q, targets)), rel=1e-5)
    kl = kl_div(log_softmax(q, -1), log_softmax(p, -1), reduction="batchmean", log_target=True)
    assert got["cut"].kl_nats == pytest.approx(float(kl), rel=1e-4)
    assert got["cut"].agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).float().mean())
    )
    assert got["dense"].kl_nats == pytest.approx(0.0, abs=1e-9)
    assert got["dense"].num_tokens == 5 * 63


def test_logits_in_pieces_give_the_same_losses(
    layerwise: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = {"cut": measuring.unrepaired([Span(2, 4)])}
    whole = measuring.measure_cuts(Runner(layerwise), windows.first(2), cuts)
    monkeypatch.setattr(measuring, "LOGITS_AT_ONCE", 10 * 256)
    pieces = measuring.measure_cuts(Runner(layerwise), windows.first(2), cuts)
    for name in whole:
        assert pieces[name].loss_nats == pytest.approx(whole[name].loss_nats, rel=1e-6)
        assert pieces[name].num_tokens == whole[name].num_tokens


def test_ghost_beats_the_patch_and_the_patch_the_cut(layerwise: Any, windows: Windows) -> None:
    span = Span(3, 6)
    cuts = {"none": measuring.unrepaired([span])}
    for name in ("linearpatch-diag", "ghost"):
        how = Fitting(find_method(name))
        cuts[name] = fits.fit_gaps(Runner(layerwise), windows.first(24), [span], how)
    losses = measuring.measure_cuts(Runner(layerwise), windows.split_at(24)[1], cuts)
    assert losses["dense"].loss_nats < losses["ghost"].loss_nats
    assert losses["ghost"].loss_nats < losses["linearpatch-diag"].loss_nats
    assert losses["ghost"].kl_nats < losses["none"].kl_nats / 2


def test_norms_without_scores(layerwise: Any, windows: Windows) -> None:
    profile = scoring.measure_norms(Runner(layerwise, 2), windows.first(3))
    assert isinstance(profile, NormProfile)
    want = flat_streams(layerwise.network, windows.first(3).input_ids).norm(dim=-1)
    torch.testing.assert_close(profile.norms, want, rtol=1e-4, atol=1e-4)


def test_a_race_measures_the_same_losses_and_gives_up_the_hopeless(
    layerwise: Any, windows: Windows
) -> None:
    good, ruin = Span(3, 5), Span(4, 6)
    ruined = -0.9 * torch.eye(layerwise.network.config.hidden_size).double()
    cuts = {
        "good": measuring.unrepaired([good]),
        "ruin": {ruin: Repair("ghost", linear(ruined))},
    }
    few = windows.first(8)
    race, own = measuring.race_cuts(Runner(layerwise, 2), few, cuts)
    whole = measuring.measure_cuts(Runner(layerwise), few, cuts)
    first = measuring.measure_cuts(Runner(layerwise), few.first(4), cuts)
    assert race.best == "good"
    assert race.left == {"ruin"}
    assert len(own) == len(race.losses["good"]) == len(race.losses["ruin"]) == 4
    assert float(own.mean()) == pytest.approx(first["dense"].loss_nats, rel=1e-5)
    assert float(race.losses["good"].mean()) == pytest.approx(first["good"].loss_nats, rel=1e-5)
    assert race.behind("good") == (0.0, 0.0)
    close = {"good": cuts["good"], "same": measuring.unrepaired([good])}
    race, own = measuring.race_cuts(Runner(layerwise, 3), few, close)
    assert len(own) == len(race.losses["same"]) == 8
    assert float(race.losses["same"].mean()) == pytest.approx(whole["good"].loss_nats, rel=1e-5)
    assert race.best == "good"  # the first of equal ones
