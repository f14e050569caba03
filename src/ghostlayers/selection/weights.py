r"""Importance of a layer by its weights, with or without their gradients.

Shortened LLaMA (Kim et al., arXiv:2402.02834, section 2.2) removes the layers of lowest

    magnitude:  sum over weights of |w|            ("Mag")
    taylor:     sum over weights of |w dL/dw|      ("Taylor")

The paper speaks of the linear weight matrices, and so do we: tensors of two or more dimensions. Its
released code also adds the gains of the norms; ``norms`` reproduces that. Biases count in neither.
Absolute values are taken of each weight, *after* its gradient was summed over all calibration
windows, and everything is summed, never averaged. The "+" of "Mag+" and "Taylor+", which protects
the first four and the last two layers, lies in `selection`.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def counts(name: str, weight: Tensor, *, norms: bool = False) -> bool:
    """Whether a parameter of a decoder layer takes part.

    Args:
        name: the parameter's path in its layer.
        weight: the parameter.
        norms: gains of norms too, as in the released code.
    """
    if name.endswith("bias") or not weight.is_floating_point():
        return False
    return weight.ndim >= 2 or norms


def magnitude_importance(weights: Iterable[Float[Tensor, "..."]]) -> float:
    """Sum of |w| over all weights of a layer."""
    return sum(float(weight.abs().sum(dtype=torch.float64)) for weight in weights)


def taylor_importance(
    weights: Iterable[tuple[Float[Tensor, "..."], Float[Tensor, "..."]]],
) -> float:
    """Sum of |w g| over all weights of a layer.

    Args:
        weights: pairs of a weight and the gradient of the loss by it, summed over windows. The
            sum of losses or their mean only scales the result.
    """
    return sum(
        float((weight.float() * gradient.float()).abs().sum(dtype=torch.float64))
        for weight, gradient in weights
    )
