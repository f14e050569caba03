"""Every relative link of the documentation leads to a file, and to a heading in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[br]e*/**/README.md")]
)
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
EXTERNAL = re.compile(r"[a-z]+:")


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links_of(page: Path) -> list[str]:
    """Where the page's links within the repository lead."""
    return [link for link in LINK.findall(text_of(page)) if not EXTERNAL.match(link)]


def anchors_of(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def wrong_links(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    wrong = []
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and anchor not in anchors_of(target))
        ):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not wrong_links(page)


def test_links_that_lead_nowhere_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_doc_links.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A `code --title`, too\n\n[here](#a-code---title-too) [gone](gone.md) [no](page.md#title)"
        " ![picture](gone.png) [out](../out.md) [web](https://example.org/x#y)\n\n"
        "```md\n[in code](nowhere.md)\n```\n"
    )
    (tmp_path.parent / "out.md").touch()
    assert wrong_links(page) == ["gone.md", "page.md#title", "gone.png", "../out.md"]


def test_every_page_is_reached_from_the_readme() -> None:
    """In two clicks: from the README, or from a page that it links to."""
    first = {linked for linked in targets(ROOT / "README.md") if linked.suffix == ".md"}
    second = {linked for page in first for linked in targets(page)}
    docs = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert not docs - first - second


def targets(page: Path) -> set[Path]:
    """The files that a page links to."""
    return {(page.parent / link.partition("#")[0]).resolve() for link in links_of(page)} - {
        page.parent.resolve()
    }
