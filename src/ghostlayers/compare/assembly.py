"""How the results of a comparison are put together: their head, and a row a model and text."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ghostlayers.compare.choices import Choice
from ghostlayers.compare.experiment import Experiment
from ghostlayers.compare.tasks import differences, task_row
from ghostlayers.compare.types import file_rows, refused_rows
from ghostlayers.compare.writing import writing_rows
from ghostlayers.model.dense import DenseModel
from ghostlayers.report.results import SCHEMA, read_results
from ghostlayers.report.summary import HEALED
from ghostlayers.runtime.files import shown_name
from ghostlayers.runtime.machine import processor_name, versions
from ghostlayers.spans import format_layers, removed_layers

DENSE_NAME = {"layers": 0, "select": "", "repair": "dense", "removed": "none"}
MODEL_KEYS = (
    "held_out_loss_nats",
    "worse_than_none",
    "gaps",
    "boundary_residual",
    "gates",
    "fit_seconds",
)
"""What a cut's part holds of a model beside its description."""


def header(experiment: Experiment) -> dict[str, Any]:
    """Model, protocol and machine, as they stand at the head of the results."""
    request, dense = experiment.request, experiment.study.dense
    fit_windows = experiment.study.windows.first(request.calibration.num_fit_windows)
    return {
        "schema": SCHEMA,
        "ghostlayers": versions()["ghostlayers"],
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": dict(versions()),
        "machine": _machine(dense),
        "model": {
            "name": dense.base.title or Path(dense.base.name).name,
            "num_layers": dense.num_layers,
            "hidden_size": dense.hidden_size,
            "num_parameters": sum(weight.numel() for weight in dense.network.parameters()),
            "licence": dense.base.licence,
        },
        "recipe": {**request.calibration.to_dict(), "fit_windows": len(fit_windows)},
        "comparison": {
            key: value for key, value in request.to_dict().items() if key != "calibration"
        },
        "presets": {
            name: {
                **request.preset_recipe(name, request.layers[0]).to_dict(),
                "data": shown_name(experiment.studies[name].corpus.name),
            }
            for name in request.presets
        },
        "command": None,
        "prompt": request.prompt,
        "corpora": _texts(experiment),
        "skipped": list(experiment.repairs.skipped),
    }


def _machine(dense: DenseModel) -> dict[str, Any]:
    return {
        "processor": processor_name(dense.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(dense.device),
        "dtype": str(dense.dtype).removeprefix("torch."),
    }


def _texts(experiment: Experiment) -> list[dict[str, Any]]:
    """What was measured on, and how many documents of it repairs were fitted on."""
    calibrated_on = {
        document for study in experiment.studies.values() for document in study.windows.documents
    }
    return [
        {
            "name": name,
            "num_windows": len(windows),
            "available_windows": windows.available,
            "sequence_length": windows.sequence_length,
            "bos": windows.bos,
            "calibration_overlap": len(set(windows.documents) & calibrated_on),
        }
        for name, windows in experiment.texts.items()
    ]


def assemble(
    header: dict[str, Any],
    dense: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    choices: Sequence[Sequence[Choice]],
    tables: Mapping[str, Any],
) -> dict[str, Any]:
    """The results as `Results` holds them, as plain values.

    Args:
        header: model, protocol, machine.
        dense: the untouched model's part.
        parts: one a cut.
        choices: that led to each cut.
        tables: scores by number of layers.

    Raises:
        OutputError: a part does not fit the schema.
    """
    measured: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(DENSE_NAME, dense)]
    skipped = list(header.pop("skipped"))
    for part, same in zip(parts, choices, strict=True):
        for name in _names(same):
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
        "prefixes": list(dense["prefixes"]),
        "writing": list(writing_rows(measured)),
        "tasks": [task_row(name, row) for name, rows in answered for row in rows],
        "comparisons": list(differences(answered)),
        "skipped": [*skipped, *refused_rows(measured)],
        **file_rows(measured),
    }
    return read_results(results).to_dict()


def _names(choices: Sequence[Choice]) -> Iterator[dict[str, Any]]:
    """What the rows of the results call the models of one cut."""
    for choice in choices:
        healed = (f"{repair}{HEALED}" for repair in choice.repairs)
        for repair in (*choice.repairs, *healed):
            yield {
                "layers": choice.layers,
                "select": choice.select,
                "repair": repair,
                "removed": format_layers(removed_layers(choice.spans)),
            }
