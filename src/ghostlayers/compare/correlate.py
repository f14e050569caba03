"""Does a score predict the loss? Rank correlation over every contiguous span of one length."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ghostlayers.compare.request import EVERY
from ghostlayers.report.results import Correlation, read_results
from ghostlayers.report.summary import Entry, summarise
from ghostlayers.spans import format_layers


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank. NaN if either is constant.

    Spearman, American Journal of Psychology 15 (1904).
    """
    ranks = [_ranks(a), _ranks(b)]
    if any(len(set(values)) < 2 for values in ranks):
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

    Args:
        results: as `assembly.assemble` gives them.

    Returns:
        Plain values of `Correlation`.
    """
    read = read_results(results)
    entries = summarise(read)
    rows = []
    for layers, table in read.scores.items():
        spans = {format_layers(range(span.start, span.stop)): span for span in table.spans}
        for repair, losses in _losses(entries, int(layers)).items():
            known = [(spans[name], loss) for name, loss in losses.items() if name in spans]
            for score, sign in (("cosine", -1.0), ("residual", 1.0)):
                pairs = [
                    (sign * value, loss)
                    for span, loss in known
                    if (value := getattr(span, score)) is not None
                ]
                if len(pairs) >= 3:
                    rho = spearman(*zip(*pairs, strict=True))
                    row = Correlation(
                        layers=int(layers), repair=repair, score=score, spans=len(pairs),
                        spearman=rho if math.isfinite(rho) else None,
                    )  # fmt: skip
                    rows.append(row.to_dict())
    return rows


def _losses(entries: Sequence[Entry], layers: int) -> dict[str, dict[str, float]]:
    """Mean loss over corpora by repair and span."""
    losses: dict[str, dict[str, float]] = {}
    for entry in entries:
        every = entry.key.select.startswith(f"{EVERY}:")
        if entry.key.layers == layers and every and entry.loss is not None:
            losses.setdefault(entry.key.repair, {})[entry.removed] = entry.loss
    return losses
