"""Repairs that act one after the other with no layer between them, as the one map that they are."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ghostlayers.repairs.base import Repair, linear
from ghostlayers.spans import Span, merge_layers, removed_layers


def stack(repairs: Mapping[Span, Repair]) -> dict[Span, Repair]:
    """Join the repairs of adjacent spans into one for the whole gap.

    s x W + b, then the same with s', W', b', is s s' x W W' + s' b W' + b': a linear map again,
    computed in float64. Of what the fits say of themselves, a product knows the number of tokens.
    """
    gaps = merge_layers(removed_layers(repairs))
    joined = {}
    for gap in gaps:
        members = [repairs[span] for span in sorted(repairs) if span.start in gap]
        joined[gap] = members[0] if len(members) == 1 else _product(members)
    return joined


def _product(repairs: Sequence[Repair]) -> Repair:
    scale, whole, shift = 1.0, None, None
    for repair in repairs:
        assert not repair.folds
        matrix, bias = _affine(repair)
        scale *= repair.scale
        if shift is not None:
            shift = repair.scale * (shift if matrix is None else shift @ matrix)
        if matrix is not None:
            whole = matrix if whole is None else whole @ matrix
        if bias is not None:
            shift = bias if shift is None else shift + bias
    operator = None
    if whole is not None:
        identity = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
        operator = linear(whole - identity, shift)
    return Repair(
        repairs[0].method,
        operator,
        scale=scale,
        num_tokens=repairs[0].num_tokens,
        relative_residual=None,
    )


def _affine(repair: Repair) -> tuple[Tensor | None, Tensor | None]:
    """I + M and b of a linear operator."""
    if repair.operator is None:
        return None, None
    parameters = {name: tensor.double() for name, tensor in repair.operator.parameters.items()}
    known = {"weight", "reduce", "expand", "bias"}
    assert set(parameters) <= known
    assert not repair.operator.maps
    hidden = next(iter(parameters.values())).shape[-1]
    matrix = torch.eye(hidden, dtype=torch.float64)
    if "weight" in parameters:
        matrix = matrix.to(parameters["weight"]) + parameters["weight"].T
    if "reduce" in parameters:
        product = (parameters["expand"] @ parameters["reduce"]).T
        matrix = matrix.to(product) + product
    return matrix, parameters.get("bias")
