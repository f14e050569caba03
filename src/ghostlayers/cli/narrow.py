"""Help on a narrow screen."""

import shutil
from typing import Any

from typer.core import TyperCommand

WIDE = 110
"""Columns from which on rich's panels have room for names and for what is said of them."""


class Readable(TyperCommand):
    """A command whose help is plain where panels would cut names and leave a column of words."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, as the screen's width allows."""
        if shutil.get_terminal_size().columns < WIDE:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by panel, each panel with its name."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if param.param_type_name == "argument" else "Options"
                panel = getattr(param, "rich_help_panel", None) or kind
                panels.setdefault(panel, []).append((record[0], record[1].replace("\\[", "[")))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)
