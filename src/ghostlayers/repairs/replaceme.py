r"""ReplaceMe: a linear map of the last kept MLP's output, folded into its output projection.

References:
    Shopkhoev et al., *ReplaceMe*, arXiv:2505.02819: y = (x - m) + m T with m the MLP output of the
    last kept layer. T by least squares in closed form, or by Adam on a cosine distance, which the
    paper finds stronger: from the identity, 10 epochs over all tokens in batches of 1,024 at a rate
    of 1e-4, the mean of 1 - cos(m T, y - (x - m)), or with ``accurate`` that of
    1 - cos((x - m) + m T, y). ``cosine-from-ls`` is ours: the second objective, from the
    least-squares map, at ten times the rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import RecipeError
from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import (
    Evidence,
    FitOptions,
    Fold,
    Method,
    Needs,
    Repair,
    Tokens,
    relative_residual,
)
from ghostlayers.repairs.ridge import with_ridge
from ghostlayers.repairs.solve import regress

SOURCE = "ReplaceMe, arXiv:2505.02819"
OURS = "ours, after ReplaceMe, arXiv:2505.02819"

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


def fit_replaceme(evidence: Evidence, options: FitOptions, *, name: str = "replaceme") -> Repair:
    """T - I = argmin ||m (T - I) - D||_W^2."""
    chosen = evidence.select(("m",))
    solution = regress(chosen, options)
    return Repair(
        name,
        folds=(_folded(evidence, solution.weight),),
        num_tokens=chosen.moments.num_tokens,
        relative_residual=solution.relative_residual,
        condition_number=solution.condition_number,
        ridge=solution.ridge,
    )


def fit_cosine(
    evidence: Evidence, options: FitOptions, *, how: Descent, solved: bool, name: str
) -> Repair:
    """T by Adam on a cosine distance, from the identity or from the least-squares map."""
    assert evidence.tokens is not None
    chosen = evidence.select(("m",)).moments
    start = torch.zeros_like(chosen.cross)
    if solved:
        start = regress(evidence.select(("m",)), options).weight
    step = descend_cosine(evidence.tokens, start, how)
    return Repair(
        name,
        folds=(_folded(evidence, step),),
        num_tokens=chosen.num_tokens,
        relative_residual=relative_residual(chosen, step),
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
                each[rows.to(each.device)].float()
                for each in (tokens.source, tokens.target, tokens.features["m"])
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


def make_replaceme(arguments: Arguments) -> Method:
    """``replaceme`` (least squares), ``replaceme:cosine[:accurate]``, ``:cosine-from-ls``."""
    objective = arguments.word("ls")
    if objective not in {"ls", "cosine", "cosine-from-ls"}:
        raise RecipeError(
            f"'{arguments.text}': expected ls, cosine or cosine-from-ls, got '{objective}'."
        )
    accurate = objective == "cosine" and arguments.flag("accurate")
    ridge = arguments.ridge() if objective != "cosine" else None
    arguments.finish()
    solved = objective == "cosine-from-ls"
    how = FROM_LEAST_SQUARES if solved else ACCURATE if accurate else PUBLISHED
    fit = (
        partial(fit_replaceme, name=arguments.text)
        if objective == "ls"
        else partial(fit_cosine, how=how, solved=solved, name=arguments.text)
    )
    method = Method(
        arguments.text,
        OURS if solved else SOURCE,
        fit,
        Needs(("m",), tokens=objective != "ls"),
        token_weight="uniform",
        form="fold",
        writes_weights=True,
    )
    return method if ridge is None else with_ridge(method, ridge)
