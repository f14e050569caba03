"""What writing the result takes: a checkpoint or an adapter, and the proof that it loads."""

from collections.abc import Sequence
from typing import Any

from ghostlayers.calibration.passes import Pass
from ghostlayers.checkpoint.output import Output
from ghostlayers.model.anatomy import writers
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.residency import is_offloaded
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.plan.probe import hashing_seconds, writing_seconds
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import RepairMethod
from ghostlayers.spans import Span
from ghostlayers.surgery.features import feature_widths

CHECKPOINT = Output()


def saving_passes(
    loaded: DenseModel,
    recipe: Recipe,
    method: RepairMethod,
    spans: Sequence[Span],
    output: Output,
    started: float,
) -> list[Pass]:
    """What is written after the last repair.

    Args:
        loaded: the dense model.
        recipe: the request.
        method: its repair.
        spans: the layers that will go.
        output: what is asked for.
        started: seconds that starting a process and loading the model take.
    """
    model, kind = loaded.network, loaded.stored_dtype.itemsize
    sizes = [_numbers(layer) for layer in find_decoder_layers(model)]
    total = sum(each.numel() for each in model.parameters())
    added = _added(loaded, method, spans) * kind
    if output.save == "adapter":
        return [_adapter(total * kind, added, len(sizes) if is_offloaded(model) else 0, output)]
    if recipe.export == "stock-layer":
        added = len(spans) * max(sizes) * kind
    elif method.form == "fold":
        added = 0
    gone = sum(sizes[index] for span in spans for index in span.layers)
    size = (total - gone) * kind + added
    if output.copies(loaded):
        assert loaded.base.file is not None
        size = int(loaded.base.file.stat().st_size * (1 - gone / total))
        return [_gguf(size, output, size)]
    kept = len(sizes) - sum(map(len, spans))
    written = [_checkpoint(size, kept if is_offloaded(model) else 0, output, started)]
    if output.file is not None:
        written.append(_gguf(size, output, max(sizes) * kind))
    return written


def _numbers(layer: Any) -> int:
    return sum(each.numel() for each in layer.parameters())


def _added(model: DenseModel, method: RepairMethod, spans: Sequence[Span]) -> int:
    """Numbers of the operators, or of the weights that a fold changes."""
    if method.form == "fold" and not method.solves:
        return 0
    if method.form == "fold" and model.anatomy.experts:
        layer = model.layers[spans[0].start - 1]
        return (
            len(spans)
            * (1 + len(method.before))
            * sum(each.numel() for each in writers(layer, f"{model.anatomy.mlp_output}.").values())
        )
    hidden = model.hidden_size
    steps = [*(each.needs for each in method.before), method.needs]
    return len(spans) * sum(
        sum(feature_widths(model, needs.features).values()) * hidden * max(needs.pieces, default=1)
        for needs in steps
    )


def _checkpoint(size: int, brought: int, output: Output, started: float) -> Pass:
    return Pass(
        "saving",
        "Writing it, and loading it in a fresh process",
        copies=0,
        brought=2 * brought,
        held=0 if brought else size,  # the fresh process holds it, while this one waits
        disk=size,
        fixed=started + writing_seconds(size, output.folder),
    )


def _adapter(base: int, added: int, brought: int, output: Output) -> Pass:
    """The base's weights are hashed, and the model is made of it again beside it."""
    return Pass(
        "saving",
        "Writing the adapter, and making the model of it again",
        copies=0,
        brought=4 * brought,
        held=2 * added,
        disk=added,
        fixed=hashing_seconds(base) + writing_seconds(added, output.folder),
    )


def _gguf(size: int, output: Output, layer: int) -> Pass:
    """Every tensor is read, written, and read again to prove it."""
    return Pass(
        "saving",
        "Writing the GGUF file, and reading it again",
        copies=0,
        held=layer,
        disk=size,
        fixed=2 * hashing_seconds(size) + writing_seconds(size, output.folder),
    )
