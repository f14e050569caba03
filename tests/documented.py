"""The blocks of code in the documentation: found, and made small enough to run in a test."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name / "README.md" for name in ("benchmarks", "recipes")),
    ]
)
RUN = {"bash", "python", "sh"}
"""Languages of blocks that are run, or say why not."""

BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
WHOLE_PAGE = re.compile(r"^<!-- not run on this page: (.+) -->$", re.MULTILINE)
TEXTS = re.compile(r"(?<![\w./-])(c4|wikitext2)(?:-\w+\.parquet)?\b")


@dataclass(frozen=True)
class Block:
    """Code of a page.

    Attributes:
        page: where it stands.
        line: of the page, where it begins.
        language: behind the first fence.
        text: the code.
        reason: why it is not run; empty if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell's block, as lists of words."""
        lines = self.text.replace("\\\n", "").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that are code."""
    text = page.read_text(encoding="utf-8")
    whole = WHOLE_PAGE.search(text)
    found = []
    for block in BLOCK.finditer(text):
        if block["language"] in RUN:
            line = text.count("\n", 0, block.start("text")) + 1
            reason = block["reason"] or (whole[1] if whole else "")
            code = textwrap.dedent(block["text"])
            found.append(Block(page, line, block["language"], code, reason))
    return found


def ours(words: list[str]) -> list[str] | None:
    """What a command gives to this package's program; None if it runs another one."""
    while words and re.match(r"\w+=", words[0]):  # the environment
        words = words[1:]
    for before in (["ghostlayers"], ["-m", "ghostlayers"]):
        for place in range(len(words) if before[0] == "-m" else 1):
            if words[place : place + len(before)] == before:
                return words[place + len(before) :]
    return None


SMALLER = {
    "prune": "--windows 6 --fit-windows 6 --held-out-windows 2 --sequence-length 64",
    "score": "--windows 6 --held-out-windows 2 --sequence-length 64",
    "compare": "--windows 6 --fit-windows 6 --held-out-windows 2 --sequence-length 64 "
    "--continuations 0 --max-windows 2 --no-speed",
    "heal": "--sequence-length 64",
    "bench": "--length 16 --new-tokens 4 --repeats 1",
    "bench --draft": "--data c4.jsonl --prompts 2 --draft-tokens 1,2 --new-tokens 4 --repeats 1",
    "recommend": "--windows 6 --held-out-windows 2 --sequence-length 64 --continuations 0 "
    "--max-windows 2 --no-speed --eval-data wikitext2.jsonl",
    "eval": "--sequence-length 64 --continuations 1 --max-windows 2",
}
"""By command: options that a text of a page is enough for."""

BUDGETS = {"--minutes": ("--tokens", "1k"), "--heal": ("--heal", "1k")}
"""Options that take minutes, and what stands in their place."""

CALLS = {
    "windows": 6,
    "fit_windows": 6,
    "held_out_windows": 2,
    "sequence_length": 64,
}
"""The same for `ghostlayers.prune` and `Study.open`."""


def smaller_command(words: list[str]) -> list[str]:
    """A command that does the same with a small text and few windows."""
    made = [TEXTS.sub(r"\1.jsonl", word) for word in words]
    for option, (other, value) in BUDGETS.items():
        if option in made:
            place = made.index(option)
            made[place : place + 2] = [other, value]
    # Of an option that is given twice the last value counts.
    name = "bench --draft" if "--draft" in made else made[0]
    return made + SMALLER.get(name, "").split()


def smaller_code(text: str) -> str:
    """Python that reads a small text."""
    text = re.sub(r'(data|on|held_out)="(c4|wikitext2)"', r'\1="\2.jsonl"', text)
    return re.sub(r"max_windows=\d+", "max_windows=2", re.sub(r"minutes=\d+", 'tokens="1k"', text))


def outputs_of(text: str) -> list[str]:
    """What a block writes: pages show other ways to the same output."""
    return re.findall(r"""(?:-o |--output |\.save\("|materialize\(\S+ ")([\w./-]+)""", text)
