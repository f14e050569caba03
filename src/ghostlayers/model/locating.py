"""Where a model's files lie: a folder, a GGUF file, or the snapshot of one on the hub."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ghostlayers.errors import ModelError
from ghostlayers.model.tensor_files import weight_files
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime.files import LICENCES
from ghostlayers.runtime.shown import one_line

FILES = (
    "*.json",
    "model*.safetensors",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "README.md",
    *LICENCES,
)
"""What is fetched of a model on the hub."""

UNWORDED = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What a library raises where it computes with an entry that it has not looked at."""


def files_wanted(options: RunOptions) -> list[str]:
    """What is fetched of a model: code only where it may run."""
    return [*FILES, *(["*.py"] if options.trust_remote_code else [])]


def locate(path: Path, name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder or GGUF file of a model; one on the hub is fetched first, and is a folder then."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file '{name}'.")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(_no_model(path))
        _refuse_pickles(path)
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"'{name}' is neither a model's folder, nor a .gguf file, nor a hub id such as "
            "HuggingFaceTB/SmolLM2-135M."
        )
    return _fetch(name, revision, wanted)


def _fetch(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The snapshot of a model on the hub; without a network the one that is on this machine.

    The hub is asked once. transformers would ask for every file that might be there, and without a
    network repeat each question for half a minute.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    ask: dict[str, Any] = {"revision": revision, "allow_patterns": wanted}
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):  # what never changes
        with contextlib.suppress(LocalEntryNotFoundError):
            here = Path(snapshot_download(name, local_files_only=True, **ask))
            if wanted == ["config.json"] or weight_files(here):
                return here
    try:
        return Path(snapshot_download(name, **ask))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"cannot load the model '{name}': the hub cannot be reached ({say_why(error)}), and "
            "the model is not on this machine yet. Check the connection, or give a folder."
        ) from error


def _no_model(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"'{folder}' holds a PEFT adapter, not a model: merge it into its base first "
            "(merge_and_unload), and save that."
        )
    return f"folder '{folder}' holds no config.json: it is not a model's folder."


def _refuse_pickles(folder: Path) -> None:
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise ModelError(
            f"folder '{folder}' holds pickled weights (.bin) only, which can run code when opened; "
            "expected .safetensors. Convert it with save_pretrained on a machine you can spare."
        )


@contextlib.contextmanager
def reading(files: str) -> Iterator[None]:
    """Note on what a library raises which files of a model it was at, for `say_why`."""
    try:
        yield
    except Exception as error:
        error.add_note(files)
        raise


def say_why(error: Exception, report: Sequence[str] = ()) -> str:
    """The first line of what a library says, or of what it reported, and of which files."""
    text = str(error).strip()
    if "above report" in text and report:  # it was kept off the screen
        text = f"its weights do not fit its config: {one_line(' '.join(report))}"
    if isinstance(error, KeyError):
        text = f"unknown name {text}"
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())[:600]
    if "trust_remote_code" in text:
        return f"{first} (Ghostlayers: --trust-remote-code lets it run; read the code first.)"
    if isinstance(error, UNWORDED) and getattr(error, "__notes__", None):
        return (
            f"{error.__notes__[-1]}: expected entries that transformers can compute with, but one "
            f"of them makes it fail ({type(error).__name__}: {first}). Correct it, or get the "
            "files again."
        )
    return first or type(error).__name__
