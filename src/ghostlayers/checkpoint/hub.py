"""Sharing a checkpoint or an adapter on the Hugging Face Hub."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from ghostlayers.checkpoint import saving
from ghostlayers.checkpoint.records import check_files, inspect
from ghostlayers.errors import ModelError, OutputError, first_line
from ghostlayers.model.families import PREFIX, Family, find_family
from ghostlayers.modeling import travelling_code
from ghostlayers.runtime.documents import read_json, to_json
from ghostlayers.runtime.files import LICENCES
from ghostlayers.runtime.outputs import RECORD
from ghostlayers.runtime.shown import one_line, shared

CARD = "README.md"
PLACEHOLDER = "PATH"
"""What a card calls its own folder until it is known where that will be found."""

SENT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    saving.CODE,
    RECORD,
    CARD,
    *LICENCES,
)
"""What belongs to a model. Whatever else somebody put into the folder stays there."""

FOR_PEOPLE = (CARD, *LICENCES)
"""What may be changed or added: it is read by people alone."""

RUNS = frozenset(
    {".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
)
"""Files that are code, or can run some when they are opened."""

_Refused: tuple[Any, ...] = (getattr(hub_errors, "HTTPError", OSError), OSError)
"""What goes wrong on the way: the hub's answers, and connections that fail."""


@dataclass(frozen=True)
class Upload:
    """What is, or would be, sent.

    Attributes:
        repo: id on the hub.
        files: bytes by name.
        card: the model card as it stands there.
        left: names of files in the folder that are not sent.
        url: of the commit; None for a rehearsal.
    """

    repo: str
    files: dict[str, int]
    card: str
    left: tuple[str, ...] = ()
    url: str | None = None


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Upload:
    """Send a folder that Ghostlayers made to a model repository, in one commit.

    Args:
        folder: a checkpoint or an adapter.
        repo: such as ``name/model``; made if it does not exist.
        private: make it private, if it is made.
        message: of the commit.
        dry_run: send nothing; only tell what would be sent.
        endpoint: of another hub.
        token: instead of the one that ``hf auth login`` stored.

    Raises:
        ModelError: the folder was not made by Ghostlayers, something in it was changed or added
            since, or its card is missing.
        OutputError: the hub refuses; the message says what it said.
    """
    folder = Path(folder)
    record = inspect(folder)
    check_files(folder, record)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"'{repo}' is no repository id such as name/model: {error}") from error
    contents, left = _contents(folder, record, repo)
    files = {
        name: len(entry) if isinstance(entry, bytes) else entry.stat().st_size
        for name, entry in contents.items()
    }
    planned = Upload(repo, files, contents[CARD].decode(), left)
    if dry_run:
        return planned
    operations = [
        CommitOperationAdd(name, entry if isinstance(entry, bytes) else str(entry))
        for name, entry in contents.items()
    ]
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            operations,
            commit_message=one_line(message or _message(record)),
            repo_type="model",
        )
    except LocalTokenNotFoundError as error:
        raise OutputError("not logged in to the hub: run `hf auth login` first.") from error
    except _Refused as error:
        raise OutputError(f"the hub refused '{repo}': {first_line(error)}") from error
    return dataclasses.replace(planned, url=commit.commit_url)


def _contents(
    folder: Path, record: dict[str, Any], repo: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is sent, by name: paths, or bytes where it changes; and names of what is not sent."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    sent = {path.name: path for path in paths if any(map(path.match, SENT))}
    sent |= {name: folder / name for name in record.get("files", {})}
    for name, path in sent.items():
        _check_sent(folder, name, path, record)
    if CARD not in sent:
        raise ModelError(f"'{folder}' has no {CARD}, the model card; make the folder again.")
    card = sent[CARD].read_text(encoding="utf-8", errors="replace")
    for spelled, known in ((f'"{PLACEHOLDER}"', f'"{repo}"'), (f" {PLACEHOLDER} ", f" {repo} ")):
        card = card.replace(spelled, known)
    contents = sent | {CARD: card.encode(), RECORD: to_json(shared(record)).encode()}
    return contents, tuple(path.name for path in paths if path.name not in sent)


def _check_sent(folder: Path, name: str, path: Path, record: dict[str, Any]) -> None:
    """Refuse a file that the record does not vouch for.

    Raises:
        ModelError: it is a link out of the folder, or it was added since the folder was made.
    """
    known = record.get("files", {})
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"'{path}' is a link out of the folder; put the file itself there.")
    if name in known or name == RECORD or any(map(path.match, FOR_PEOPLE)):
        return
    of_weights_alone = all(name.endswith(".safetensors") for name in known)
    if not of_weights_alone or path.suffix in {*RUNS, ".safetensors"}:
        if of_weights_alone and name == saving.CODE and _is_our_code(folder, path):
            return
        raise ModelError(
            f"the folder's record does not vouch for '{path}': it was added or changed after the "
            "folder was made. Remove it, or make the folder again."
        )
    if name.endswith(".json"):
        _check_names_no_code(path)


def _is_our_code(folder: Path, path: Path) -> bool:
    """Whether the code is what this version writes, where an older record says nothing of it."""
    config = read_json(folder / "config.json", ModelError)
    kind = config.get("model_type") if isinstance(config, dict) else None
    family = find_family(str(kind).removeprefix(PREFIX))
    return family is not None and path.read_bytes() == _code_of(family).encode()


def _code_of(family: Family) -> str:
    config = family.repaired_classes()[0]
    return travelling_code(config.stock_classes, config.__module__)


def _check_names_no_code(path: Path) -> None:
    """Refuse a config that names others' code, where an older record says nothing of it."""
    content = read_json(path, ModelError)
    named = content.get("auto_map") if isinstance(content, dict) else None
    if not named:
        return
    module = saving.CODE.removesuffix(".py")
    values = named.values() if isinstance(named, dict) else ["?"]
    if not all(str(value).startswith(f"{module}.") for value in values):
        raise ModelError(
            f"'{path}' names code that is not this package's ('auto_map'), which would run where "
            "the model is loaded. Make the folder again."
        )


def _message(record: dict[str, Any]) -> str:
    removed = len(record["cut"]["removed"])
    return f"Remove {removed} decoder layers, repaired by {record['recipe']['repair']}"
