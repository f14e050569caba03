"""``python -m ghostlayers``."""

from ghostlayers.cli import app

app()
