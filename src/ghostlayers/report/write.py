"""Writing a comparison's results: JSON, Markdown, CSV and a page."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ghostlayers.files import write_whole
from ghostlayers.report.page import render_page
from ghostlayers.report.tables import to_csv, to_markdown


def write_report(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``results.json``, ``results.md``, ``results.csv`` and ``report.html``, each whole.

    Raises:
        OutputError: one cannot be written.
    """
    written = []
    for name, render in RENDERERS.items():
        path = folder / name
        write_whole(path, render(results))
        written.append(path)
    return written


def _json(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=1) + "\n"


RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "results.json": _json,
    "results.md": to_markdown,
    "results.csv": to_csv,
    "report.html": render_page,
}
"""What was measured first, so that no fault of a picture costs the numbers."""
