r"""New output projections of kept layers before the gap: no operator, no cost at run time.

The last kept layer writes z W_down into the stream. Writing z (W_down + B) instead, B the
least-squares map from z to the discrepancy, folds the repair into a weight that is there anyway.
With k layers, each in turn, from the first, takes an equal share of what is left, on the stream
that the ones before it wrote. Where a norm stands behind the projection, `through_norm` fits both.

References:
    ours; k = 1 contains ReplaceMe (arXiv:2505.02819), whose B is W_down T.
"""

from functools import partial

from ghostlayers.repairs.arguments import Arguments
from ghostlayers.repairs.base import Evidence, FitOptions, Fold, Method, Needs, Repair, Stage
from ghostlayers.repairs.ridge import with_ridge
from ghostlayers.repairs.solve import regress


def fit_refit(evidence: Evidence, options: FitOptions, *, name: str = "refit:1") -> Repair:
    """B = argmin ||z B - D||_W^2, with a bias where the projection has one."""
    biased = evidence.mlp_bias is not None
    chosen = evidence.select(("z", "one") if biased else ("z",))
    solution = regress(chosen, options, overwrite=chosen.expendable)
    width = dict(chosen.moments.blocks)["z"]
    bias = solution.weight[width] if biased else None
    return Repair(
        name,
        folds=(Fold(1, solution.weight[:width], bias),),
        num_tokens=chosen.moments.num_tokens,
        relative_residual=solution.relative_residual,
        condition_number=solution.condition_number,
        ridge=solution.ridge,
    )


def refit_stages(count: int) -> tuple[Stage, ...]:
    """The layers count, ..., 2 before the gap, each taking an equal share of what is left."""
    needs = Needs(("z", "one"))
    return tuple(Stage(fit_refit, needs, back, 1.0 / back) for back in range(count, 1, -1))


def make_refit(arguments: Arguments) -> Method:
    """``refit:k``; ``refit`` alone is ``refit:1``."""
    count = arguments.whole_number(arguments.word("1"), "the number of layers")
    ridge = arguments.ridge()
    arguments.finish()
    assert count is not None
    fit = partial(fit_refit, name=arguments.text)
    method = Method(
        arguments.text,
        "ours",
        fit,
        Needs(("z", "one")),
        refit_stages(count),
        form="fold",
        writes_weights=True,
        through_norm=True,
    )
    return with_ridge(method, ridge)
