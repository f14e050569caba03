"""Writing a comparison's results: JSON, Markdown, CSV and a page."""

import json
from collections.abc import Mapping
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
    content = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "results.md": to_markdown(results),
        "results.csv": to_csv(results),
        "report.html": render_page(results),
    }
    written = []
    for name, text in content.items():
        path = folder / name
        write_whole(path, text)
        written.append(path)
    return written
