"""The rules of the house: what is public, and which room may use what."""

import ast
from pathlib import Path

import pytest

import ghostlayers

SOURCE = Path(ghostlayers.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
FLOORS = [
    {"errors", "modeling"},
    {"spans", "statistics"},
    {"repairs", "runtime"},
    {"presets", "selection", "text"},
    {"evaluation", "recipe"},
    {"model", "report"},
    {"surgery"},
    {"calibration", "checkpoint", "preparation"},
    {"writing"},
    {"healing"},
    {"healed", "plan", "pruned"},
    {"budgets"},
    {"merged", "study"},
    {"compare", "demo", "export", "heal_pipeline", "pipeline"},
    {"recommending"},
    {"cli"},
    {"__main__"},
]
"""Rooms, and files that are rooms of their own: each may use those on floors below alone."""

HEAVY = {"transformers", "datasets", "accelerate", "huggingface_hub", "typer", "rich", "matplotlib"}
MATHS = ["spans.py", "statistics", "selection", "repairs"]
SAY_NOTHING = {"each", "found", "told"}
"""Words that are no names of variables, arguments and functions."""


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(path: Path) -> set[str]:
    """Every module and name that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def is_maths(path: Path) -> bool:
    return any(name_of(path).startswith(room) for room in MATHS)


def test_public_names_are_pinned() -> None:
    assert ghostlayers.__all__ == [
        "PRESETS",
        "EvaluationResult",
        "GhostlayersError",
        "HealedModel",
        "HealingRecipe",
        "MergedModel",
        "Preset",
        "PrunedModel",
        "Recipe",
        "RunOptions",
        "ScoreTable",
        "Span",
        "SpanScore",
        "Study",
        "Verification",
        "evaluate",
        "from_adapter",
        "heal",
        "inspect",
        "materialize",
        "merge",
        "prune",
        "recommend",
        "score",
        "show_progress",
        "write_data",
    ]
    assert all(hasattr(ghostlayers, name) for name in ghostlayers.__all__)


def test_every_room_has_its_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted({room_of(path) for path in MODULES} - {"__init__"})


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_down(path: Path) -> None:
    height = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    own = room_of(path)
    if own == "__init__":
        return
    used = {m.split(".")[1] for m in imports(path) if m.startswith("ghostlayers.")}
    above = {room for room in used - {own} if height.get(room, -1) >= height[own]}
    assert not above


@pytest.mark.parametrize("path", [p for p in MODULES if is_maths(p)], ids=name_of)
def test_maths_knows_no_models_and_no_files(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & (HEAVY | {"logging", "pathlib", "os"})
    inner = {m.split(".")[1] for m in imports(path) if m.startswith("ghostlayers.")}
    inner -= {"modeling"}  # what a repair does to a stream is told once, where a checkpoint has it
    assert inner <= {"spans", "statistics", "selection", "repairs", "errors"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    if name_of(path).startswith("cli"):
        return
    assert not {"typer", "rich"} & {module.split(".")[0] for module in imports(path)}
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_takes_more_than_twelve(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            assert len(given.posonlyargs + given.args + given.kwonlyargs) <= 12, node.name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_names_say_what_things_are(path: Path) -> None:
    """What is gone through, found or told of has a name of its own."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    names |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    names |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    assert not names & SAY_NOTHING


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_room_names_a_device_or_empties_its_cache(path: Path) -> None:
    tree = ast.parse(path.read_text())
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    assert "cuda" not in strings
    assert "empty_cache" not in path.read_text()
    assert "torch.cuda" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_unpickled_and_no_layer_changes_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert "torch.load(" not in text
    assert "pickle" not in imports(path)
    if name_of(path) not in {"surgery/removal.py", "modeling.py"}:
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
