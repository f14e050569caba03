"""Versions and bounds that stand in several files of the project."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements-dev.lock").read_text().splitlines()

sys.path.insert(0, str(ROOT / ".ci"))
import lowest  # noqa: E402

sys.path.pop(0)


def test_the_version_is_meant_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"]


def test_every_bound_is_a_release_that_can_be_installed() -> None:
    """That each can be, and that all go together, CI finds out by installing them."""
    pins = [Requirement(lowest.pin(each)) for each in PROJECT["dependencies"]]
    for wanted, pin in zip(map(Requirement, PROJECT["dependencies"]), pins, strict=True):
        (oldest,) = pin.specifier
        assert wanted.name == pin.name
        assert wanted.specifier.contains(oldest.version)


@pytest.mark.parametrize("bound", ["numpy", "numpy<3", "numpy==2", "numpy>2"])
def test_a_dependency_without_an_oldest_release_is_refused(bound: str) -> None:
    with pytest.raises(SystemExit, match="must say its oldest release"):
        lowest.pin(bound)


def test_the_lock_has_what_the_project_asks_for() -> None:
    locked: dict[str, list[Requirement]] = {}
    for line in LOCK:
        if not line.startswith("#"):
            each = Requirement(line)
            locked.setdefault(canonicalize_name(each.name), []).append(each)
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["tasks"], *extras["dev"]]
    for wanted in map(Requirement, asked):
        if wanted.name in {"torch", "ghostlayers"}:
            continue
        for each in locked[canonicalize_name(wanted.name)]:
            (pin,) = each.specifier
            assert wanted.specifier.contains(pin.version), each


def test_the_lock_names_versions_and_no_place() -> None:
    assert not [line for line in LOCK if re.search("://|@|--|^torch=|nvidia", line)]


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem
)
def test_issue_forms_have_what_the_host_asks_of_them(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    names = [each["id"] for each in content["body"]]
    assert len({*names}) == len(names)
    assert all(each["type"] in {"input", "textarea"} for each in content["body"])
    assert all(each["attributes"]["label"] for each in content["body"])


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert {"run": "bash .ci/run"} in job["steps"]
    assert (ROOT / ".ci" / "run").is_file()
