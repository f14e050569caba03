"""Several Ghost operators, each for the tokens nearest to one direction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import NonFiniteError
from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import Evidence, FitOptions, Needs, Operator, Pieces, Repair
from ghostlayers.repairs.joint import Joint
from ghostlayers.repairs.method import LeastSquares, Stage
from ghostlayers.repairs.refit import refit_stages
from ghostlayers.repairs.solve import regress, scaled_gram, solve_ridge
from ghostlayers.statistics.moments import Moments, residual_energy

MOST_PIECES = 4096
"""Each is a matrix of its own and needs tokens of its own."""

PRIORS = (500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0, 32000.0, 64000.0)
"""Priors that held-out windows choose from, in tokens."""

ROUNDS = 25
"""Of k-means, at most: it ends as soon as no centroid moves."""

SMALLEST_USUAL = 1e-3
"""Share of the mean channel's size that a channel's unit is at least, so that none is blown up."""


@dataclass(frozen=True)
class Piecewise(LeastSquares):
    """Several Ghost operators, each for the tokens of one group.

    M_k = argmin ||X_k M - D_k||^2 + (prior / N) ||X (M - M_all)||^2. The tokens are grouped by the
    direction of their stream (spherical k-means), every channel taken in units of what it usually
    is of a direction: few channels of a real stream are most of its length, and would decide
    alone. The prior keeps a small group from overfitting.

    Cost: one product of hidden x hidden a token; K matrices of that size in memory.

    Attributes:
        count: K, number of groups.
        prior: its worth in tokens; ``auto`` lets held-out windows choose.
        z: the z term of ``joint:x+z`` is folded into the last kept layer first.
        refit: the kept layers refit, ..., 2 before the gap are refitted first, as `Refit` does.

    References:
        ours; Dhillon & Modha, Machine Learning 42 (2001) for spherical k-means.
    """

    keyword = "piecewise"

    count: int = argument(8, placed=True, what="the number of pieces", most=MOST_PIECES)
    prior: int | Literal["auto"] = argument(2000, most=10**9)
    z: bool = argument(False)
    refit: int = argument(1)

    @property
    def gathers(self) -> Needs:
        return Needs(("x",), pieces=(self.count,), held_out=self.prior == "auto")

    @property
    def before(self) -> tuple[Stage, ...]:
        refitted = refit_stages(self.refit, self.ridge)
        first = Joint("x+z", ridge=self.ridge)
        return (*refitted, Stage(first.fit, first.needs)) if self.z else refitted

    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        pieces = evidence.pieces[self.count]
        chosen = evidence.select(("x",))
        solution = regress(chosen, options)
        if solution.ridge is not None:
            options = replace(options, ridge=solution.ridge)
        prior = self.prior if self.prior != "auto" else choose_prior(pieces, chosen, options)
        whole = chosen.moments
        weights = solve_pieces(pieces.moments, whole, solution.weight, prior, options)
        left = sum(map(residual_energy, pieces.moments, weights))
        residual = left / whole.target_energy if whole.target_energy else 0.0
        maps = torch.stack([weight.T for weight in weights]).contiguous()
        operator = Operator({"centroids": pieces.centroids.double(), "pieces": maps})
        return replace(solution, relative_residual=residual).repair(self.name, operator)

    def explain(self) -> str:
        return self.summary().replace("Several", str(self.count))


def choose_prior(
    pieces: Pieces,
    evidence: Evidence,
    options: FitOptions,
    priors: tuple[float, ...] = PRIORS,
) -> float:
    """The prior whose maps, fitted on the training windows, leave least of the held-out ones.

    Args:
        pieces: with training and held-out moments.
        evidence: of the stream alone.
        options: with the ridge settled.
        priors: to choose from, in tokens.
    """
    assert evidence.training is not None
    whole = evidence.training
    everywhere = solve_ridge(whole, options)

    def left(prior: float) -> float:
        weights = solve_pieces(pieces.training, whole, everywhere, prior, options)
        return sum(map(residual_energy, pieces.held_out, weights))

    return min(priors, key=left)


def solve_pieces(
    pieces: Sequence[Moments],
    whole: Moments,
    everywhere: Float[Tensor, "hidden hidden"],
    prior: float,
    options: FitOptions,
) -> list[Float[Tensor, "hidden hidden"]]:
    """Each group's map, drawn towards that of all tokens.

    Args:
        pieces: moments of the groups.
        whole: moments of all tokens.
        everywhere: their map.
        prior: in tokens.
        options: of the solve.
    """
    share = prior / max(whole.num_tokens, 1)
    pull = share * (whole.gram @ everywhere)
    return [_solve_piece(piece, whole, pull, share, options) for piece in pieces]


def _solve_piece(
    piece: Moments, whole: Moments, pull: Tensor, share: float, options: FitOptions
) -> Tensor:
    """One group's map; the prior makes the system as well conditioned as that of all tokens."""
    gram, scale = scaled_gram(whole, options)
    system = share * gram + piece.gram / scale[:, None] / scale
    right = (piece.cross + pull) / scale[:, None]
    return torch.cholesky_solve(right, torch.linalg.cholesky(system)) / scale[:, None]


def spherical_kmeans(
    tokens: Float[Tensor, "tokens hidden"], count: int, *, seed: int = 0, rounds: int = ROUNDS
) -> Float[Tensor, "pieces hidden"]:
    """Unit centroids of the directions of tokens, from well-spread starts (k-means++)."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=1)
    if not bool(torch.isfinite(unit).all()):
        raise NonFiniteError(
            "tokens at the gap have no direction (the stream is zero there, or no number), so that "
            "they cannot be divided into pieces: look at the model's weights."
        )
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(unit), (1,), generator=generator))
    centroids = unit[first : first + 1]
    while len(centroids) < count:
        distance = (1.0 - (unit @ centroids.T).max(dim=1).values).clamp_min(1e-12)
        chosen = torch.multinomial(distance.cpu(), 1, generator=generator)
        centroids = torch.cat([centroids, unit[chosen.to(unit.device)]])
    for _ in range(rounds):
        nearest = (unit @ centroids.T).argmax(dim=1)
        totals = torch.zeros_like(centroids).index_add_(0, nearest, unit)
        moved = torch.nn.functional.normalize(totals, dim=1)
        empty = totals.norm(dim=1) == 0
        moved = torch.where(empty[:, None], centroids, moved)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def common_directions(
    tokens: Float[Tensor, "tokens hidden"], count: int
) -> Float[Tensor, "pieces hidden"]:
    """What to multiply a token with: the largest product says which group it belongs to.

    The centroids of `spherical_kmeans` over tokens whose channels count alike, divided by the
    channels' units once more, so that they take tokens as they are.

    Args:
        tokens: of the stream before the gap.
        count: number of groups.
    """
    unit = torch.nn.functional.normalize(tokens.float(), dim=1)
    usual = unit.square().mean(dim=0).sqrt()
    usual = usual.clamp_min(SMALLEST_USUAL * usual.mean())  # a channel that is always zero
    return spherical_kmeans(unit / usual, count) * (usual.mean() / usual)
