"""The schema of results.json: what older versions wrote is read, and the documentation is whole."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import ghostlayers
from ghostlayers.errors import OutputError
from ghostlayers.report import results, rows
from ghostlayers.report.results import SCHEMA, read_results

# Made at commit 1a84503, before there were types, by `compare` on `conftest.make_tiny_llama()` with
# `make_byte_tokenizer(bos=False)` and `make_documents(40)`: all but the last six to calibrate,
# three of those under "one" to evaluate, `test_tasks.questions()` as the task "nouns", layers=[2],
# select=["recoverable"], repair=["none", "ghost", "refit:1"], windows=8, held_out_windows=2,
# max_windows=2, sequence_length=32, limit=8, new_tokens=4; "published" and a processor set by hand.
FILE = Path(__file__).parent / "fixtures" / "results.json"
DOCS = Path(__file__).parents[1] / "docs" / "reference" / "results-json.md"


@pytest.fixture
def values() -> dict[str, Any]:
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


def test_results_of_older_versions_are_read_and_written_unchanged(values: dict[str, Any]) -> None:
    assert values["schema"] == SCHEMA
    newer = {**values, "unheard_of": [1]}
    newer["cells"][0]["unheard_of"] = 2.5
    assert read_results(newer).to_dict() == newer


def test_what_is_no_number_is_none(values: dict[str, Any]) -> None:
    values["cells"][0]["loss_nats"] = float("nan")
    values["models"][0]["prefill_ms"] = float("inf")
    read = read_results(values)
    assert read.cells[0].loss_nats is None
    assert read.models[0].prefill_ms is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "'results.json' cannot be read: schema: expected 1, got 2"),
        ({"cells": [{"layers": 1}]}, "it lacks cells.0.select"),
        ({"created": 5}, "created: expected a valid string, got 5"),
        (
            {"model": {"name": "a", "num_layers": True}},
            "model.num_layers: expected a valid integer",
        ),
    ],
)
def test_other_shapes_are_refused(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(OutputError, match=re.escape(message)):
        read_results({**values, **change}, "'results.json'")


def documented() -> str:
    """Every type of the schema as a table: its fields, their types, and what they mean."""
    tables = []
    for module in (results, rows):
        for node in ast.parse(Path(module.__file__ or "").read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name not in {"Key", "Row"}:
                tables.append(_table(node))
    return "\n".join(sorted(tables, key=lambda text: not text.startswith("## Results\n")))


def _table(node: ast.ClassDef) -> str:
    base = ast.unparse(node.bases[0])
    more = "" if base == "Row" else f" Its first fields are those of `{base}`."
    lines = [f"## {node.name}\n\n{ast.get_docstring(node)}{more}\n\n| field | type | meaning |"]
    lines.append("|---|---|---|")
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            meaning = " ".join(ast.literal_eval(text.value).split()).replace("``", "`")
            name = ast.unparse(field.target).removesuffix("_version")
            lines.append(f"| `{name}` | {_type(ast.unparse(field.annotation))} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type(annotation: str) -> str:
    """A type in JSON's words."""
    plain = {"str": "text", "int": "integer", "float": "number", "bool": "true or false",
             "None": "null", "Any": "any", "Pair": "[integer, number or null]",
             "Literal[1]": "1"}  # fmt: skip
    if annotation.endswith(" | None"):
        return f"{_type(annotation.removesuffix(' | None'))} or null"
    if " | " in annotation and not annotation.endswith("]"):
        return " or ".join(_type(part) for part in annotation.split(" | "))
    if annotation.startswith("Array["):
        return f"array of {_type(annotation[6:-1])}"
    if annotation.startswith("dict[str, "):
        return f"object of {_type(annotation[10:-1])}"
    return plain.get(annotation, f"[{annotation}](#{annotation.lower()})")


def test_the_documentation_is_made_from_the_schema() -> None:
    """To write it anew, put `documented()` behind the page's introduction."""
    introduction, _, tables = DOCS.read_text().partition("## Results\n")
    assert "results.json" in introduction
    assert f"## Results\n{tables}" == documented()


def test_matplotlib_is_imported_only_where_something_is_drawn() -> None:
    for path in Path(ghostlayers.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            at_once = isinstance(node, ast.Import | ast.ImportFrom)
            assert not (at_once and "matplotlib" in ast.unparse(node)), path
