"""Sharing a checkpoint or an adapter on the Hugging Face Hub."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from ghostlayers import checkpoint
from ghostlayers.errors import ModelError, OutputError
from ghostlayers.files import shown_name

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
    checkpoint.CODE,
    checkpoint.RECORD,
    CARD,
    *checkpoint.LICENCES,
)
"""What belongs to a model. Whatever else somebody put into the folder stays there."""

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
        ModelError: the folder was not made by Ghostlayers, its weights were changed since, or its
            card is missing.
        OutputError: the hub refuses; the message says what it said.
    """
    folder = Path(folder)
    record = checkpoint.inspect(folder)
    checkpoint.check_files(folder, record)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"'{repo}' is no repository id such as name/model: {error}") from error
    contents, left = _contents(folder, record, repo)
    files = {
        name: len(each) if isinstance(each, bytes) else each.stat().st_size
        for name, each in contents.items()
    }
    planned = Upload(repo, files, contents[CARD].decode(), left)
    if dry_run:
        return planned
    operations = [
        CommitOperationAdd(name, each if isinstance(each, bytes) else str(each))
        for name, each in contents.items()
    ]
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo, operations, commit_message=message or _message(record), repo_type="model"
        )
    except LocalTokenNotFoundError as error:
        raise OutputError("not logged in to the hub: run `hf auth login` first.") from error
    except _Refused as error:
        raise OutputError(f"the hub refused '{repo}': {_first_line(error)}") from error
    return dataclasses.replace(planned, url=commit.commit_url)


def _contents(
    folder: Path, record: dict[str, Any], repo: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is sent, by name: paths, or bytes where it changes; and names of what is not sent."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    sent = {path.name: path for path in paths if any(map(path.match, SENT))}
    if CARD not in sent:
        raise ModelError(f"'{folder}' has no {CARD}, the model card; make the folder again.")
    card = sent[CARD].read_text(encoding="utf-8")
    for spelled, known in ((f'"{PLACEHOLDER}"', f'"{repo}"'), (f" {PLACEHOLDER} ", f" {repo} ")):
        card = card.replace(spelled, known)
    shown = json.dumps(without_paths(record), indent=2) + "\n"
    contents = sent | {CARD: card.encode(), checkpoint.RECORD: shown.encode()}
    return contents, tuple(path.name for path in paths if path.name not in sent)


def without_paths(content: Any) -> Any:
    """A record whose paths are only names: where files lay on a machine is nobody's business."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(each) for each in content]
    return shown_name(content) if isinstance(content, str) else content


def _message(record: dict[str, Any]) -> str:
    removed = len(record["cut"]["removed"])
    return f"Remove {removed} decoder layers, repaired by {record['recipe']['repair']}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
