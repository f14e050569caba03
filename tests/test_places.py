"""Inputs are never outputs, however the two are related on the disk and spelled."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostlayers.errors import OutputError
from ghostlayers.runtime import locks
from ghostlayers.runtime.places import check_apart, paths_of

FOLDERS = ("a", "a/b", "a/b/c", "d", "d/e")
"""Of a small world; each holds a file ``f``."""

SPELLINGS = ("plain", "absolute", "dots", "link", "link above", "slashes")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders, and for each a link to it from elsewhere."""
    place = tmp_path_factory.mktemp("world")
    (place / "links").mkdir()
    for folder in FOLDERS:
        (place / folder).mkdir()
        (place / folder / "f").write_text(folder)
        (place / "links" / folder.replace("/", "-")).symlink_to(place / folder)
        (place / "links" / f"{folder.replace('/', '-')}-f").symlink_to(place / folder / "f")
    return place


def spelled(world: Path, path: str, how: str) -> str:
    """Another way to name the same file or folder; one that is to come may have no link."""
    plain, link = world / path, world / "links" / path.replace("/", "-")
    if how == "dots":
        return f"{world}/a/../{path}"
    if how == "slashes":
        return f"{world}//./{path}/"
    if how == "link" and link.exists():
        return str(link)
    if how == "link above" and "/" in path:
        above, name = path.rsplit("/", 1)
        return str(world / "links" / above.replace("/", "-") / name)
    return os.path.relpath(plain) if how == "plain" else str(plain)


def related(one: str, other: str) -> bool:
    """By their names alone, as each is spelled plainly here."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


PATHS = st.sampled_from(
    [*FOLDERS, *(f"{folder}/f" for folder in FOLDERS), "a/new", "d/e/new", "new"]
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(source=PATHS, out=PATHS, ways=st.tuples(*[st.sampled_from(SPELLINGS)] * 2))
def test_what_is_related_is_refused_and_nothing_else(
    world: Path, source: str, out: str, ways: tuple[str, str]
) -> None:
    given_path, output = (
        spelled(world, path, how) for path, how in zip((source, out), ways, strict=True)
    )
    exists = (world / source).exists()
    try:
        check_apart({"MODEL": [given_path]}, {"-o": Path(output)})
        refused = False
    except OutputError:
        refused = True
    assert refused == (exists and related(source, out))


@settings(max_examples=100, deadline=None)
@given(one=PATHS, other=PATHS, ways=st.tuples(*[st.sampled_from(SPELLINGS)] * 2))
def test_two_outputs_are_not_in_each_others_way(
    world: Path, one: str, other: str, ways: tuple[str, str]
) -> None:
    first, second = (spelled(world, *spelling) for spelling in zip((one, other), ways, strict=True))
    try:
        check_apart({}, {"-o": Path(first), "--json": Path(second)})
        refused = False
    except OutputError:
        refused = True
    assert refused == related(one, other)


def test_another_name_of_an_inputs_file_is_an_input(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    os.link(model / "config.json", tmp_path / "other.json")
    with pytest.raises(OutputError, match="a file of MODEL"):
        check_apart({"MODEL": [str(model)]}, {"--json": tmp_path / "other.json"})


def test_what_an_inputs_links_lead_to_is_an_input(tmp_path: Path) -> None:
    """As in the hub's cache, whose snapshots are links to blobs."""
    blobs, model = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, model):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("weights")
    (model / "model.safetensors").symlink_to(blobs / "123")
    for out in (blobs, blobs / "123"):
        with pytest.raises(OutputError, match="a file of MODEL"):
            check_apart({"MODEL": [model]}, {"-o": out})
    check_apart({"MODEL": [model]}, {"-o": tmp_path / "out"})


def test_the_hubs_files_of_a_model_are_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--name--model" / "snapshots").mkdir(parents=True)
    with pytest.raises(OutputError, match="lies in MODEL"):
        check_apart({"MODEL": ["name/model"]}, {"-o": tmp_path / "models--name--model" / "x"})
    check_apart({"MODEL": ["name/other"]}, {"-o": tmp_path / "models--name--model" / "x"})


@pytest.mark.parametrize("text", ["a.txt,b.txt", "a.txt+b.txt", "*.txt", "c4+a.txt, b.txt"])
def test_several_texts_are_several_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    paths = {path.resolve() for path in paths_of(text)}
    assert paths == {tmp_path.resolve() / "a.txt", tmp_path.resolve() / "b.txt"}


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_name_is_looked_at(text: str) -> None:
    list(paths_of(text))


def test_a_mounted_folder_is_what_is_mounted(tmp_path: Path) -> None:
    """Another place with the same numbers, which is what a bind mount looks like."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("nothing can be mounted here")
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one / "model", other):
        folder.mkdir(parents=True)
    if os.system(f"mount --bind {one} {other} 2>/dev/null") != 0:
        pytest.skip("nothing can be mounted here")
    try:
        for out in (other / "model", other / "model" / "x", other):
            with pytest.raises(OutputError):
                check_apart({"MODEL": [one / "model"]}, {"-o": out})
    finally:
        os.system(f"umount {other}")


def test_a_lock_that_cannot_be_noted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: the lock's file has its name, and nothing can be written into it."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(locks.Claim, "write", full)
        with pytest.raises(OutputError, match="No space left"), locks.holding(tmp_path / "new/a"):
            pass
    assert list(tmp_path.iterdir()) == []
    with locks.holding(tmp_path / "new/a"):  # nobody holds it
        pass


def test_all_parts_of_a_split_model_are_its_input(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    for part in (first, second):
        part.write_text("a part")
    for name in (str(first), first, f"{second},{first}"):
        with pytest.raises(OutputError, match="is the same as MODEL"):
            check_apart({"MODEL": [name]}, {"-o": second})
    check_apart({"MODEL": [str(first)]}, {"-o": tmp_path / "m.gguf"})
    second.unlink()  # what is not there is told where the model is opened
    check_apart({"MODEL": [str(first)]}, {"-o": second})
