"""A linear map of the last kept MLP's output, folded into its output projection."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import RecipeError
from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Fold,
    Needs,
    Repair,
    Tokens,
    relative_residual,
)
from ghostlayers.repairs.method import LeastSquares
from ghostlayers.repairs.solve import regress

BATCH = 1024
"""Tokens a step of Adam."""


@dataclass(frozen=True)
class Descent:
    """How a map is descended by Adam.

    Attributes:
        rate: of learning.
        epochs: passes over all tokens, so that more text means more steps.
        whole: the objective compares the stream after the gap, and not what the MLP should add.
    """

    rate: float
    epochs: int
    whole: bool


PUBLISHED = Descent(rate=1e-4, epochs=10, whole=False)
ACCURATE = Descent(rate=1e-4, epochs=10, whole=True)
FROM_LEAST_SQUARES = Descent(rate=1e-3, epochs=20, whole=True)


@dataclass(frozen=True)
class ReplaceMe(LeastSquares):
    """ReplaceMe: a linear map of the last kept MLP's output, folded into its weights.

    y = (x - m) + m T with m the MLP output of the last kept layer: T by least squares in closed
    form, or by Adam on a cosine distance, which the paper finds stronger: from the identity, 10
    epochs over all tokens in batches of 1,024 at a rate of 1e-4.

    Cost: none at run time; a descent keeps every token of the fit windows.

    Attributes:
        objective: ``ls``, ||m (T - I) - D||_W^2; ``cosine``, the mean of 1 - cos(m T, y - (x - m));
            ``cosine-from-ls``, ours, the accurate one from the least-squares map, at ten times
            the rate.
        accurate: that of 1 - cos((x - m) + m T, y).

    References:
        Shopkhoev et al., *ReplaceMe*, arXiv:2505.02819.
    """

    keyword = "replaceme"
    source = "ReplaceMe, arXiv:2505.02819 (cosine-from-ls: ours)"
    token_weight = "uniform"
    form = "fold"

    objective: Literal["ls", "cosine", "cosine-from-ls"] = argument("ls", placed=True)
    accurate: bool = argument(False, note="on the whole stream")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accurate and self.objective != "cosine":
            raise RecipeError(f"'{self}': accurate is for the objective cosine alone.")
        if not self.solves and (self.ridge, self.weight) != (None, None):
            raise RecipeError(f"'{self}': the objective cosine solves nothing, and takes no ridge.")

    @property
    def gathers(self) -> Needs:
        return Needs(("m",), tokens=self.objective != "ls")

    @property
    def solves(self) -> bool:
        return self.objective != "cosine"

    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        chosen = evidence.select(("m",))
        if self.objective == "ls":
            solution = regress(chosen, options)
            return solution.repair(self.name, folds=(_folded(evidence, solution.weight),))
        assert evidence.tokens is not None
        if self.solves:
            start, how = regress(chosen, options).weight, FROM_LEAST_SQUARES
        else:
            start = torch.zeros_like(chosen.moments.cross)
            how = ACCURATE if self.accurate else PUBLISHED
        step = descend_cosine(evidence.tokens, start, how)
        return Repair(
            self.name,
            folds=(_folded(evidence, step),),
            num_tokens=chosen.moments.num_tokens,
            relative_residual=relative_residual(chosen.moments, step),
        )


def _folded(evidence: Evidence, step: Tensor) -> Fold:
    """What m (T - I) adds, as a change of the projection that wrote m."""
    assert evidence.mlp_output is not None
    bias = None if evidence.mlp_bias is None else evidence.mlp_bias.double() @ step
    return Fold(1, evidence.mlp_output.double() @ step, bias)


def descend_cosine(
    tokens: Tokens, start: Float[Tensor, "hidden hidden"], how: Descent
) -> Float[Tensor, "hidden hidden"]:
    """T - I after Adam's steps from ``start``, each on a batch of shuffled tokens, in float32."""
    identity = torch.eye(len(start), dtype=torch.float32, device=start.device)
    weight = (identity + start.float()).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=how.rate)
    with torch.enable_grad():
        for rows in _batches(len(tokens.source), how.epochs):
            x, y, m = (
                tensor[rows.to(tensor.device)].float()
                for tensor in (tokens.source, tokens.target, tokens.features["m"])
            )
            rest = x - m
            predicted, wanted = (m @ weight + rest, y) if how.whole else (m @ weight, y - rest)
            cosine = torch.nn.functional.cosine_similarity(predicted, wanted, dim=-1)
            optimizer.zero_grad()
            (1.0 - cosine).mean().backward()
            optimizer.step()
    return weight.detach().double() - identity.double()


def _batches(count: int, epochs: int) -> Iterator[Tensor]:
    """Numbers of tokens, each token once an epoch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(BATCH)
