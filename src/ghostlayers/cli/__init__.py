"""The command line: what is asked, in the package's own terms, and what it says on the screen."""

from ghostlayers.cli.app import app

__all__ = ["app"]
