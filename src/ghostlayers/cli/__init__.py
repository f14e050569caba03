"""The command line: each command is a thin shell over one public function."""

from ghostlayers.cli.app import app

__all__ = ["app"]
