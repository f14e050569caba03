"""The best cuts of a model as a table, on the screen and on the page."""

from collections.abc import Iterator

from ghostlayers.report.results import Recommended, Results
from ghostlayers.report.rows import MeasuredModel
from ghostlayers.report.words import decimal, percent

HEAD = (
    *("less, for", "removed", "repair", "above dense", "KL", "loops"),
    *("weights", "cache", "prefill"),
)

Cells = tuple[str, ...]


def recommended_grid(results: Results) -> tuple[Cells, list[Cells]]:
    """The head, and a row a share and engine; what it gains as shares of the dense model's."""
    return HEAD, list(_rows(results))


def _rows(results: Results) -> Iterator[Cells]:
    dense = next(model for model in results.models if model.key.is_dense)
    for row in results.recommended:
        yield (
            *(f"{row.less}, {row.engine}", row.removed, row.method),
            *(decimal(row.excess_nats), decimal(row.kl_nats), percent(row.loops)),
            *gains(row, dense),
        )


def gains(row: Recommended, dense: MeasuredModel) -> Cells:
    """Weights, cache and time, as shares of the dense model's."""
    return (
        _share(row.num_parameters, dense.num_parameters),
        _share(row.kv_bytes_per_token, dense.kv_bytes_per_token),
        _share(row.prefill_ms, dense.prefill_ms),
    )


def _share(mine: float | None, whole: float | None) -> str:
    return percent(None if mine is None or not whole else mine / whole)
