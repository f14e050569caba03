r"""Several Ghost operators, each for the tokens nearest to one direction: one product a token.

The tokens are grouped by the direction of their stream (spherical k-means); each group's map is
shrunk towards the map of all tokens by a prior worth a number of tokens, so that a small group
cannot overfit.

References:
    ours; Dhillon & Modha, Machine Learning 42 (2001) for spherical k-means.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.moments import Moments, residual_energy
from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Method,
    Needs,
    Operator,
    Repair,
    Stage,
)
from ghostlayers.repairs.joint import fit_joint
from ghostlayers.repairs.refit import refit_stages
from ghostlayers.repairs.ridge import with_ridge
from ghostlayers.repairs.solve import regress, scaled_gram

PRIOR_TOKENS = 2000.0
ROUNDS = 25


def fit_piecewise(
    evidence: Evidence,
    options: FitOptions,
    *,
    count: int,
    prior: float = PRIOR_TOKENS,
    name: str = "piecewise",
) -> Repair:
    r"""M_k = argmin ||X_k M - D_k||^2 + (prior / N) ||X (M - M_all)||^2."""
    pieces = evidence.pieces[count]
    chosen = evidence.select(("x",))
    whole = chosen.moments
    solution = regress(chosen, options)
    share = prior / max(whole.num_tokens, 1)
    pull = share * (whole.gram @ solution.weight)
    weights, left = [], 0.0
    for each in pieces.moments:
        weight = _solve_piece(each, whole, pull, share, options)
        weights.append(weight)
        left += residual_energy(each, weight)
    return Repair(
        name,
        Operator(
            {
                "centroids": pieces.centroids.double(),
                "pieces": torch.stack([weight.T for weight in weights]).contiguous(),
            }
        ),
        num_tokens=whole.num_tokens,
        relative_residual=left / whole.target_energy if whole.target_energy else 0.0,
        condition_number=solution.condition_number,
        ridge=solution.ridge,
    )


def _solve_piece(
    piece: Moments, whole: Moments, pull: Tensor, share: float, options: FitOptions
) -> Tensor:
    """One group's map; the prior makes the system as well conditioned as that of all tokens."""
    gram, scale = scaled_gram(whole, options if options.ridge is not None else FitOptions())
    system = share * gram + piece.gram / scale[:, None] / scale
    right = (piece.cross + pull) / scale[:, None]
    return torch.cholesky_solve(right, torch.linalg.cholesky(system)) / scale[:, None]


def spherical_kmeans(
    tokens: Float[Tensor, "tokens hidden"], count: int, *, seed: int = 0, rounds: int = ROUNDS
) -> Float[Tensor, "pieces hidden"]:
    """Unit centroids of the directions of tokens, from well-spread starts (k-means++)."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=1)
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


def make_piecewise(arguments: Arguments) -> Method:
    """``piecewise:K``; ``prior=N`` is the prior's worth in tokens.

    With ``z``, the z term of ``joint:x+z`` is folded into the last kept layer first; with
    ``refit=k``, the layers before that one are refitted too.
    """
    folded = arguments.flag("z")
    refitted = arguments.whole_number(arguments.value("refit"), "refit")
    count = arguments.whole_number(arguments.word("8"), "the number of pieces")
    prior = arguments.whole_number(arguments.value("prior"), "prior")
    ridge = arguments.ridge()
    arguments.finish()
    assert count is not None
    fit = partial(fit_piecewise, count=count, prior=prior or PRIOR_TOKENS, name=arguments.text)
    before = refit_stages(refitted or 1)
    if folded:
        first = partial(fit_joint, features=("x", "z"), name="joint:x+z")
        before = (*before, Stage(first, Needs(("x", "z"))))
    method = Method(arguments.text, "ours", fit, Needs(("x",), pieces=(count,)), before)
    return with_ridge(method, ridge)
