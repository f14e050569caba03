"""What others wrote, as it may be shown: without what steers a terminal, and without folders."""

import re
from pathlib import Path
from typing import Any

from ghostlayers.runtime.files import shown_name

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters but for tabs and line breaks, what changes the direction of text, what has no
width, and halves of characters."""

_FOLDERS = r"""(?:[^\s'"`<>|,;:+=()/\\]+[/\\]+)"""
_PATH = re.compile(
    r"""(?<=['"])(?:~|[A-Za-z]:)?[/\\][^'"\n]*[/\\]"""  # between quotes: spaces, too
    r"""|file://[^\s'"`<>|,;]*/"""
    r"""|(?<![\w.~:/\\)\]}>-])"""  # not inside a/b, https://a, ./a
    rf"""(?:~[\w.-]*[/\\]{_FOLDERS}*|(?:[A-Za-z]:)?[/\\]{_FOLDERS}+)"""
)
"""The folders of an absolute path, or of one below a home."""


def clean(text: object) -> str:
    """Text of several lines without control characters."""
    return _STEERING.sub("", str(text))


def unbroken(text: object) -> str:
    """Text without control characters, tabs and line breaks; every space elsewhere stays."""
    return re.sub(r"\s*[\n\t]\s*", " ", clean(text))


def one_line(text: object) -> str:
    """Text without control characters on one line."""
    return " ".join(clean(text).split())


def without_folders(text: str) -> str:
    """Text in which every path of a machine is its last part, be it the whole text or a word."""
    home = str(Path.home())
    for start in (home, home.replace("\\", "/")):
        if len(start) > 1:
            text = text.replace(start, "~")
    return _PATH.sub("", text)


def shared(content: Any) -> Any:
    """Plain values in which paths are only names: where files lay is nobody else's business."""
    if isinstance(content, dict):
        return {shared(key): shared(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [shared(item) for item in content]
    return without_folders(shown_name(content)) if isinstance(content, str) else content


def markdown(text: object) -> str:
    """Text that means only itself in Markdown: no markup, no HTML, no link, nothing of a table."""
    line = without_folders(one_line(text)).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*\[\]|~>!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)
    # What begins a list, a heading or a rule.
    line = re.sub(r"^(\d*)([-+=#.)])(?=[-+=#\s]|$)", r"\1\\\2", line)
    return re.sub(r"(?i)(?<=www)\.|:(?=//)|@", lambda sign: f"&#{ord(sign[0])};", line)


def code(text: object) -> str:
    """Text between the backticks of Markdown, which nothing in it can end."""
    return without_folders(one_line(text)).replace("`", "'").replace("|", "/")
