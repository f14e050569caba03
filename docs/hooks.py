"""What the pages take from the code and the repository when the site is built.

``<!-- options: prune -->`` becomes the options of a command, ``<!-- settings: Recipe -->`` the
fields of a class of settings. Links that leave ``docs/`` lead to copies within the site.
"""

import dataclasses
import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "recipes/README.md": "project/recipes.md",
}
"""Pages outside docs/, by where the site has them."""

ORIGINS = {place: origin for origin, place in PAGES.items()}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (options|settings): ([\w-]+) -->")
ELSEWHERE = re.compile(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"?https?://[^\"> ]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/ and is linked to."""
    for origin, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / origin).read_text("utf-8")))
    linked = {target for file in files.documentation_pages() for target in _targets(file)}
    for target in sorted(linked - set(PAGES)):
        if not target.startswith("docs/") and (ROOT / target).is_file():
            path = str(ROOT / target)
            files.append(File.generated(config, _copy(target), abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is made of the code, and turn links into the site."""
    del config, files
    filled = MARK.sub(lambda found: MAKERS[found[1]](found[2]), markdown)
    uri = page.file.src_uri
    return _outside_fences(filled, lambda text: LINK.sub(lambda m: _turned(m, uri), text))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads anything from elsewhere."""
    del config
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[0]}; the site works without a network")
    return output


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _targets(file: File) -> Iterable[str]:
    """Files of the repository that a page links to."""
    for found in LINK.finditer(FENCE.sub("", file.content_string)):
        yield _resolved(found[2], file.src_uri)


def _resolved(link: str, uri: str) -> str:
    """A relative link of a page, from the root of the repository."""
    origin = ORIGINS.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _copy(target: str) -> str:
    """Where the site has a file that is no page."""
    return f"project/files/{target}"


def _turned(found: re.Match[str], uri: str) -> str:
    """A link as the site has it."""
    target = _resolved(found[2], uri)
    if target.startswith("docs/"):
        place = target.removeprefix("docs/")
    elif target == "README.md":
        place = "index.md"
    else:
        place = PAGES.get(target) or _copy(target)
    return found[1] + posixpath.relpath(place, posixpath.dirname(uri) or ".") + found[3]


def options(command: str) -> str:
    """The options of a command as tables, a panel each."""
    from typer.main import get_command

    from ghostlayers.cli.app import app

    asked = get_command(app).commands[command]._itself().params  # type: ignore[attr-defined]
    panels: dict[str, list[str]] = {}
    for one in asked:
        panel = getattr(one, "rich_help_panel", None)
        panels.setdefault(panel or "Arguments", []).append(_option(one))
    return "\n".join(_table(title, rows) for title, rows in panels.items())


def _option(one: Any) -> str:
    if one.param_type_name == "argument":
        names = [one.metavar or one.name.upper()]
    else:
        names = [*one.opts, *one.secondary_opts]
    value = "" if getattr(one, "is_flag", False) else _value(one)
    said = f"{one.help or ''}{' Required.' if one.required else ''}"
    return f"| {', '.join(f'`{name}`' for name in names)} | {value} | {_cell(said)} |"


def _value(one: Any) -> str:
    if one.param_type_name == "argument":
        return ""
    if one.metavar:
        return _cell(str(one.metavar))
    kind = one.type_descriptor.annotation
    return _cell(_plain(kind))


def _plain(kind: Any) -> str:
    """A type in words."""
    words = {"str": "text", "int": "number", "float": "number", "Path": "path", "bool": ""}
    if choices := getattr(kind, "__args__", None):
        named = [str(each) if isinstance(each, str) else _plain(each) for each in choices]
        return ", ".join(named)
    name = getattr(kind, "__name__", str(kind))
    return words.get(name, name)


def _table(title: str, rows: list[str]) -> str:
    return "\n".join([f"**{title}**", "", "| option | value | what |", "|---|---|---|", *rows, ""])


def settings(name: str) -> str:
    """The fields of a class of settings as a table, with the keys that recipes have for them."""
    from ghostlayers import recipe
    from ghostlayers.cli.parameters import parameter_name
    from ghostlayers.runtime.settings import KEY, fields_of

    head = ["| field | default | what |", "|---|---|---|"]
    rows = []
    for field, defined in fields_of(getattr(recipe, name)).items():
        how = defined.metadata[KEY]
        key = parameter_name(field, how)
        also = "" if key == field else f" (in files `{key}`)"
        default = how.says if how.says is not None else _default(defined.default)
        rows.append(f"| `{field}`{also} | {_cell(default)} | {_cell(how.text)} |")
    return "\n".join(head + rows)


def _default(value: Any) -> str:
    """A default as it is typed; empty for none."""
    if value is dataclasses.MISSING:
        return "required"
    return "" if value in (None, ()) else str(value)


def _cell(text: str) -> str:
    """Plain text within a table."""
    return re.sub(r"[|<>*_\[\]`]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


MAKERS = {"options": options, "settings": settings}
