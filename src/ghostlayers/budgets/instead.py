"""What quantising would do for the same bytes: its size, and its loss on the same windows.

The dense model's matrices go through the `gguf` library's quantiser and back, as a GGUF file would
round them, and the model that is read is measured. Only types that the library can write are
tried, and only small models, for which that is quick.
"""

import copy
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType

from ghostlayers.budgets.decide import Budget
from ghostlayers.budgets.size import Room, Weights
from ghostlayers.calibration.cuts import measure_cuts
from ghostlayers.calibration.passes import Runner
from ghostlayers.checkpoint.gguf_export import check_model
from ghostlayers.checkpoint.quantise import SIMPLE
from ghostlayers.errors import GhostlayersError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import whole_of
from ghostlayers.recipe.decision import Decision
from ghostlayers.recipe.wish import PACKED
from ghostlayers.runtime import progress
from ghostlayers.statistics.losses import LossSums
from ghostlayers.text.tokens import Windows

MOST_NUMBERS = 1_500_000_000
"""Of a model that is quantised for a look: about a minute, and as much memory again."""

TYPES = tuple(kind.lower() for kind in SIMPLE if kind.lower() in PACKED)
"""Of those that `gguf` can write, most bits first."""


def type_instead(budget: Budget) -> tuple[str, float] | None:
    """The most precise type in which the whole model meets a budget of bytes, and its bytes.

    None where there is none, where the weights are quantised already, or where no GGUF file can be
    made of the model.
    """
    measure, dense = budget.measure, budget.dense
    weights = measure.weights if isinstance(measure, Room) else measure
    if not isinstance(weights, Weights) or not _is_plain(weights) or not _can_be_made(dense):
        return None
    for kind in TYPES:
        own: Any = replace(weights, as_type=kind)
        packed = own if measure is weights else replace(measure, weights=own)  # type: ignore[type-var]
        if packed.of(()) <= budget.limit:
            return kind, float(packed.of(()))
    return None


def _is_plain(weights: Weights) -> bool:
    base, asked = weights.dense.base, weights.as_type
    return base.quantized is None and base.file is None and (asked or "") not in PACKED


def _can_be_made(dense: DenseModel) -> bool:
    if sum(tensor.numel() for tensor in dense.network.parameters()) > MOST_NUMBERS:
        return False
    if dense.residency.offloaded or whole_of(dense.network) is not dense.network:
        return False
    try:
        check_model(dense.network, dense.tokenizer, None)
    except GhostlayersError:
        return False
    return True


def loss_of_type(runner: Runner, kind: str, windows: Windows) -> float:
    """Nats a token of the dense model with its matrices rounded to a type.

    Args:
        runner: of the dense model, which is left as it is.
        kind: a type in `TYPES`.
        windows: to measure on.
    """
    network = copy.deepcopy(runner.model.network)
    with progress.stage(f"Rounding to {kind}", 1) as advance:
        for parameter in network.parameters():
            parameter.data = rounded(parameter.data, kind)
        advance()
    other = replace(runner, model=DenseModel(network), sweeps=None)
    title = f"Measuring {kind} instead"
    return measure_cuts(other, windows, {}, divergence=False, title=title)["dense"].loss_nats


@torch.no_grad()
def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight as it is read from a file of a type: matrices rounded, all else as it is.

    Matrices whose rows are no multiple of a block are rounded to 16 bits, as llama.cpp does.
    """
    width, target = weight.shape[-1] if weight.ndim else 0, TensorType[kind.upper()]
    if weight.ndim < 2:
        return weight
    if width % gguf.GGML_QUANT_SIZES[target][0]:
        return weight.half().to(weight.dtype)
    numbers = weight.float().cpu().reshape(-1, width).numpy()
    read = np.concatenate(
        [gguf.dequantize(gguf.quantize(rows, target), target) for rows in _pieces(numbers)]
    )
    return torch.from_numpy(read).reshape(weight.shape).to(weight.device, weight.dtype)


def _pieces(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Rows a few at a time: quantising takes several times their memory."""
    step = max(1, 2**22 // numbers.shape[1])
    yield from (numbers[start : start + step] for start in range(0, len(numbers), step))


def measured_instead(
    runner: Runner, instead: tuple[str, float], windows: Windows, repaired: float
) -> dict[str, Any]:
    """What quantising the whole model does instead of a cut.

    Args:
        runner: of the dense model.
        instead: as `type_instead` found it.
        windows: those that the cut was measured on.
        repaired: the cut's own loss there, nats a token.
    """
    kind, size = instead
    base = runner.model.base
    source = shlex.quote(str(base.folder or base.name))
    return {
        "type": kind,
        "bytes": size,
        "loss_nats": loss_of_type(runner, kind, windows),
        "cut_loss_nats": repaired,
        "windows": len(windows),
        "command": f"ghostlayers export {source} --gguf quantised.gguf --type {kind.upper()}",
    }


def weighed(
    runner: Runner, decision: Decision | None, held_out: Windows, evidence: Mapping[str, LossSums]
) -> Decision | None:
    """How a budget came to its layers, with what quantising would do for it where that is known."""
    if decision is None or decision.instead is None or not evidence:
        return decision
    best = evidence.get("repaired", evidence["cut"]).loss_nats
    alternative = measured_instead(runner, decision.instead, held_out, best)
    return replace(decision, alternative=alternative)
