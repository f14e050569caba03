"""Scores against their definitions written out, and the selections that rest on them."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ghostlayers.errors import SpanError
from ghostlayers.selection import Scattered, ScoreTable, SpanScore, choices
from ghostlayers.selection.births import NormProfile, born_inside
from ghostlayers.selection.cosine import add_window, block_influence
from ghostlayers.selection.pairs import empty_pairs
from ghostlayers.selection.residual import sample_mask, span_residual
from ghostlayers.spans import Span


def windows(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 5, 11, 8, generator=generator)  # window, boundary, token, hidden


@pytest.mark.parametrize("axis", ["hidden", "tokens"])
def test_cosines_are_those_of_the_definition(axis: str) -> None:
    data = windows()
    sums = empty_pairs(5)
    for streams in data:
        sums = add_window(sums, streams, axis)
    got = sums.mean()
    for a in range(5):
        for b in range(5):
            # The released code calls cosine_similarity on [1, tokens, hidden], whose default axis
            # 1 is the tokens'; the papers mean the hidden axis.
            along = 2 if axis == "hidden" else 1
            cosines = [cosine_similarity(w[a][None], w[b][None], dim=along).mean() for w in data]
            assert float(got[a, b]) == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-6)


def test_block_influence_is_one_minus_the_cosine_of_neighbours() -> None:
    similarity = torch.eye(4, dtype=torch.float64)
    similarity[0, 1], similarity[1, 2], similarity[2, 3] = 0.9, 0.5, 0.75
    assert block_influence(similarity) == pytest.approx([0.1, 0.5, 0.25])


def test_the_residual_of_a_linear_span_is_zero_and_of_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    held_out = torch.arange(300) % 5 == 4
    w = torch.eye(6) + 0.2 * torch.randn(6, 6, generator=generator)
    assert span_residual(x, x @ w, held_out) < 1e-9
    other = torch.randn(300, 6, generator=generator)
    assert span_residual(x, other, held_out) == pytest.approx(1.0, abs=0.15)


def test_the_residual_is_measured_on_tokens_the_fit_did_not_see() -> None:
    x = torch.randn(60, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(60, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    held_out = torch.arange(60) % 5 == 4
    m = torch.linalg.lstsq(x[~held_out], (y - x)[~held_out], driver="gelsd").solution
    error = (y - x - x @ m)[held_out].square().sum(1) / y[held_out].square().sum(1)
    assert span_residual(x, y, held_out) == pytest.approx(float(error.mean()), rel=1e-3)


def test_a_sample_takes_every_position_at_the_same_rate() -> None:
    mask = sample_mask(64, 128, 1024, torch.Generator().manual_seed(0))
    assert mask.shape == (64, 128)
    assert int(mask.sum()) == 1024
    by_position = mask.sum(dim=0)
    assert int(by_position.min()) == int(by_position.max()) == 8
    assert int((mask.sum(dim=1) > 0).sum()) > 55  # from nearly every window


def test_a_sample_of_everything_is_everything() -> None:
    assert sample_mask(3, 4, 100, torch.Generator().manual_seed(0)).all()


def profile(values: list[list[float]]) -> NormProfile:
    return NormProfile(torch.tensor(values))


def test_a_birth_is_a_token_that_becomes_massive() -> None:
    ordinary = [1.0] * 9
    norms = profile([[*ordinary, 1.0], [*ordinary, 2.0], [*ordinary, 90.0], [*ordinary, 95.0]])
    assert born_inside(norms, Span(1, 2))
    assert born_inside(norms, Span(0, 3))
    assert not born_inside(norms, Span(0, 1))
    assert not born_inside(norms, Span(2, 3))  # massive before and after: carried, not born


def test_growth_of_all_tokens_is_no_birth() -> None:
    norms = profile([[1.0] * 10, [100.0] * 10])
    assert not born_inside(norms, Span(0, 1))


def make_table(
    cosines: list[float],
    residuals: list[float],
    losses: list[float | None] | None = None,
    influence: tuple[float, ...] = (0.5, 0.1, 0.4, 0.2, 0.3, 0.05),
) -> ScoreTable:
    spans = tuple(
        SpanScore(Span(i, i + 2), cosine, residual, birth=False, loss=None)
        for i, (cosine, residual) in enumerate(zip(cosines, residuals, strict=True))
    )
    if losses is not None:
        best = min(loss for loss in losses if loss is not None)
        spans = tuple(
            dataclasses.replace(s, loss=loss, behind=(loss or 0.0) - best, behind_error=0.01)
            for s, loss in zip(spans, losses, strict=True)
        )
    return ScoreTable(6, torch.eye(7).double(), influence, spans, profile([[1.0]] * 7))


TABLE = make_table([0.1, 0.9, 0.8, 0.7, 0.2], [0.5, 9.0, 0.3, 0.4, 0.1])


def test_streamline_takes_the_most_similar_span() -> None:
    assert choices.select("streamline", TABLE, 2) == (Span(1, 3),)


def test_shortgpt_takes_the_least_influential_layers() -> None:
    chosen = choices.select("shortgpt", TABLE, 3)
    assert chosen == (Span(1, 2), Span(3, 4), Span(5, 6))
    assert choices.select("shortgpt", TABLE, 3, (0, 1)) == (Span(1, 2), Span(3, 5))


def test_the_shortlist_holds_the_best_of_both_rankings() -> None:
    # All angles are equal in this table, so the first span is the one of least angle.
    assert choices.shortlist(TABLE, 1) == (Span(0, 2), Span(1, 3), Span(4, 6))
    assert choices.shortlist(TABLE, 2) == (Span(0, 2), Span(1, 3), Span(2, 4), Span(4, 6))


def test_recoverable_takes_the_lowest_measured_loss() -> None:
    table = make_table([0.1, 0.9, 0.8, 0.7, 0.2], [0.5] * 5, [None, 6.0, 3.5, 3.9, None])
    assert choices.select("recoverable", table, 2) == (Span(2, 4),)
    with pytest.raises(SpanError, match="no span's loss was measured"):
        choices.select("recoverable", TABLE, 2)


def test_recoverable_takes_the_lowest_loss_whatever_the_residual() -> None:
    residuals = [0.5, 0.5, 0.4, 0.2, 0.1]
    close = make_table([0.9] * 5, residuals, [None, 3.5, 3.505, 3.519, 3.53])
    assert choices.select("recoverable", close, 2) == (Span(1, 3),)


def test_candidates_include_both_ends_unless_protected() -> None:
    assert choices.candidate_spans(6, 2) == [Span(i, i + 2) for i in range(5)]
    assert choices.candidate_spans(6, 2, (1, 1)) == [Span(i, i + 2) for i in (1, 2, 3)]


@pytest.mark.parametrize(("length", "keep"), [(6, None), (0, None), (5, (1, 1)), (1, (3, 3))])
def test_spans_that_do_not_fit(length: int, keep: choices.Keep | None) -> None:
    with pytest.raises(SpanError, match=rf"no span of {length} layers? fits into 6 decoder layers"):
        choices.candidate_spans(6, length, keep)


def test_what_left_the_race_does_not_win_by_the_windows_it_was_measured_on() -> None:
    table = make_table([0.9] * 5, [0.5] * 5, [None, 3.5, 3.4, 3.6, None])
    spans = [dataclasses.replace(s, finished=s.loss != 3.4, behind=(s.loss or 9) - 3.5)
             for s in table.spans]  # fmt: skip
    table = dataclasses.replace(table, spans=tuple(spans))
    assert choices.select("recoverable", table, 2) == (Span(1, 3),)
    apart = Scattered((0, 3), 3.45, -0.05, 0.01, finished=False)
    table = dataclasses.replace(table, scattered=apart)
    assert choices.select("recoverable", table, 2) == (Span(1, 3),)
    winner = dataclasses.replace(apart, behind=-0.05, finished=True)
    table = dataclasses.replace(table, scattered=winner)
    assert choices.select("recoverable", table, 2) == (Span(0, 1), Span(3, 4))
