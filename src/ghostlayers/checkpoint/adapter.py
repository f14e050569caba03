"""A repaired model as what distinguishes it from its base: spans, operators, refitted projections.

An adapter is megabytes where a checkpoint is gigabytes. It names its base model by a hash of every
weight, and is not put on any other.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ghostlayers.checkpoint import proof, records, saving
from ghostlayers.checkpoint.packed import PackedBase
from ghostlayers.errors import ModelError, RecipeError
from ghostlayers.model import multimodal
from ghostlayers.model.computing import DTYPES
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.model.residency import sorted_parameters
from ghostlayers.model.weights import as_stored
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.runtime.outputs import check_output
from ghostlayers.runtime.places import base_of, check_apart
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from ghostlayers.surgery.folding import layer_weights
from ghostlayers.surgery.stock_layer import as_stock_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter.safetensors"

Weights = dict[int | None, dict[str, Tensor]]
"""Changed parameters by layer of the base model; those outside its layers under None."""

OUTSIDE = "model."
"""Before the names of changed parameters that are in no layer."""

SAME_ANSWERS = 0.02
"""Relative difference of logits up to which a base is the same; bfloat16 differs by less."""


@dataclass(frozen=True)
class Adapter:
    """What a folder of an adapter holds.

    Attributes:
        record: its provenance.
        repairs: operators and scales, one repair a gap; folds are in ``folded``.
        folded: changed parameters, by repairs' folds or by training.
    """

    record: dict[str, Any]
    repairs: dict[Span, Repair]
    folded: Weights

    @property
    def spans(self) -> tuple[Span, ...]:
        """The removed layers."""
        return tuple(Span(start, stop) for start, stop in self.record["cut"]["spans"])

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type of the base model's weights on disk."""
        return DTYPES[self.record["base_model"]["stored_dtype"]]


def weights_hash(model: "PreTrainedModel", stored_dtype: torch.dtype) -> str:
    """SHA-256 of every parameter's name, shape and bytes in the type they are stored in."""
    digest = hashlib.sha256()
    for name, tensor in sorted_parameters(model):
        stored = as_stored(tensor, stored_dtype).cpu().contiguous()
        digest.update(f"{name} {tuple(stored.shape)} {stored.dtype}".encode())
        digest.update(stored.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_precision(loaded: DenseModel, stored_dtype: torch.dtype) -> None:
    """Refuse a model that computes in a type which rounds its weights on disk.

    Raises:
        RecipeError: its weights cannot be told from another model's any more.
    """
    computes_in = loaded.network.dtype
    if torch.promote_types(computes_in, stored_dtype) != computes_in:
        stored, rounded = map(proof.plain_dtype, (stored_dtype, computes_in))
        raise RecipeError(
            f"an adapter knows its base by the weights on disk, in {stored}, which {rounded} "
            f"rounds. Pass --dtype {' or '.join(dict.fromkeys((stored, 'float32')))}."
        )


def answers(model: "PreTrainedModel") -> list[float]:
    """The highest logit after each of some tokens: what config and buffers make of the weights."""
    logits = proof.logits_of_some_tokens(model)
    return [round(float(logit), 4) for logit in logits[0].max(dim=-1).values]


def _check_answers(model: "PreTrainedModel", known: list[float] | None, name: str) -> None:
    if known is None:  # an adapter older than this check
        return
    computed, wanted = torch.tensor(answers(model)), torch.tensor(known)
    if not (computed - wanted).norm() <= SAME_ANSWERS * wanted.norm():
        raise ModelError(
            f"'{name}' has the weights that this adapter was made on, but computes something else "
            "with them: its config.json was changed (rope_theta, a norm's eps, ...)."
        )


def save_adapter(
    out: Path,
    dense: DenseModel,
    model: "PreTrainedModel",
    repairs: Mapping[Span, Repair],
    record: dict[str, Any],
    *,
    weights: Weights | None = None,
    overwrite: bool = False,
) -> proof.Verification:
    """Write an adapter, and prove that it makes the same model of the base again.

    Args:
        out: the folder to make.
        dense: the base model.
        model: the repaired one that it must make.
        repairs: one a gap.
        record: provenance.
        weights: changed parameters, where they are known, instead of the repairs' folds.
        overwrite: replace what Ghostlayers made.

    Raises:
        OutputError: see `outputs.check_output`.
        RecipeError: see `check_precision`.
        VerificationError: the rebuilt model differs; nothing is left behind.
    """
    stored = dense.stored_dtype
    check_precision(dense, stored)
    folded = _folded(dense, repairs) if weights is None else weights
    tensors, gaps = _tensors(dense, repairs, folded)
    base = {
        **record["base_model"],
        "sha256": weights_hash(dense.network, stored),
        "stored_dtype": proof.plain_dtype(stored),
        "answers": answers(dense.network),
    }
    record = {**record, "base_model": base, "gaps": gaps, "mode": "adapter"}

    def prove(folder: Path) -> proof.Verification:
        return proof.compare_logits(_rebuild(dense, _read(folder, record)), model)

    return saving.save_tensors(out, WEIGHTS, tensors, record, prove, overwrite=overwrite)


def _folded(model: DenseModel, repairs: Mapping[Span, Repair]) -> Weights:
    """What the repairs' folds change."""
    folded: Weights = {}
    for span, repair in repairs.items():
        for layer, weights in layer_weights(model, span, repair).items():
            folded.setdefault(layer, {}).update(weights)
    return folded


def _tensors(
    model: DenseModel, repairs: Mapping[Span, Repair], folded: Weights
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What is written, by name, and what the record says of it."""
    tensors: dict[str, Tensor] = {}
    gaps = []
    for span, repair in repairs.items():
        operator = repair.operator or Operator()
        for name, value in operator.parameters.items():
            tensors[f"operator.{span.start}-{span.stop}.{name}"] = value.to(model.stored_dtype)
        gaps.append(
            {
                "span": [span.start, span.stop],
                "method": repair.method,
                "operator": list(operator.parameters),
                "eps": operator.eps,
                "scale": repair.scale,
            }
        )
    for layer, weights in folded.items():
        prefix = OUTSIDE if layer is None else f"layer.{layer}."
        for name, value in weights.items():
            tensors[f"{prefix}{name}"] = value.to(model.stored_dtype)
    return {name: logit.cpu().contiguous() for name, logit in tensors.items()}, gaps


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter from its folder.

    Raises:
        ModelError: the folder holds none, or a damaged one.
    """
    record = records.inspect(folder)
    if record["mode"] != "adapter":
        raise ModelError(
            f"'{folder}' holds a whole model, not an adapter: load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    try:
        if WEIGHTS not in record["files"]:
            raise ValueError(f"its record names no {WEIGHTS}")
        records.check_files(Path(folder), {"files": {WEIGHTS: record["files"][WEIGHTS]}})
        return _read(Path(folder), record)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"'{folder}' is damaged: {error}. Get it again.") from error


def _read(folder: Path, record: dict[str, Any]) -> Adapter:
    tensors = load_file(folder / WEIGHTS)
    repairs, folded = {}, Weights()
    for gap in record["gaps"]:
        span = Span(*gap["span"])
        prefix = f"operator.{span.start}-{span.stop}."
        parameters = {name: tensors[prefix + name] for name in gap["operator"]}
        operator = Operator(parameters, eps=gap["eps"]) if parameters else None
        repairs[span] = Repair(gap["method"], operator, scale=gap["scale"])
    for name, tensor in tensors.items():
        if name.startswith("layer."):
            _, layer, path = name.split(".", 2)
            folded.setdefault(int(layer), {})[path] = tensor
        elif name.startswith(OUTSIDE):
            folded.setdefault(None, {})[name.removeprefix(OUTSIDE)] = tensor
    return Adapter(record, repairs, folded)


def _rebuild(dense: DenseModel, adapter: Adapter) -> "PreTrainedModel":
    inside = {layer: logit for layer, logit in adapter.folded.items() if layer is not None}
    model: PreTrainedModel = removal.prune_layers(
        dense, adapter.spans, adapter.repairs, folded=inside
    )
    outside = adapter.folded.get(None, {})
    like = {name: tensor.to(model.get_parameter(name)) for name, tensor in outside.items()}
    model = removal.with_weights(model, like)
    if adapter.record["recipe"].get("export") == "stock-layer":
        model = as_stock_layers(dense, model, adapter.spans, adapter.repairs)
    return model


def open_adapter(
    folder: str | Path, base: str | Path | None = None, options: RunOptions | None = None
) -> "tuple[PreTrainedModel, DenseModel, Adapter]":
    """The repaired model, its base and the adapter; see `from_adapter`."""
    adapter = read_adapter(folder)
    known = adapter.record["base_model"]
    name, revision = (base, None) if base else (known["name"], known["revision"])
    if base is None and not known["on_hub"] and not Path(name).exists():
        raise ModelError(
            f"the adapter was made on '{name}', which is not on this machine. Say where that model "
            "is now (base=..., or --base on the command line)."
        )
    dense = load_model(str(name), options or RunOptions(), revision)
    check_precision(dense, adapter.stored_dtype)
    digest = weights_hash(dense.network, adapter.stored_dtype)
    if digest != known["sha256"]:
        raise ModelError(
            f"'{dense.base.name}' is not the model that this adapter was made on: its weights hash "
            f"to {digest[:12]}..., expected {known['sha256'][:12]}... ({known['name']}, revision "
            f"{known['revision'] or 'unknown'})."
        )
    dense.stored_dtype = adapter.stored_dtype
    _check_answers(dense.network, known.get("answers"), dense.base.name)
    return _rebuild(dense, adapter), dense, adapter


def from_adapter(
    folder: str | Path, base: str | Path | None = None, options: RunOptions | None = None
) -> "PreTrainedModel":
    """Build the repaired model that an adapter describes.

    Args:
        folder: the adapter's.
        base: where the base model is, if not where it was when the adapter was made.
        options: dtype and device.

    Returns:
        A transformers model, as `from_pretrained` on the whole checkpoint would give it.

    Raises:
        ModelError: the base model cannot be found, or is not the one it was made on.
    """
    whole: PreTrainedModel = multimodal.whole_of(open_adapter(folder, base, options)[0])
    return whole


def materialize(
    folder: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    options: RunOptions | None = None,
    *,
    overwrite: bool = False,
) -> proof.Verification:
    """Write the whole checkpoint that an adapter describes, and prove that it reloads.

    Arguments as for `from_adapter`; ``out`` is the folder to make.

    Raises:
        ModelError: see `from_adapter`.
        OutputError: see `outputs.check_output`.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite, needed_bytes=0)
    check_apart({"adapter": [folder], "base": [base or base_of(folder)]}, {"output": out})
    model, dense, adapter = open_adapter(folder, base, options)
    record = {key: value for key, value in adapter.record.items() if key not in ("gaps", "files")}
    stays_packed = adapter.record["recipe"].get("quantized") == "keep"
    return saving.save_checkpoint(
        out, model, dense.tokenizer, record,
        stored_dtype=adapter.stored_dtype, base_folder=dense.base.folder,
        processor=dense.processor, packed=PackedBase.of(dense) if stays_packed else None,
        overwrite=overwrite,
    )  # fmt: skip
