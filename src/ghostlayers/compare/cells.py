"""What is told of one model of a comparison, and how the results are put together."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ghostlayers.checkpoint.record import repair_row
from ghostlayers.compare.request import Comparison
from ghostlayers.compare.tasks import differences, task_row
from ghostlayers.evaluation.continuation import continue_text
from ghostlayers.evaluation.speed import prefill_times
from ghostlayers.model.configs import head_width, kv_heads
from ghostlayers.repairs.base import Repair
from ghostlayers.repairs.method import RepairMethod
from ghostlayers.report.summary import NOT_SAVABLE
from ghostlayers.spans import Span, format_layers, removed_layers

SPEED_KEYS = ("prefill_ms", "prefill_spread_ms", "prefill_tokens")
REPEATS = 5


def describe_model(
    model: Any,
    tokenizer: Any,
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
    found: dict[str, Any] = {
        "num_parameters": sum(each.numel() for each in model.parameters()),
        "kv_bytes_per_token": cached * model.dtype.itemsize,
        "added_parameters": 0,
        "checkpoint": "stock",
        **(speed or measure_speed(model, request)),
    }
    if request.prompt:
        found["continuation"] = continue_text(model, tokenizer, request.prompt, request.new_tokens)
    return found


def measure_speed(model: Any, request: Comparison) -> dict[str, Any]:
    """Milliseconds to read a prompt of one window: median, and spread between the quartiles."""
    if not request.speed:
        return dict.fromkeys(SPEED_KEYS)
    length = request.window_length
    times = [1000 * each for each in prefill_times(model, length, REPEATS)]
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
        shapes.append(tuple(sorted((name, tuple(each.shape)) for name, each in both)))
    return tuple(shapes)


def checkpoint_kind(method: RepairMethod, repairs: Iterable[Repair]) -> str:
    """In what form the repaired model could be saved."""
    if not method.savable:
        return NOT_SAVABLE
    return "custom" if any(each.operator is not None for each in repairs) else "stock"


def describe_gap(span: Span, repair: Repair) -> dict[str, Any]:
    """What a fit says about itself."""
    return {**repair_row(span, repair), "scale": repair.scale}


def describe_operators(repairs: Mapping[Span, Repair]) -> list[dict[str, Any]]:
    """What is told of the maps M of a cut, of those repairs that are one."""
    found = (describe_operator(span, repair) for span, repair in repairs.items())
    return [each for each in found if each is not None]


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


def assemble(
    header: dict[str, Any],
    labels: Mapping[str, str],
    dense: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[Any]],
    tables: Mapping[str, Any],
) -> dict[str, Any]:
    """The results: one object a cell and corpus under ``cells``, one a cell under ``models``.

    Args:
        header: model, protocol, machine.
        labels: what the corpora are called.
        dense: the untouched model's part.
        parts: one a cut.
        members: the cells of each cut.
        tables: scores by number of layers.
    """
    nothing = {"layers": 0, "select": "", "repair": "dense", "removed": "none"}
    cells = _loss_cells(nothing, dense["losses"], labels)
    models: list[dict[str, Any]] = [{**nothing, **dense["model"]}]
    operators: list[dict[str, Any]] = []
    skipped = list(header.pop("skipped"))
    answered: list[tuple[Mapping[str, Any], Any]] = [(nothing, dense["tasks"])]
    for part, group in zip(parts, members, strict=True):
        for member in group:
            for repair in member.repairs:
                name = {
                    "layers": member.layers,
                    "select": member.select,
                    "repair": repair,
                    "removed": format_layers(removed_layers(member.spans)),
                }
                found = part["repairs"].get(repair)
                if found is None:
                    reasons = [each for each in part["skipped"] if each["repair"] == repair]
                    skipped.extend({**name, **each} for each in reasons)
                    continue
                cells.extend(_loss_cells(name, found["losses"], labels))
                if found["tasks"]:
                    answered.append((name, found["tasks"]))
                keys = ("held_out_loss_nats", "worse_than_none", "gaps", "boundary_residual")
                models.append(
                    {
                        **name,
                        **found["model"],
                        **{key: found[key] for key in keys},
                        "fit_seconds": part["fit_seconds"],
                    }
                )
                operators.extend({**name, **each} for each in found["operators"])
    return {
        **header,
        "cells": cells,
        "models": models,
        "scores": dict(tables),
        "operators": operators,
        "tasks": [task_row(name, row) for name, rows in answered for row in rows],
        "comparisons": list(differences(answered)),
        "skipped": skipped,
    }


def _loss_cells(
    name: Mapping[str, Any], losses: Mapping[str, Any], labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    return [{**name, "corpus": labels[corpus], **values} for corpus, values in losses.items()]
