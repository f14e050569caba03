"""``python -m ghostlayers``."""

from ghostlayers.cli import app

app(prog_name="ghostlayers")  # as where it is installed, for usage and for the completion of shells
