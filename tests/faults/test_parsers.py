"""Every parser of what others write ends in a value or in an error of ours, whatever there is."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ghostlayers.checkpoint.records import inspect
from ghostlayers.cli.run import read_changes, read_recipe
from ghostlayers.errors import GhostlayersError
from ghostlayers.evaluation.task_files import check_code
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import find_method

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["prune", "model", "1-2", "ghost", 10**30, "\x1b[31m", "!function x.y"])
)  # fmt: skip
keys = st.text(max_size=8) | st.sampled_from(
    ["command", "model", "vary", "layers", "ridge", "include", "task", "dataset_path", "files"]
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
words = st.text(alphabet="0123456789-:,=. \x00\x1b³٣abghostrefitx+", max_size=24)


@contextlib.contextmanager
def a_file(name: str, content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


@quick
@given(words)
@example("1-" + "9" * 5000)
@example("0-1000000000")
def test_layers(text) -> None:
    with contextlib.suppress(GhostlayersError):
        Recipe(remove=text)


@quick
@given(words)
@example("refit:" + "9" * 5000)
@example("ghost:ridge=inf")
def test_repairs(text) -> None:
    with contextlib.suppress(GhostlayersError):
        find_method(text)


@quick
@given(values)
def test_recipes(content) -> None:
    text = yaml.safe_dump(content, allow_unicode=True).encode()
    with a_file("recipe.yaml", text) as path, contextlib.suppress(GhostlayersError):
        read_recipe(path, {})


@quick
@given(st.lists(words, max_size=3))
def test_changes_of_recipes(pairs) -> None:
    with contextlib.suppress(GhostlayersError):
        read_changes(pairs)


@pytest.mark.slow
@quick
@given(st.binary(max_size=60))
@example(b"[" * 30_000)
def test_bytes_as_a_recipe(content) -> None:
    with a_file("recipe.yaml", content) as path, contextlib.suppress(GhostlayersError):
        read_recipe(path, {})


@quick
@given(st.binary(max_size=60) | values.map(lambda each: yaml.safe_dump(each).encode()))
@example(b"[" * 30_000)
@example(b"x: &x [*x]")
@example(b"include: \x00")
@example(b"? [a]\n: b")
def test_task_files(content) -> None:
    with a_file("task.yaml", content) as path, contextlib.suppress(GhostlayersError):
        check_code(path.parent, trusted=False)


@quick
@given(st.binary(max_size=60) | values.map(lambda each: json.dumps(each).encode()))
@example(b'{"a":' * 50_000)
def test_records(content) -> None:
    with a_file("ghostlayers.json", content) as path, contextlib.suppress(GhostlayersError):
        inspect(path.parent)
