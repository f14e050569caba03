"""Sharing a checkpoint or an adapter on the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from ghostlayers import checkpoint
from ghostlayers.errors import OutputError

CARD = "README.md"
PLACEHOLDER = "PATH"
"""What a card calls its own folder until it is known where that will be found."""


@dataclass(frozen=True)
class Upload:
    """What is, or would be, sent.

    Attributes:
        repo: id on the hub.
        files: bytes by name.
        card: the model card as it stands there.
        url: of the commit; None for a rehearsal.
    """

    repo: str
    files: dict[str, int]
    card: str
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
        ModelError: the folder was not made by Ghostlayers, or its weights were changed since.
        OutputError: the hub refuses; the message says what it said.
    """
    folder = Path(folder)
    record = checkpoint.inspect(folder)
    checkpoint.check_files(folder, record)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"'{repo}' is no repository id such as name/model: {error}") from error
    card = (folder / CARD).read_text(encoding="utf-8").replace(f'"{PLACEHOLDER}"', f'"{repo}"')
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD)
    files = {path.name: path.stat().st_size for path in paths} | {CARD: len(card.encode())}
    planned = Upload(repo, dict(sorted(files.items())), card)
    if dry_run:
        return planned
    operations = [CommitOperationAdd(path.name, str(path)) for path in paths]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo, operations, commit_message=message or _message(record), repo_type="model"
        )
    except LocalTokenNotFoundError as error:
        raise OutputError("not logged in to the hub: run `hf auth login` first.") from error
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(f"the hub refused '{repo}': {_first_line(error)}") from error
    return Upload(planned.repo, planned.files, planned.card, commit.commit_url)


def _message(record: dict[str, Any]) -> str:
    removed = len(record["cut"]["removed"])
    return f"Remove {removed} decoder layers, repaired by {record['recipe']['repair']}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
