"""What writing the result takes: a checkpoint or an adapter, and the proof that it loads."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ghostlayers.calibration.passes import Pass
from ghostlayers.checkpoint.gguf_encoding import encoded_bytes, fallback_named
from ghostlayers.checkpoint.output import Output
from ghostlayers.checkpoint.packed import PackedBase, packed_base
from ghostlayers.model.anatomy import writers
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_file import open_gguf
from ghostlayers.model.residency import is_offloaded
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.plan.probe import hashing_seconds, writing_seconds
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import RepairMethod
from ghostlayers.repairs.shapes import operator_numbers
from ghostlayers.spans import Span, kept_layers
from ghostlayers.surgery.features import feature_widths

CHECKPOINT = Output()

Weight = tuple[int, str]
"""Of a layer, by its number and its name in it."""


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
    kind, kept = loaded.stored_dtype.itemsize, kept_layers(spans, loaded.num_layers)
    offloaded = is_offloaded(loaded.network)
    if output.save == "adapter":
        added = _added(loaded, method, spans) * kind
        total = _plain(loaded, recipe, method, ())
        return [_adapter(total, added, loaded.num_layers if offloaded else 0, output)]
    base = copied_base(loaded, recipe, output)
    size = result_bytes(loaded, recipe, method, spans, output, base)
    if output.copies(loaded):
        return [_gguf(size, output, size)]
    plain, brought = _plain(loaded, recipe, method, spans), len(kept) if offloaded else 0
    written = [_checkpoint(size, plain, brought, output, started)]
    if output.file is not None:
        layer = max(_numbers(layer) for layer in find_decoder_layers(loaded.network))
        written.append(_gguf(plain, output, layer * kind))
    return written


def copied_base(loaded: DenseModel, recipe: Recipe, output: Output) -> PackedBase | None:
    """The packed model that a folder's weights are copied from, if it is."""
    return None if output.is_file else packed_base(loaded, recipe)


def result_bytes(
    loaded: DenseModel,
    recipe: Recipe,
    method: RepairMethod,
    spans: Sequence[Span],
    output: Output,
    base: PackedBase | None,
) -> int:
    """Bytes of the weights that are written, packed ones as they lie; arguments as above.

    ``base`` is that of `copied_base`. Without spans it is what the dense model takes in the same
    form.
    """
    kept = kept_layers(spans, loaded.num_layers)
    if output.copies(loaded):
        return _copied(loaded, _changed(loaded, method, spans), kept, output)
    if base is None:
        return _plain(loaded, recipe, method, spans)
    changed = _changed(loaded, method, spans)
    names = {f"{base.path}.{layer}.{name}" for layer, name in changed}
    kind = loaded.stored_dtype.itemsize
    return base.bytes_after(kept, names, kind) + added_numbers(loaded, recipe, method, spans) * kind


def _plain(loaded: DenseModel, recipe: Recipe, method: RepairMethod, spans: Sequence[Span]) -> int:
    """The same, none of it packed."""
    sizes = [_numbers(layer) for layer in find_decoder_layers(loaded.network)]
    total = sum(tensor.numel() for tensor in loaded.network.parameters())
    gone = sum(sizes[index] for span in spans for index in span.layers)
    added = added_numbers(loaded, recipe, method, spans)
    return (total - gone + added) * loaded.stored_dtype.itemsize


def added_numbers(
    loaded: DenseModel, recipe: Recipe, method: RepairMethod, spans: Sequence[Span]
) -> int:
    """Numbers that a checkpoint holds beside those of the layers that stay."""
    if recipe.export == "stock-layer":
        return len(spans) * max(map(_numbers, find_decoder_layers(loaded.network)))
    return len(spans) * operator_numbers(method, loaded.hidden_size)


def _changed(loaded: DenseModel, method: RepairMethod, spans: Sequence[Span]) -> set[Weight]:
    """The weights of kept layers that a repair changes."""
    if not spans or not method.writes_weights:
        return set()
    anatomy, changed = loaded.anatomy, set[Weight]()
    gone = {layer for span in spans for layer in span.layers}
    folds = method.writes_weights and not (method.scales or method.form != "fold")
    backs = [*(stage.back for stage in method.before), *([1] if folds else [])]
    for layer in {span.start - back for span in spans for back in backs} - gone:
        changed |= {(layer, name) for name in _writers(loaded, layer, anatomy.mlp_output)}
    if method.scales:
        paths = anatomy.post_norms or (anatomy.attention_output, anatomy.mlp_output)
        behind = set(range(min(span.stop for span in spans), loaded.num_layers)) - gone
        changed |= {
            (layer, name)
            for layer in behind
            for path in paths
            if path is not None
            for name in _writers(loaded, layer, path)
        }
    return changed


def _writers(loaded: DenseModel, layer: int, path: str) -> Iterable[str]:
    if loaded.anatomy.experts and path == loaded.anatomy.mlp_output:
        return writers(loaded.layer(layer), f"{path}.")
    return (f"{path}.weight",)


def _copied(
    loaded: DenseModel, changed: Collection[Weight], kept: Sequence[int], output: Output
) -> int:
    """Bytes of a GGUF file that is copied from the model's own, its header included."""
    assert loaded.base.file is not None
    file = open_gguf(loaded.base.file)
    fallback = fallback_named(output.how.fallback)
    names = {loaded.anatomy.mlp_output: "ffn_down", loaded.anatomy.attention_output: "attn_output"}
    anew = {
        f"blk.{layer}.{names.get(name.removesuffix('.weight'))}.weight" for layer, name in changed
    }
    size = int(file.parts.readers[0].data_offset)
    for name, tensor in file.tensors.items():
        block = name.split(".")[1] if name.startswith("blk.") else str(kept[0])
        if int(block) in kept:
            size += encoded_bytes(tensor, fallback) if name in anew else int(tensor.n_bytes)
    return size


def _numbers(layer: Any) -> int:
    return sum(tensor.numel() for tensor in layer.parameters())


def _added(model: DenseModel, method: RepairMethod, spans: Sequence[Span]) -> int:
    """Numbers of the operators, or of the weights that a fold changes."""
    if method.form == "fold" and not method.solves:
        return 0
    if method.form == "fold" and model.anatomy.experts:
        layer = model.layers[spans[0].start - 1]
        return (
            len(spans)
            * (1 + len(method.before))
            * sum(
                weight.numel() for weight in writers(layer, f"{model.anatomy.mlp_output}.").values()
            )
        )
    hidden = model.hidden_size
    steps = [*(stage.needs for stage in method.before), method.needs]
    return len(spans) * sum(
        sum(feature_widths(model, needs.features).values()) * hidden * max(needs.pieces, default=1)
        for needs in steps
    )


def _checkpoint(size: int, plain: int, brought: int, output: Output, started: float) -> Pass:
    """What is written; ``plain`` are the bytes of the same, none of it packed."""
    return Pass(
        "saving",
        "Writing it, and loading it in a fresh process",
        copies=0,
        brought=2 * brought,
        held=0 if brought else plain,  # the fresh process holds it, while this one waits
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
