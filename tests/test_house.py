"""The rules of the house: what is public, and which room may use what."""

import ast
from pathlib import Path

import pytest

import ghostlayers

SOURCE = Path(ghostlayers.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = {"transformers", "datasets", "accelerate", "huggingface_hub", "typer", "rich", "matplotlib"}
MATHS = ["spans.py", "moments.py", "selection.py", "scores", "repairs"]
MATHS += ["evaluation/losses.py", "evaluation/bootstrap.py"]


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def is_maths(path: Path) -> bool:
    return any(name_of(path).startswith(room) for room in MATHS)


def test_public_names_are_pinned() -> None:
    assert ghostlayers.__all__ == [
        "PRESETS",
        "EvaluationResult",
        "GhostlayersError",
        "Preset",
        "PrunedModel",
        "Recipe",
        "RunOptions",
        "ScoreTable",
        "Span",
        "SpanScore",
        "Verification",
        "evaluate",
        "from_adapter",
        "inspect",
        "materialize",
        "prune",
        "score",
    ]
    assert all(hasattr(ghostlayers, name) for name in ghostlayers.__all__)


@pytest.mark.parametrize("path", [p for p in MODULES if is_maths(p)], ids=name_of)
def test_maths_knows_no_models_and_no_files(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & (HEAVY | {"logging", "pathlib", "os"})
    inner = {m.split(".")[1] for m in imports(path) if m.startswith("ghostlayers.")}
    inner -= {"modeling"}  # what a repair does to a stream is told once, where a checkpoint has it
    rooms = {
        "spans",
        "moments",
        "products",
        "selection",
        "scores",
        "repairs",
        "errors",
        "evaluation",
    }
    assert inner <= rooms


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    if name_of(path).startswith("cli"):
        return
    assert not {"typer", "rich"} & {module.split(".")[0] for module in imports(path)}
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_room_names_a_device_or_empties_its_cache(path: Path) -> None:
    tree = ast.parse(path.read_text())
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    assert "cuda" not in strings
    assert "empty_cache" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_unpickled_and_no_layer_changes_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert "torch.load(" not in text
    assert "pickle" not in imports(path)
    if name_of(path) not in {"surgery.py", "modeling.py"}:
        assert "__class__ =" not in text


def test_every_error_is_in_the_drawing() -> None:
    from ghostlayers import errors

    drawn = errors.__doc__ or ""
    defined = [
        n.name
        for n in ast.parse(Path(errors.__file__).read_text()).body
        if isinstance(n, ast.ClassDef)
    ]
    assert all(name in drawn for name in defined)
