"""What the models of a comparison write behind the same stretches of its evaluation texts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ghostlayers.compare.experiment import Experiment
from ghostlayers.evaluation.written import (
    Written,
    continuations,
    prefix_texts,
    take_prefixes,
    writing_figures,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = dict[str, Any]


def dense_writing(experiment: Experiment) -> Part:
    """What the dense model writes, kept with the tokens that the others are set beside.

    Returns:
        ``rows``, one a manner, ``prefixes`` as a reader sees them, and the tokens; empty where
        nothing is to be written.
    """
    if not experiment.writes:
        return {}
    part = experiment.store.get(_key("dense", "dense"))
    return part or _measure_dense(experiment)


def _measure_dense(experiment: Experiment) -> Part:
    dense, texts = experiment.study.dense, list(experiment.texts.values())
    prefixes = take_prefixes(texts, experiment.request.continuations, dense.network)
    written = _written(experiment, dense.network, prefixes, "The dense model writes")
    part = {
        "prefixes": list(prefix_texts(dense.tokenizer, prefixes)),
        "prefix_tokens": prefixes.tolist(),
        "tokens": written.greedy.tolist(),
        "rows": _rows(experiment, written, written.greedy),
    }
    return experiment.store.put(_key("dense", "dense"), part)


def cut_writing(
    experiment: Experiment, key: str, repair: str, model: "PreTrainedModel"
) -> list[Part]:
    """What one cut model writes, a row a manner, kept as soon as it is known.

    Args:
        experiment: with the dense model, which scores what is written.
        key: of the cut.
        repair: its name.
        model: built.
    """
    if not experiment.writes:
        return []
    part = experiment.store.get(_key(key, repair))
    if part is None:
        dense = dense_writing(experiment)
        prefixes = torch.tensor(dense["prefix_tokens"])
        written = _written(experiment, model, prefixes, f"{repair} writes")
        rows = _rows(experiment, written, torch.tensor(dense["tokens"]))
        part = experiment.store.put(_key(key, repair), {"rows": rows})
    rows_of_part: list[Part] = part["rows"]
    return rows_of_part


def _key(key: str, repair: str) -> str:
    return f"written {key} {repair}"


def _written(
    experiment: Experiment, model: "PreTrainedModel", prefixes: torch.Tensor, title: str
) -> Written:
    study = experiment.study
    return continuations(model, study.dense.tokenizer, prefixes, title=title)


def _rows(experiment: Experiment, written: Written, dense_greedy: torch.Tensor) -> list[Part]:
    dense = experiment.study.dense
    figures = writing_figures(written, dense_greedy, dense.network, dense.tokenizer)
    return [row.to_dict() for row in figures]


def writing_rows(
    measured: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> Iterator[dict[str, Any]]:
    """What the results hold of it, as plain values of `Writing`.

    Args:
        measured: what the rows call each model, and its part.
    """
    for name, part in measured:
        for row in part.get("written", ()):
            yield {**name, **row}
