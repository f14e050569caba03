"""Does a score predict the loss? Rank correlation over every contiguous span of one length."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ghostlayers.compare.request import EVERY


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
    for layers, table in results["scores"].items():
        spans = {_text(each): each for each in table["spans"]}
        for repair, losses in _losses(results["cells"], int(layers)).items():
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


def _text(span: Mapping[str, Any]) -> str:
    first, last = span["start"], span["stop"] - 1
    return str(first) if first == last else f"{first}-{last}"


def _losses(cells: Sequence[Mapping[str, Any]], layers: int) -> dict[str, dict[str, float]]:
    """Mean loss over corpora by repair and span."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        if cell["layers"] == layers and cell["select"].startswith(f"{EVERY}:"):
            by_span = found.setdefault(cell["repair"], {})
            by_span.setdefault(cell["removed"], []).append(cell["loss_nats"])
    return {
        repair: {span: statistics.fmean(values) for span, values in by_span.items()}
        for repair, by_span in found.items()
    }
