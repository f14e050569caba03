r"""One regression on several features: y = x + sum of f B_f.

[x, z] contains Ghost and `refit`; [x, m] contains Ghost and ReplaceMe. Where the last kept layer's
MLP writes straight into the stream, x W + z B = (x + z B W^-1) W: B folds into that layer's output
projection and the operator of Ghost is all that is left to run. What W nearly suppresses cannot be
given back by a fold that half precision survives, so B gives up those directions. Features of the
stream alone (x, norm) are stored as they are. ``normed`` is the regression on x / rms(x) alone.

References:
    ours.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import (
    FEATURES,
    FROM_KEPT_LAYER,
    Evidence,
    FitOptions,
    Fold,
    Method,
    Needs,
    Operator,
    Repair,
    linear,
    relative_residual,
)
from ghostlayers.repairs.refit import refit_stages
from ghostlayers.repairs.ridge import with_ridge
from ghostlayers.repairs.solve import Solution, regress
from ghostlayers.statistics.moments import block_slices

FOLDABLE = frozenset({"x", "z", "m", "one"})
WEAKEST = 0.1
"""Singular values of W = I + M below this share of their median are inverted no further.

SmolLM2's cut of layers 12-18 fits a W whose smallest is 1e-4: in bfloat16 the exact fold is then
worse than no repair (5.04 nats against 3.96 so)."""


def fit_joint(
    evidence: Evidence, options: FitOptions, *, features: tuple[str, ...], name: str
) -> Repair:
    """All maps from one regression, folded where that is exact."""
    chosen = evidence.select(features)
    folds_away = bool(FROM_KEPT_LAYER & set(features)) and set(features) <= FOLDABLE
    solution = regress(chosen, options, overwrite=chosen.expendable and not folds_away)
    places = block_slices(chosen.moments.blocks)
    maps = {feature: solution.weight[places[feature]] for feature in features}
    if folds_away:
        carried, inverse = _foldable(maps)
        operator, folds = _fold(maps, inverse, evidence)
        weight = torch.cat([carried[name] for name, _ in chosen.moments.blocks])
        residual = relative_residual(chosen.moments, weight)
        solution = replace(solution, weight=weight, relative_residual=residual)
    else:
        operator, folds = _stored(maps, evidence.eps), ()
    return _repair(name, operator, folds, chosen, solution)


def _repair(
    name: str,
    operator: Operator | None,
    folds: tuple[Fold, ...],
    chosen: Evidence,
    solution: Solution,
) -> Repair:
    return Repair(
        name,
        operator,
        folds,
        num_tokens=chosen.moments.num_tokens,
        relative_residual=solution.relative_residual,
        condition_number=solution.condition_number,
        ridge=solution.ridge,
    )


def _foldable(maps: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The maps as a fold can carry them, and the bounded inverse of W that it takes."""
    if "x" not in maps:
        return maps, None
    whole = torch.eye(maps["x"].shape[0], dtype=maps["x"].dtype, device=maps["x"].device)
    whole = whole + maps["x"]
    left, values, right = torch.linalg.svd(whole)
    weakest = WEAKEST * values.median()
    inverse = right.T @ ((values / values.clamp_min(weakest).square())[:, None] * left.T)
    kept = inverse @ whole  # the identity, but for the directions that are too weak
    moved = FROM_KEPT_LAYER & set(maps)
    return {n: each @ kept if n in moved else each for n, each in maps.items()}, inverse


def _fold(
    maps: dict[str, Tensor], inverse: Tensor | None, evidence: Evidence
) -> tuple[Operator | None, tuple[Fold, ...]]:
    """X W + z B = (x + z B W^-1) W."""
    output = evidence.mlp_output
    assert output is not None
    extra = torch.zeros_like(output, dtype=torch.float64)
    if "z" in maps:
        extra = extra + maps["z"]
    bias = None
    if "m" in maps:
        extra = extra + output.double() @ maps["m"]
        if evidence.mlp_bias is not None:
            bias = evidence.mlp_bias.double() @ maps["m"]
    operator = None
    if inverse is not None:
        extra = extra @ inverse
        bias = None if bias is None else bias @ inverse
        constant = maps["one"][0] if "one" in maps else None
        operator = linear(maps["x"], constant)
    elif "one" in maps:
        operator = Operator({"bias": maps["one"][0]})
    return operator, (Fold(1, extra, bias),)


def _stored(maps: dict[str, Tensor], eps: float) -> Operator:
    """Terms of the stream as parameters; terms of anything else as maps."""
    parameters = {}
    if "x" in maps:
        parameters["weight"] = maps["x"].T.contiguous()
    if "norm" in maps:
        parameters["normed"] = maps["norm"].T.contiguous()
    if "one" in maps:
        parameters["bias"] = maps["one"][0]
    others = {name: each for name, each in maps.items() if name not in {"x", "norm", "one"}}
    return Operator(parameters, others, eps)


def make_joint(arguments: Arguments) -> Method:
    """``joint:x+z`` and the like; ``joint`` alone is ``joint:x+z``.

    ``refit=k`` first refits the kept layers k, ..., 2 before the gap as `refit` does.
    """
    word = arguments.word("x+z")
    ridge = arguments.ridge()
    refitted = arguments.whole_number(arguments.value("refit"), "refit")
    arguments.finish()
    assert word is not None
    asked = [part.strip() for part in word.split("+")]
    for part in asked:
        if part not in FEATURES:
            raise RecipeError(
                f"'{arguments.text}': unknown feature '{part}'. {suggest(part, FEATURES)}"
            )
    features = tuple(name for name in FEATURES if name in asked)  # one order for one result
    if len(set(asked)) < len(asked):
        raise RecipeError(f"'{arguments.text}' names a feature twice.")
    fit = partial(fit_joint, features=features, name=arguments.text)
    stored = set(features) <= {"x", "norm", "one"} or set(features) <= FOLDABLE
    needs = Needs(tuple(dict.fromkeys([*features, *(["one"] if "m" in features else [])])))
    before = refit_stages(refitted or 1)
    writes = bool(before) or (bool(FROM_KEPT_LAYER & set(features)) and set(features) <= FOLDABLE)
    method = Method(
        arguments.text, "ours", fit, needs, before, savable=stored, writes_weights=writes
    )
    return with_ridge(method, ridge)


def make_normed(arguments: Arguments) -> Method:
    """``normed``: x + norm(x) M."""
    ridge = arguments.ridge()
    arguments.finish()
    fit = partial(fit_joint, features=("norm",), name=arguments.text)
    method = Method(arguments.text, "ours", fit, Needs(("norm",)), form="norm map")
    return with_ridge(method, ridge)
