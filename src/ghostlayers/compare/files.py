"""Writing a comparison's results: JSON, Markdown, CSV and a page."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ghostlayers.compare.store import write_report_file
from ghostlayers.report.page import render_page
from ghostlayers.report.results import Results, read_results
from ghostlayers.report.tables import tasks_to_csv, to_csv, to_markdown
from ghostlayers.runtime.documents import to_json
from ghostlayers.runtime.shown import shared


def write_report(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``results.json``, ``results.md``, ``results.csv`` and ``report.html``, each whole.

    No path of this machine is in them, only names.
    Where tasks were answered, ``tasks.csv`` comes beside them.

    Args:
        results: plain values of `Results`, of this version or an older one.
        folder: where to.

    Raises:
        OutputError: one cannot be written, or the results are of another shape.
    """
    written, shown = [], read_results(shared(results))
    for name, render in RENDERERS.items():
        content = render(shown)
        if content is not None:
            write_report_file(folder / name, content)
            written.append(folder / name)
    return written


def _json(results: Results) -> str:
    return to_json(results.to_dict(), indent=1)


RENDERERS: dict[str, Callable[[Results], str | None]] = {
    "results.json": _json,
    "results.md": to_markdown,
    "results.csv": to_csv,
    "tasks.csv": tasks_to_csv,
    "report.html": render_page,
}
"""What was measured first, so that no fault of a picture costs the numbers."""
