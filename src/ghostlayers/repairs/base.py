"""What a repair is: the result of a closed-form fit across one gap."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ghostlayers.moments import Moments, residual_energy


@dataclass(frozen=True)
class FitOptions:
    """How a fit is damped.

    Attributes:
        ridge: added to the diagonal of the Gram matrix after every feature was scaled to unit
            length, so it is dimensionless and the same for any model. Changes the answer.
        absolute_ridge: added to the diagonal of the Gram matrix as it is, as the paper does.
            Changes the answer where it is not small against the smallest eigenvalue.
        report_condition: compute the condition number, which costs more than the solve.
    """

    ridge: float = 1e-6
    absolute_ridge: float = 0.0
    report_condition: bool = True


@dataclass(frozen=True)
class Repair:
    """A boundary operator x -> x + x M, and what its fit says about itself.

    Attributes:
        method: name of the method.
        delta: M, [hidden, hidden], acting on row vectors, float64; None for no operator.
        num_tokens: tokens it was fitted on.
        relative_residual: ||F M - D||^2 / ||D||^2 on the fit tokens with the fit's weights; 1 is
            what no repair leaves.
        condition_number: of the damped and scaled Gram matrix; None where nothing was solved.
    """

    method: str
    delta: Float[Tensor, "hidden hidden"] | None
    num_tokens: int
    relative_residual: float
    condition_number: float | None = None


Basis = Callable[[int], Float[Tensor, "hidden hidden"]]


@dataclass(frozen=True)
class Method:
    """A row of the table of repairs.

    Attributes:
        name: as on the command line.
        source: the paper it comes from.
        fit: from moments to a repair.
        basis: an orthogonal matrix by hidden size; its moments are then those of X Q and Y Q.
        weighs_tokens: whether token weights change its answer.
    """

    name: str
    source: str
    fit: Callable[[Moments, FitOptions], Repair]
    basis: Basis | None = None
    weighs_tokens: bool = False


def relative_residual(moments: Moments, delta: Float[Tensor, "features hidden"]) -> float:
    """Share of the discrepancy that a map from the moments' features leaves; 0 if there is none."""
    if moments.target_energy == 0.0:
        return 0.0
    return residual_energy(moments, delta) / moments.target_energy
