"""The backward pass, one decoder layer at a time, in any family.

Activation checkpointing in its plainest form: the forward pass keeps the stream at every boundary,
and each layer is run again, from its own input, when the gradient arrives behind it. So one layer's
graph and one layer's gradients exist at a time, where gradients of the whole model would need as
much memory again as its weights in float32. What is kept is the stream of all windows at every
boundary, in the model's own type: the windows should be few.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ghostlayers.calibration.cuts import Cut, positions_at_once
from ghostlayers.calibration.passes import Pass, Runner
from ghostlayers.errors import NonFiniteError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import MicroBatch, Stream
from ghostlayers.repairs.base import Repair
from ghostlayers.runtime import progress
from ghostlayers.runtime.parallel import add_up, world
from ghostlayers.spans import Span
from ghostlayers.surgery.features import act, reader
from ghostlayers.text.tokens import Windows

Gradients = dict[str, tuple[Tensor, Tensor]]
"""A layer's weights, and the gradients of the summed loss by them, by name."""


def layer_gradients(runner: Runner, cut: Cut, windows: Windows) -> Iterator[tuple[int, Gradients]]:
    """Gradients of the loss, summed over all predicted tokens, by the weights of each kept layer.

    Args:
        runner: of the dense model.
        cut: the model, with what was removed and repaired.
        windows: few windows; the loss is that of the true next token, in nats.

    Yields:
        (layer, gradients) from the last kept layer to the first.

    Raises:
        NonFiniteError: a gradient overflowed.
    """
    model = cut.model
    gaps = {layer: span for span in cut.repairs for layer in span.layers}
    total = len(windows) * (2 * model.num_layers + 1)
    title = backward_pass(model, len(windows), windows.sequence_length).title
    with progress.stage(title, total) as advance:
        batches: list[MicroBatch] = []
        streams: list[list[Stream]] = []
        gradients: list[Stream] = []
        for _, ids in runner.share(windows):
            batch, first = model.begin(ids)
            batches.append(batch)
            streams.append([stream for _, stream in cut.walk(batch, first)])
            gradients.append(head_gradient(model, batch, streams[-1][-1]))
            advance(len(ids) * (model.num_layers + 1))
        for layer in reversed(range(model.num_layers)):
            span = gaps.get(layer)
            sums: Gradients = {}
            for index, batch in enumerate(batches):
                streams[index].pop()
                x, g = streams[index][-1], gradients[index]
                if span is None:
                    gradients[index] = _through_layer(cut, layer, batch, x, g, sums)
                elif layer == span.stop - 1:
                    gradients[index] = _through_repair(model, span, cut.repairs[span], x, g)
            if span is None:
                _merge(cut, layer, sums)
                _check_finite(sums, layer)
                yield layer, sums
            advance(len(windows))


BACKWARD = 3.0
"""A layer's forward pass again and its backward pass (twice as much), in forward passes."""


def backward_pass(model: DenseModel, windows: int, length: int) -> Pass:
    """The pass of `layer_gradients` over so many windows of a length."""
    return Pass(
        "gradients",
        "One backward pass (gradient checkpointing: every layer runs again)",
        windows,
        layers=windows * model.num_layers * (1 + BACKWARD),
        heads=windows * BACKWARD,
        copies=2,
        held=windows * model.num_layers * length * model.hidden_size * model.dtype.itemsize,
    )


def head_gradient(model: DenseModel, batch: MicroBatch, stream: Stream) -> Stream:
    """Gradient of the summed loss by the stream at the last boundary.

    The sum, not the mean: a mean over many tokens would underflow in float16.
    """
    result = torch.zeros_like(stream)
    length = batch.input_ids.shape[1] - 1
    step = positions_at_once(model.network.config.vocab_size, model.device)
    for window in range(batch.input_ids.shape[0]):
        row = slice(window, window + 1)
        one = MicroBatch(batch.input_ids[row], None, batch.calls)
        targets = batch.input_ids[window, 1:]
        for start in range(0, length, step):
            positions = slice(start, min(start + step, length))
            with torch.enable_grad():
                x = stream[row].detach().requires_grad_()
                logits = model.logits(one, x, positions, differentiable=True)[0]
                loss = torch.nn.functional.cross_entropy(
                    logits.float(), targets[positions], reduction="sum"
                )
                (gradient,) = torch.autograd.grad(loss, x)
            result[row] += gradient
    return result


def _through_layer(
    cut: Cut, layer: int, batch: MicroBatch, x: Stream, g: Stream, sums: Gradients
) -> Stream:
    """The gradient before a kept layer; those by its weights are added to ``sums``."""
    changed = cut.weights.get(layer, {})
    own = dict(cut.model.layer(layer).named_parameters())
    with torch.enable_grad():
        weights = {
            name: changed.get(name, weight).detach().requires_grad_()
            for name, weight in own.items()
            if weight.is_floating_point()
        }
        x = x.detach().requires_grad_()
        y = cut.model.run_layer(layer, batch, x, weights=weights, differentiable=True)
        results = torch.autograd.grad(y, [x, *weights.values()], g, allow_unused=True)
    before, *by_weight = results
    for (name, weight), gradient in zip(weights.items(), by_weight, strict=True):
        if gradient is not None:
            total = sums[name][1] + gradient.float() if name in sums else gradient.float()
            sums[name] = weight.detach(), total
    assert before is not None
    return before


def _through_repair(model: DenseModel, span: Span, repair: Repair, x: Stream, g: Stream) -> Stream:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = act(repair, x, reader(model, x, span, {}))
        (gradient,) = torch.autograd.grad(y, x, g)
    return gradient


def _merge(cut: Cut, layer: int, sums: Gradients) -> None:
    """Add up the processes' gradients; one that had no windows has zeros."""
    if world().size == 1:
        return
    for name, own in cut.model.layer(layer).named_parameters():
        if own.is_floating_point():
            weight = cut.weights.get(layer, {}).get(name, own).detach()
            mine = sums[name][1] if name in sums else torch.zeros_like(weight).float()
            add_up([mine])
            sums[name] = weight, mine


def _check_finite(sums: Gradients, layer: int) -> None:
    for name, (_, gradient) in sums.items():
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"the gradient by '{name}' of decoder layer {layer} is NaN or infinite; try "
                "--dtype float32, or another selection than 'taylor'."
            )
