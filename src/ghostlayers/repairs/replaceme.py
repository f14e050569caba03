r"""ReplaceMe: a linear map of the last kept MLP's output, folded into its output projection.

References:
    Shopkhoev et al., *ReplaceMe*, arXiv:2505.02819: y = (x - m) + m T with m the MLP output of the
    last kept layer. T by least squares in closed form, or by Adam on the cosine distance between
    prediction and target, which the paper finds stronger.
"""

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
ADAM_STEPS = 300
ADAM_BATCH = 1024
ADAM_RATE = 1e-3


def fit_replaceme(
    evidence: Evidence, options: FitOptions, *, cosine: bool = False, name: str = "replaceme"
) -> Repair:
    """T - I = argmin ||m (T - I) - D||_W^2; with ``cosine``, descended from there."""
    chosen = evidence.select(("m",))
    solution = regress(chosen, options)
    step = solution.weight
    residual = solution.relative_residual
    if cosine:
        assert evidence.tokens is not None
        step = descend_cosine(evidence.tokens, step)
        residual = relative_residual(chosen.moments, step)
    assert evidence.mlp_output is not None
    bias = None if evidence.mlp_bias is None else evidence.mlp_bias.double() @ step
    return Repair(
        name,
        folds=(Fold(1, evidence.mlp_output.double() @ step, bias),),
        num_tokens=chosen.moments.num_tokens,
        relative_residual=residual,
        condition_number=solution.condition_number,
        ridge=solution.ridge,
    )


def descend_cosine(
    tokens: Tokens, start: Float[Tensor, "hidden hidden"], *, steps: int = ADAM_STEPS
) -> Float[Tensor, "hidden hidden"]:
    """Minimise the mean of 1 - cos(x + m S, y) over a sample of tokens by Adam, from S."""
    output = tokens.features["m"].float()
    source, target = tokens.source.float(), tokens.target.float()
    weight = start.float().clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=ADAM_RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            index = torch.randint(len(source), (ADAM_BATCH,), generator=generator)
            index = index.to(source.device)
            predicted = source[index] + output[index] @ weight
            cosine = torch.nn.functional.cosine_similarity(predicted, target[index], dim=-1)
            optimizer.zero_grad()
            (1.0 - cosine).mean().backward()
            optimizer.step()
    return weight.detach().double()


def make_replaceme(arguments: Arguments) -> Method:
    """``replaceme`` (least squares) or ``replaceme:cosine``."""
    objective = arguments.word("ls")
    ridge = arguments.ridge()
    arguments.finish()
    if objective not in {"ls", "cosine"}:
        raise RecipeError(f"'{arguments.text}': expected ls or cosine, got '{objective}'.")
    cosine = objective == "cosine"
    fit = partial(fit_replaceme, cosine=cosine, name=arguments.text)
    needs = Needs(("m",), tokens=cosine)
    method = Method(arguments.text, SOURCE, fit, needs, token_weight="uniform", form="fold")
    return with_ridge(method, ridge)
