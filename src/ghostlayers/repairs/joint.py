"""One regression on several features, folded where that is exact."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.repairs.arguments import argument
from ghostlayers.repairs.base import (
    FEATURES,
    FROM_KEPT_LAYER,
    Evidence,
    FitOptions,
    Fold,
    Needs,
    Operator,
    Repair,
    linear,
    relative_residual,
)
from ghostlayers.repairs.method import LeastSquares, Stage
from ghostlayers.repairs.refit import refit_stages
from ghostlayers.repairs.solve import regress
from ghostlayers.statistics.moments import block_slices

FOLDABLE = frozenset({"x", "z", "m", "one"})
WEAKEST = 0.1
"""Singular values of W = I + M below this share of their median are inverted no further.

SmolLM2's cut of layers 12-18 fits a W whose smallest is 1e-4: in bfloat16 the exact fold is then
worse than no repair (5.04 nats against 3.96 so)."""


@dataclass(frozen=True)
class Joint(LeastSquares):
    """One regression on several features at once, named behind the colon.

    y = x + sum of f B_f. [x, z] contains Ghost and `Refit`; [x, m] contains Ghost and ReplaceMe.
    Where the last kept layer's MLP writes straight into the stream, x W + z B = (x + z B W^-1) W:
    B folds into that layer's output projection and the operator of Ghost is all that is left to
    run. What W nearly suppresses cannot be given back by a fold that half precision survives, so B
    gives up those directions. Features of the stream alone (x, norm) are stored as they are.

    Cost: one product for every feature that does not fold.

    Attributes:
        terms: the features f, joined by ``+``; put into the order of `FEATURES`, which gives one
            text to one result.
        refit: the kept layers refit, ..., 2 before the gap are refitted first, as `Refit` does.

    References:
        ours.
    """

    keyword = "joint"

    terms: str = argument("x+z", placed=True)
    refit: int = argument(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = [part.strip() for part in self.terms.split("+")]
        for part in asked:
            if part not in FEATURES:
                raise RecipeError(f"'{self}': unknown feature '{part}'. {suggest(part, FEATURES)}")
        if len(set(asked)) < len(asked):
            raise RecipeError(f"'{self}' names a feature twice.")
        object.__setattr__(self, "terms", "+".join(name for name in FEATURES if name in asked))

    @property
    def regressors(self) -> tuple[str, ...]:
        """The features that it regresses on."""
        return tuple(self.terms.split("+"))

    @property
    def folds_away(self) -> bool:
        """Whether all that needs more than the stream folds into the last kept layer."""
        features = set(self.regressors)
        return bool(FROM_KEPT_LAYER & features) and features <= FOLDABLE

    @property
    def gathers(self) -> Needs:
        constant = ("one",) if "m" in self.regressors else ()
        return Needs(tuple(dict.fromkeys((*self.regressors, *constant))))

    @property
    def before(self) -> tuple[Stage, ...]:
        return refit_stages(self.refit, self.ridge)

    @property
    def savable(self) -> bool:
        return self.folds_away or set(self.regressors) <= {"x", "norm", "one"}

    @property
    def writes_weights(self) -> bool:
        return bool(self.before) or self.folds_away

    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        chosen = evidence.select(self.regressors)
        solution = regress(chosen, options, overwrite=chosen.expendable and not self.folds_away)
        places = block_slices(chosen.moments.blocks)
        maps = {name: solution.weight[places[name]] for name in self.regressors}
        if not self.folds_away:
            return solution.repair(self.name, _stored(maps, evidence.eps))
        carried, inverse = _foldable(maps)
        operator, folds = _fold(maps, inverse, evidence)
        weight = torch.cat([carried[name] for name, _ in chosen.moments.blocks])
        left = relative_residual(chosen.moments, weight)
        return replace(solution, relative_residual=left).repair(self.name, operator, folds)

    def explain(self) -> str:
        *others, last = [FEATURES[name] for name in self.regressors]
        named = f"{', '.join(others)} and {last}" if others else last
        return f"One regression on {named}."


@dataclass(frozen=True)
class Normed(LeastSquares):
    """A linear map of the normalised stream, added to the stream.

    y = x + norm(x) M, norm(x) = x / rms(x).

    Cost: one product of hidden x hidden a token.

    References:
        ours.
    """

    keyword = "normed"
    form = "norm map"
    gathers = Needs(("norm",))

    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        chosen = evidence.select(("norm",))
        solution = regress(chosen, options, overwrite=chosen.expendable)
        return solution.repair(self.name, _stored({"norm": solution.weight}, evidence.eps))


def _foldable(maps: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The maps as a fold can carry them, and the bounded inverse of W that it takes."""
    if "x" not in maps:
        return maps, None
    whole = torch.eye(maps["x"].shape[0], dtype=maps["x"].dtype, device=maps["x"].device)
    whole = whole + maps["x"]
    left, values, right = torch.linalg.svd(whole)
    weakest = WEAKEST * values.median()
    inverse = right.T @ ((values / values.clamp_min(weakest).square())[:, None] * left.T)
    bounded = inverse @ whole  # the identity, but for the directions that are too weak
    moved = FROM_KEPT_LAYER & set(maps)
    return {n: weight @ bounded if n in moved else weight for n, weight in maps.items()}, inverse


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
    others = {name: weight for name, weight in maps.items() if name not in {"x", "norm", "one"}}
    return Operator(parameters, others, eps)
