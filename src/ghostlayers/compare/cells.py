"""What is told of one model of a comparison, and how the results are put together."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ghostlayers.checkpoint.record import repair_row
from ghostlayers.compare.request import Comparison
from ghostlayers.compare.tasks import differences, task_row
from ghostlayers.compare.types import file_rows, refused_rows
from ghostlayers.evaluation.continuation import continue_text
from ghostlayers.evaluation.speed import prefill_times
from ghostlayers.model.configs import head_width, kv_heads
from ghostlayers.repairs.base import Repair
from ghostlayers.repairs.method import RepairMethod
from ghostlayers.report.results import read_results
from ghostlayers.report.summary import NOT_SAVABLE, STOCK
from ghostlayers.spans import Span, format_layers, removed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEED_KEYS = ("prefill_ms", "prefill_spread_ms", "prefill_tokens")
REPEATS = 5


def describe_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    request: Comparison,
    speed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Size, speed and continuation of one model, dense or cut.

    Args:
        model: it.
        tokenizer: its tokenizer.
        request: what is asked of it.
        speed: measured on a model of the same shape already.
    """
    config = model.config
    cached = 2 * config.num_hidden_layers * kv_heads(config) * head_width(config)
    described: dict[str, Any] = {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "kv_bytes_per_token": cached * model.dtype.itemsize,
        "added_parameters": 0,
        "checkpoint": STOCK,
        **(speed or measure_speed(model, request)),
    }
    if request.prompt:
        described["continuation"] = continue_text(
            model, tokenizer, request.prompt, request.new_tokens
        )
    return described


def measure_speed(model: "PreTrainedModel", request: Comparison) -> dict[str, Any]:
    """Milliseconds to read a prompt of one window: median, and spread between the quartiles."""
    if not request.speed:
        return dict.fromkeys(SPEED_KEYS)
    length = request.window_length
    times = [1000 * seconds for seconds in prefill_times(model, length, REPEATS)]
    low, _, high = statistics.quantiles(times, n=4)
    return dict(zip(SPEED_KEYS, (statistics.median(times), high - low, length), strict=True))


def runtime_shape(repairs: Iterable[Repair]) -> tuple[Any, ...]:
    """What a repair's running time depends on: the shapes of its operators."""
    shapes: list[tuple[Any, ...]] = []
    for repair in repairs:
        operator = repair.operator
        if operator is None:
            shapes.append(())
            continue
        both = [*operator.parameters.items(), *operator.maps.items()]
        shapes.append(tuple(sorted((name, tuple(tensor.shape)) for name, tensor in both)))
    return tuple(shapes)


def checkpoint_kind(method: RepairMethod, repairs: Iterable[Repair]) -> str:
    """In what form the repaired model could be saved."""
    if not method.savable:
        return NOT_SAVABLE
    return "custom" if any(repair.operator is not None for repair in repairs) else STOCK


def describe_gap(span: Span, repair: Repair) -> dict[str, Any]:
    """What a fit says about itself."""
    return {**repair_row(span, repair), "scale": repair.scale}


def describe_operators(repairs: Mapping[Span, Repair]) -> list[dict[str, Any]]:
    """What is told of the maps M of a cut, of those repairs that are one."""
    rows = (describe_operator(span, repair) for span, repair in repairs.items())
    return [row for row in rows if row is not None]


def describe_operator(span: Span, repair: Repair) -> dict[str, Any] | None:
    """Spectrum of M and the shares of its norm that are symmetric and antisymmetric."""
    delta = repair.delta
    if delta is None:
        return None
    whole = float(delta.norm())
    if whole == 0.0:
        return None
    return {
        "span": [span.start, span.stop],
        "singular_values": torch.linalg.svdvals(delta).tolist(),
        "symmetric_share": float((delta + delta.T).norm()) / 2 / whole,
        "antisymmetric_share": float((delta - delta.T).norm()) / 2 / whole,
        "identity_distance": whole / delta.shape[0] ** 0.5,
    }


DENSE_NAME = {"layers": 0, "select": "", "repair": "dense", "removed": "none"}
MODEL_KEYS = (
    "held_out_loss_nats",
    "worse_than_none",
    "gaps",
    "boundary_residual",
    "fit_seconds",
)
"""What a cut's part holds of a model beside its description."""


def assemble(
    header: dict[str, Any],
    dense: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[Any]],
    tables: Mapping[str, Any],
) -> dict[str, Any]:
    """The results as `Results` holds them, as plain values.

    Args:
        header: model, protocol, machine.
        dense: the untouched model's part.
        parts: one a cut.
        members: the cells of each cut.
        tables: scores by number of layers.

    Raises:
        OutputError: a part does not fit the schema.
    """
    measured: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(DENSE_NAME, dense)]
    skipped = list(header.pop("skipped"))
    for part, group in zip(parts, members, strict=True):
        for name in _names(group):
            model = part["repairs"].get(name["repair"])
            if model is not None:
                measured.append((name, {**model, "fit_seconds": part["fit_seconds"]}))
                continue
            reasons = [row for row in part["skipped"] if row["repair"] == name["repair"]]
            skipped.extend({**name, **row} for row in reasons)
    answered = [(name, part["tasks"]) for name, part in measured if part["tasks"]]
    results = {
        **header,
        "cells": [
            {**name, "corpus": corpus, **values}
            for name, part in measured
            for corpus, values in part["losses"].items()
        ],
        "models": [
            {**name, **part["model"], **{key: part[key] for key in MODEL_KEYS if key in part}}
            for name, part in measured
        ],
        "scores": dict(tables),
        "operators": [
            {**name, **row} for name, part in measured for row in part.get("operators", ())
        ],
        "tasks": [task_row(name, row) for name, rows in answered for row in rows],
        "comparisons": list(differences(answered)),
        "skipped": [*skipped, *refused_rows(measured)],
        **file_rows(measured),
    }
    return read_results(results).to_dict()


def _names(members: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """What the rows of the results call the models of one cut."""
    for member in members:
        for repair in member.repairs:
            yield {
                "layers": member.layers,
                "select": member.select,
                "repair": repair,
                "removed": format_layers(removed_layers(member.spans)),
            }
