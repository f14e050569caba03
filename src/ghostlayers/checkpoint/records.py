"""Reading what a checkpoint or an adapter says of itself, and comparing its folder with that."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from ghostlayers.errors import GhostlayersError, ModelError
from ghostlayers.runtime.documents import Checked, check, parse_json, read_json
from ghostlayers.runtime.outputs import RECORD, file_hash

GGUF_RECORD = "ghostlayers.record"
"""The entry of a GGUF file's header that holds its record."""

Layer = Annotated[int, Field(ge=0, lt=100_000)]
Count = Annotated[int, Field(ge=0, lt=10**18)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Words = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Layers = Annotated[list[Layer], Field(max_length=100_000)]
Ends = Annotated[list[Layer], Field(min_length=2, max_length=2)]


def _stays_inside(name: str) -> str:
    if "\0" in name or "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ValueError("expected the name of a file in the folder")
    return name


FileName = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_stays_inside)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Base(Checked):
    """Where the model came from."""

    name: Text
    title: Text | None = None
    on_hub: bool
    revision: Text | None
    licence: Text | None
    quantized: Text | None = None
    sha256: Hash | None = None
    stored_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    answers: list[float] | None = None


class Cut(Checked):
    """Which layers went, and which stayed."""

    removed: Layers
    kept: Layers
    spans: list[Ends] = Field(default_factory=list)


class Fit(Checked):
    """What the fit of a gap says of itself."""

    span: Ends
    method: Words
    num_tokens: Count
    relative_residual: float | None
    condition_number: float | None
    ridge: float | None = None


class Evidence(Checked):
    """Losses of a model on held-out text."""

    model: Words
    loss_nats: float
    perplexity: float
    kl_nats: float
    greedy_agreement: float


class EvidenceText(Checked):
    """The text of the evidence."""

    corpus: Text
    windows: Count
    sequence_length: Count
    bos: Words


class Chosen(Checked):
    """What of the recipe is told again."""

    remove: Text | None
    select: Words
    repair: Words
    iterative: bool = False
    export: Words | None = None


class Calibration(Checked):
    """The text that was calibrated on."""

    corpus: Text
    windows: Count
    fit_windows: Count
    sequence_length: Count
    bos: Words
    documents: list[Text]


class Gap(Checked):
    """What an adapter holds for a gap."""

    span: Ends
    method: Words
    operator: list[Words]
    eps: float
    scale: float | None = None


class Packed(Checked):
    """What stayed packed, and what is plain."""

    method: Words
    weights: Count
    packed_bytes: Count
    plain: list[Words]
    plain_bytes: Count


class Quantising(Checked):
    """What the whole model loses in a type that meets the same budget."""

    type: Words
    bytes: float
    windows: Count
    loss_nats: float
    cut_loss_nats: float


class Budget(Checked):
    """What was asked for instead of a number of layers, and what it came to."""

    asked: Words
    said: Annotated[list[Text], Field(min_length=1)]
    quantising: Quantising | None = None


class Contestant(Checked):
    """A repair that competed."""

    repair: Words
    loss_nats: float
    behind_nats: float
    behind_error: float
    windows: Count
    finished: bool
    overhead: float


class Contest(Checked):
    """Which repair held-out windows chose."""

    winner: Words
    reason: Text
    dense_loss_nats: float
    contestants: Annotated[list[Contestant], Field(min_length=1)]
    refused: dict[Words, Text]


class Trainer(Checked):
    """A corpus that was trained on."""

    corpus: Text
    share: float


class HeldOutText(EvidenceText):
    """The text that decided which state was kept."""

    of_another_text: bool


class Healing(Checked):
    """How it was trained after the cut."""

    trained: list[Words]
    num_trained: Count
    tokens: Count
    steps: Count
    positions: float
    best_step: Count
    seconds: float
    processor: Text
    corpora: Annotated[list[Trainer], Field(min_length=1)]
    documents: list[Text]
    held_out: HeldOutText
    evidence: Annotated[list[Evidence], Field(min_length=3, max_length=3)]
    recipe: Annotated[dict[str, Any], Field(max_length=100)]
    learning_rates: dict[Words, float] = Field(default_factory=dict)


class Parent(Checked):
    """One of two checkpoints that were merged."""

    checkpoint: Text


class Tried(Checked):
    """What was measured between them."""

    model: Words
    kl_nats: float


class Merged(Checked):
    """Of which two it was made, and where between them it lies."""

    parents: Annotated[list[Parent], Field(min_length=2, max_length=2)]
    kept: Words
    t: float
    merged_at: float
    tried: Annotated[list[Tried], Field(min_length=1)]
    held_out: EvidenceText
    evidence: list[Evidence]


class Verified(Checked):
    """How it was proved."""

    identical: bool
    largest_difference: float
    num_tokens: Count
    packed: float | None = None


class Record(Checked):
    """The whole of it; what nothing here reads may be anything."""

    base_model: Base
    cut: Cut
    repairs: list[Fit]
    evidence: list[Evidence]
    evidence_text: EvidenceText | None = None
    recipe: Chosen
    calibration: Calibration
    versions: dict[Words, Words]
    mode: Words
    created: Words
    packed: Packed | None = None
    budget: Budget | None = None
    contest: Contest | None = None
    healing: Healing | None = None
    healed_before: list[dict[str, Any]] = Field(default_factory=list)
    merged: Merged | None = None
    loads_with: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]\w{0,99}$")] = (
        "AutoModelForCausalLM"
    )
    verification: Verified | None = None
    files: dict[FileName, Hash] = Field(default_factory=dict)
    gaps: list[Gap] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_together(self) -> "Record":
        if self.evidence and self.evidence_text is None:
            raise ValueError("it has evidence, but lacks evidence_text")
        return self


def inspect(folder: str | Path) -> dict[str, Any]:
    """What was removed, kept and repaired in a checkpoint, and on what evidence.

    Args:
        folder: a checkpoint or a GGUF file that Ghostlayers made.

    Returns:
        Its record: ``base_model``, ``cut``, ``repairs``, ``evidence``, ``scores``, ``recipe``,
        ``calibration``, ``versions``, ``mode``, ``verification`` and ``files``; ``healing``, where
        it was trained after the cut.

    Raises:
        ModelError: the folder was not made by Ghostlayers, or its record is damaged.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        return _record_in(folder)
    path = folder / RECORD
    if not _is_there(path):
        raise ModelError(_no_record(folder))
    record: dict[str, Any] = check(read_json(path, ModelError), Record, f"'{path}'", ModelError)
    return record


def _record_in(file: Path) -> dict[str, Any]:
    from ghostlayers.model.gguf_file import open_gguf

    said = open_gguf(file).text(GGUF_RECORD)
    if said is None:
        raise ModelError(
            f"'{file}' holds no record of its making: `ghostlayers prune` puts one into the GGUF "
            "files that it makes, `export` does not. Give the folder that it was written from."
        )
    where = f"the record in '{file}'"
    record: dict[str, Any] = check(parse_json(said, where, ModelError), Record, where, ModelError)
    return record


def _is_there(path: Path) -> bool:
    """Whether something of this name is there, as far as it can be seen."""
    try:
        return path.exists()
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _no_record(folder: Path) -> str:
    if not folder.exists():
        return f"there is no {'file' if folder.suffix == '.gguf' else 'folder'} '{folder}'."
    return f"'{folder}' holds no {RECORD}: it was not made by Ghostlayers."


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Refuse files that are not those that a record was written about.

    Raises:
        ModelError: a file is missing or was changed.
    """
    for name, expected in record.get("files", {}).items():
        path = folder / name
        try:
            digest = file_hash(path)
        except OSError as error:
            raise ModelError(f"'{path}' is missing or cannot be read: {error.strerror}.") from error
        if digest != expected:
            raise ModelError(
                f"'{path}' is not the file that its record describes: it was changed after it was "
                "made, so its measured losses no longer hold. Get it again."
            )


def calibration_documents(folder: str | Path) -> list[str] | None:
    """Hashes of the documents that a checkpoint was made on; None if it was on none."""
    try:
        record = inspect(folder)
    except GhostlayersError:
        return None
    trained = record["healing"]["documents"] if record.get("healing") else []
    return [*record["calibration"]["documents"], *trained]
