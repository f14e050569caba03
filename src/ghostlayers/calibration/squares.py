"""How large the inputs of each projection are: sums of their squares over tokens, a channel each.

What a quantiser weighs its rounding errors by (llama.cpp's importance matrix). Which matrix is
multiplied with what is seen where torch multiplies, so that it does not matter whether a projection
is a module or one of many experts in one tensor.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import check_finite
from ghostlayers.statistics.moments import ACCUMULATOR
from ghostlayers.text.tokens import Windows


class Squares:
    """Sums of squares of what each matrix of the decoder layers is multiplied with.

    Args:
        model: whose matrices.

    Attributes:
        sums: by the matrix's name in the network, [matrices, input channels]; experts have a row
            each, other projections one row.
        counts: tokens behind each row.
    """

    def __init__(self, model: DenseModel) -> None:
        paths = {id(module): path for path, module in model.network.named_modules()}
        self._layers = list(model.layers)
        self._paths = [paths[id(layer)] for layer in self._layers]
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        for path, layer in zip(self._paths, self._layers, strict=True):
            for name, weight in layer.named_parameters():
                if weight.ndim in {2, 3}:
                    rows = 1 if weight.ndim == 2 else weight.shape[0]
                    self.sums[f"{path}.{name}"] = torch.zeros(
                        rows, weight.shape[-1], dtype=ACCUMULATOR
                    )
                    self.counts[f"{path}.{name}"] = torch.zeros(rows, dtype=ACCUMULATOR)

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        parts = {"squares": self.sums, "tokens": self.counts}
        return {
            f"{what} {name}": moment
            for what, moments in parts.items()
            for name, moment in moments.items()
        }

    @contextlib.contextmanager
    def listening(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Add what the matrices of a decoder layer are multiplied with while it runs.

        Args:
            index: of the layer.
            layer: the module, its weights in memory.
        """
        places = {}
        for name, weight in layer.named_parameters():
            if weight.ndim in {2, 3}:
                rows = [weight] if weight.ndim == 2 else weight
                for row, matrix in enumerate(rows):
                    places[matrix.data_ptr()] = (f"{self._paths[index]}.{name}", row)

        def heard(inputs: Tensor, weight: Tensor) -> None:
            name, row = places.get(weight.data_ptr(), (None, 0))
            if name is not None:
                self._add(name, row, inputs.detach().flatten(0, -2))

        with _Listener(heard):
            yield

    def _add(self, name: str, row: int, inputs: Tensor) -> None:
        self.sums[name][row] += inputs.to(ACCUMULATOR).square().sum(dim=0).cpu()
        self.counts[name][row] += inputs.shape[0]


class _Listener(TorchFunctionMode):
    """Tells of every product of inputs with a weight."""

    def __init__(self, heard: Any) -> None:
        super().__init__()
        self._heard = heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is nn.functional.linear:
            self._heard(*_operands(*args, **(kwargs or {})))  # itself unheard
        return func(*args, **(kwargs or {}))


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: A002
    del bias
    return input, weight


def squares_pass(model: DenseModel, windows: float) -> Pass:
    """The pass of `gather_squares`."""
    return Pass(
        "squares", "Measuring what is multiplied", windows, layers=windows * model.num_layers
    )


@torch.no_grad()
def gather_squares(runner: Runner, windows: Windows) -> Squares:
    """Sums of squares of the inputs of every projection of the decoder layers.

    Args:
        runner: of the model, which may be one that was cut and repaired.
        windows: the text.

    Raises:
        NonFiniteError: a layer gave NaN or infinity.
    """
    model, sums = runner.model, Squares(runner.model)
    with _one_expert_at_a_time(model.network):
        for _, ids in runner.visit(squares_pass(model, len(windows)), windows, sums):
            batch, stream = model.begin(ids)
            for index in range(model.num_layers):
                with sums.listening(index, model.layer(index)):
                    stream = model.run_layer(index, batch, stream)
                check_finite(stream, index)
    return sums


@contextlib.contextmanager
def _one_expert_at_a_time(network: PreTrainedModel) -> Iterator[None]:
    """Have experts multiplied one after another, where they would be by one kernel."""
    choose = getattr(network, "set_experts_implementation", None)
    before = getattr(network.config, "_experts_implementation", None)
    if choose is None or before in {None, "eager"}:
        yield
        return
    choose("eager")
    try:
        yield
    finally:
        choose(before)
