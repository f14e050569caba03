"""From matplotlib's pictures to SVG for a page, coloured by the page's style sheet."""

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from ghostlayers.runtime.shown import clean, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = {
    "page": ("#ffffff", "#14171b"),
    "raised": ("#f5f6f8", "#1d2126"),
    "text": ("#1b1f24", "#e7eaee"),
    "quiet": ("#59626d", "#a5afba"),
    "line": ("#d5dae0", "#3a424b"),
    "grid": ("#e6e9ed", "#2a3037"),
    "faint": ("#a3abb5", "#7b8692"),
    "accent": ("#0068a9", "#62b8f4"),
    "good": ("#00694c", "#51d6a6"),
    "bar": ("#cfe3f3", "#1f4460"),
    "band": ("#f3d9c9", "#4b3020"),
    "c0": ("#50585f", "#b4bdc6"),
    "c1": ("#a8457f", "#f09ac8"),
    "c2": ("#8a6500", "#e6c04a"),
    "c3": ("#0068a8", "#62b8f3"),
    "c4": ("#c84e00", "#ff8f52"),
    "c5": ("#00795a", "#45d0a0"),
    "c6": ("#6a4bc4", "#b7a0ff"),
    "c7": ("#1b1f25", "#ffffff"),
}
"""Every colour of the page on light and on dark ground; no two light ones are the same.

A picture is drawn in the light ones, and each is replaced by the variable of its name.
"""

LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()}

MARKERS = ("o●", "s■", "D◆", "^▲", "v▼", "X✖", "o○", "s□")
"""Of matplotlib and in text; they tell the series apart without their colours."""

HOLLOW = 6
"""The first marker that is not filled."""

DASHES: tuple[Any, ...] = (
    *("-", (0, (3, 1.3)), (0, (4, 1.3, 1, 1.3)), "-"),
    *((0, (6, 1.3)), (0, (5, 1, 1, 1)), (0, (2, 1)), "-"),
)
"""Of the lines with those markers: one that lies on another lets it be seen."""

WIDTH = 420.0
LINE = 16.0
"""Of a picture, and the height of a line of its text, in points."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ghostlayers",
    "text.parse_math": False,
    "font.size": 13.0,
    "text.color": LIGHT["quiet"],
    "axes.labelcolor": LIGHT["quiet"],
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["grid"],
    "xtick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["quiet"],
    "ytick.labelcolor": LIGHT["quiet"],
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "figure.facecolor": "none",
}
"""matplotlib's settings while a page is drawn."""


@dataclass(frozen=True)
class Style:
    """How a series looks everywhere on the page.

    Attributes:
        index: which colour and marker; None for the thin grey ones.
        number: the series' number on the page, by which the legend finds it.
    """

    index: int | None = None
    number: int | None = None

    @property
    def colour(self) -> str:
        """The name of its colour in `PALETTE`."""
        return "faint" if self.index is None else f"c{self.index % len(MARKERS)}"

    @property
    def glyph(self) -> str:
        """Its marker as a character."""
        return "•" if self.index is None else MARKERS[self.index % len(MARKERS)][1]

    def marked(self, size: float = 8.0) -> dict[str, Any]:
        """The arguments of matplotlib for its colour and marker."""
        colour = LIGHT[self.colour]
        if self.index is None:
            return {"color": colour, "marker": "o", "ms": size / 2, "mew": 0, "lw": 1.0}
        place = self.index % len(MARKERS)
        inside, edge, width = (
            (LIGHT["page"], colour, 2.0) if place >= HOLLOW else (colour, LIGHT["page"], 0.8)
        )
        marker = {"marker": MARKERS[place][0], "ms": size, "mfc": inside, "mec": edge}
        return {"color": colour, "mew": width, "lw": 2.2, "ls": DASHES[place], **marker}


def new_axes(
    height: float = 300.0,
    *,
    left: float = 62.0,
    right: float = 14.0,
    top: float = 14.0,
    bottom: float = 50.0,
) -> "Axes":
    """Axes in a picture of their own, with so much room around them; all in points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    width = (WIDTH - left - right) / WIDTH
    return figure.add_axes((left / WIDTH, bottom / height, width, (height - top - bottom) / height))


def titled(title: str, style: Style | None = None) -> str:
    """The ``gid`` of what is drawn, by which it gets a title that a pointer sees."""
    number = "" if style is None or style.number is None else style.number
    return f"title {number} {one_line(title)}"


def to_svg(axes: "Axes", label: str) -> Markup:
    """A picture as part of a page; ``label`` is what a screen reader says of it.

    The same picture has the same bytes. Ids that nothing refers to go, the others are made unique
    by the label. Nothing is clipped.
    """
    written = io.StringIO()
    with warnings.catch_warnings():
        # The page's font may have letters that matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        axes.figure.savefig(written, format="svg", metadata=none)  # type: ignore[union-attr]
    svg = re.sub(r'<\?xml.*?\?>|<!DOCTYPE.*?>| xmlns(:xlink)?="[^"]*"', "", written.getvalue(),
                 flags=re.DOTALL)  # fmt: skip
    root = ElementTree.fromstring(clean(svg.replace("xlink:href", "href")))  # noqa: S314  our own
    for child in root.findall("defs"):  # a style sheet, which would hold for the whole page
        root.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "class": "plot"}
    root.set("aria-label", clean(label))
    prefix = hashlib.sha256(label.encode("utf-8", "replace")).hexdigest()[:8]
    for element in list(root.iter()):
        _tidy(element, prefix)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  text is escaped


def _tidy(element: ElementTree.Element, prefix: str) -> None:
    """A title, unique ids, variables for colours, the page's font, shorter numbers."""
    attributes = element.attrib
    name = attributes.pop("id", "")
    if name.startswith("title "):
        _, number, title = name.split(" ", 2)
        if number:
            attributes["data-r"] = number
        shown = ElementTree.Element("title")
        shown.text = title
        element.insert(0, shown)
    elif element.tag == "path" and name:  # a marker, used elsewhere
        attributes["id"] = prefix + name
    attributes.pop("clip-path", None)
    if "href" in attributes:
        attributes["href"] = f"#{prefix}{attributes['href'][1:]}"
    if "style" in attributes:
        style = re.sub(r"font(-[a-z]+)?:[^;]*;? ?", "", attributes["style"])
        for light, variable in _VARIABLES.items():
            style = style.replace(light, variable)
        attributes["style"] = style
    for key in {"d", "x", "y", "transform"} & set(attributes):
        attributes[key] = re.sub(r"(\.\d\d)\d+", r"\1", attributes[key]).strip()


def write_number(value: float, _: float = 0) -> str:
    """A tick's number, short: 0.02, 350, 25k, 1.3M, 1e-6."""
    size = abs(value)
    if 1e4 <= size < 1e12:
        from matplotlib.ticker import EngFormatter

        return EngFormatter(sep="")(value)
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < size < 1e-3 else f"{value:.4g}"


def cut(name: str, most: int = 20) -> str:
    """A name on one line that is not too long for its place."""
    line = one_line(name)
    return line if len(line) <= most else line[: most - 1] + "…"
