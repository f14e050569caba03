"""Does a score predict the loss? Rank correlation over every contiguous span of one length."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ghostlayers.compare.request import EVERY
from ghostlayers.report.summary import Entry, summarise
from ghostlayers.spans import format_layers


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank. NaN if either is constant.

    Spearman, American Journal of Psychology 15 (1904).
    """
    ranks = [_ranks(a), _ranks(b)]
    if any(len(set(each)) < 2 for each in ranks):
        return float("nan")
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            ranks[index] = (start + stop - 1) / 2
        start = stop
    return ranks


def correlations(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By number of layers and repair: how each score ranks the spans by their mean loss.

    Only where every contiguous span was measured. A high cosine should mean a low loss, so its
    sign is turned: 1 is a perfect prediction for every score.
    """
    found = []
    entries = summarise(results)
    for layers, table in results["scores"].items():
        spans = {format_layers(range(each["start"], each["stop"])): each for each in table["spans"]}
        for repair, losses in _losses(entries, int(layers)).items():
            for score, sign in (("cosine", -1.0), ("residual", 1.0)):
                names = [name for name in losses if spans.get(name, {}).get(score) is not None]
                if len(names) < 3:
                    continue
                values = [sign * spans[name][score] for name in names]
                found.append(
                    {
                        "layers": int(layers),
                        "repair": repair,
                        "score": score,
                        "spans": len(names),
                        "spearman": spearman(values, [losses[name] for name in names]),
                    }
                )
    return found


def _losses(entries: Sequence[Entry], layers: int) -> dict[str, dict[str, float]]:
    """Mean loss over corpora by repair and span."""
    found: dict[str, dict[str, float]] = {}
    for each in entries:
        every = each.key.select.startswith(f"{EVERY}:")
        if each.key.layers == layers and every and each.loss is not None:
            found.setdefault(each.key.repair, {})[each.removed] = each.loss
    return found
