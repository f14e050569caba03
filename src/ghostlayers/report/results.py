"""What a comparison found: the schema of ``results.json`` (docs/reference/results-json.md).

A number that could not be measured is null. Files of older versions lack what was not measured
then; keys that are not named here are carried along.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ghostlayers.errors import OutputError
from ghostlayers.report.rows import (
    Accuracy,
    Array,
    CutModel,
    FileLoss,
    MeasuredModel,
    ModelFile,
    ModelName,
    Operator,
    Row,
    Scores,
    TextLoss,
    Writing,
)
from ghostlayers.runtime.documents import check, strict

SCHEMA = 1
"""Version of the schema; a reader needs no more than this number to know that it can read."""


class Difference(Row, frozen=True):
    """Mean accuracy of one model minus another's, over the same documents."""

    a: ModelName
    """The model."""
    b: ModelName
    """The model it is set against."""
    metric: str
    """``acc`` or ``acc_norm``."""
    difference: float | None = None
    """Mean over tasks of a's accuracy minus b's, -1 to 1."""
    stderr: float | None = None
    """Standard error by paired bootstrap."""
    low: float | None = None
    """Lower end of the 95% interval."""
    high: float | None = None
    """Upper end of the 95% interval."""
    p: float | None = None
    """Two-sided p-value of no difference."""


class Skipped(Row, frozen=True):
    """A repair that was left out."""

    repair: str
    """Name of the repair."""
    reason: str = ""
    """Why."""
    layers: int | None = None
    """Decoder layers removed; absent where it was left out of every cut."""
    select: str = ""
    """Selection; absent where it was left out of every cut."""


class Correlation(Row, frozen=True):
    """How well a score predicts the loss, over every contiguous span of one length."""

    layers: int
    """Length of the spans, layers."""
    repair: str
    """Repair whose loss is predicted."""
    score: str
    """``cosine`` or ``residual``."""
    spans: int
    """Number of spans."""
    spearman: float | None
    """Rank correlation, 1 where the score is a perfect prediction; null if either is constant."""


class Published(ModelName, frozen=True):
    """A figure of a paper."""

    source: str
    """Where it stands."""
    metric: str
    """What it measures; begins with ``ppl``, ``acc`` or ``loss``."""
    value: float | None = None
    """The figure: a perplexity, per cent, or nats a token."""


class Recommended(CutModel, frozen=True):
    """The best cut of a model for an engine, as `ghostlayers recommend` found it."""

    less: str
    """Share of the layers that was to go, such as ``20%``."""
    engine: str
    """What loads it."""
    method: str = ""
    """The repair that held-out windows chose."""
    loss_nats: float | None = None
    """Mean over the texts, nats a token."""
    excess_nats: float | None = None
    """That above the dense model's."""
    kl_nats: float | None = None
    """Mean divergence from the dense model."""
    loops: float | None = None
    """Share of greedy continuations that end in a loop, 0 to 1."""
    num_parameters: int | None = None
    """Parameters that stay, those of the repair included."""
    kv_bytes_per_token: int | None = None
    """Keys and values cached for a token, bytes."""
    prefill_ms: float | None = None
    """Median time to read a prompt, milliseconds."""
    command: str | None = None
    """What makes it; null where it cannot be made."""
    problem: str | None = None
    """Why it cannot be made; null where it can."""


class DenseModel(Row, frozen=True):
    """The model that was compared."""

    name: str
    """Name without its folder."""
    num_layers: int | None = None
    """Decoder layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_parameters: int | None = None
    """Parameters."""
    licence: str | None = None
    """As the model names it."""


class Machine(Row, frozen=True):
    """What the comparison ran on."""

    processor: str | None = None
    """Name of the processor or accelerator."""
    threads: int | None = None
    """Threads of PyTorch."""
    torch: str | None = None
    """Version of PyTorch."""
    device: str | None = None
    """Device of PyTorch."""
    dtype: str | None = None
    """Number format of the weights."""


class Text(Row, frozen=True):
    """A text that losses were measured on."""

    name: str
    """Name of the text."""
    num_windows: int | None = None
    """Windows measured."""
    available_windows: int | None = None
    """Windows that the text has."""
    sequence_length: int | None = None
    """Tokens of a window."""
    bos: bool | str | None = None
    """Whether every window begins with the beginning-of-sequence token."""
    calibration_overlap: int | None = None
    """Documents that repairs were fitted on, too."""


class Results(Row, frozen=True):
    """The whole file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this schema."""
    ghostlayers: str | None = None
    """Version of Ghostlayers."""
    created: str | None = None
    """Day, as 2026-11-29."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and of the packages used."""
    machine: Machine = Machine()
    """What it ran on."""
    model: DenseModel
    """What was compared."""
    recipe: dict[str, Any]
    """The fields of the calibration's `Recipe`, and the number of windows fitted on."""
    comparison: dict[str, Any] = Field(default_factory=dict)
    """The other choices of the comparison."""
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By preset: the fields of its `Recipe`; empty unless methods were compared."""
    command: str | None = None
    """Command line, without folders."""
    prompt: str | None = None
    """Text that the models continue; empty for none."""
    corpora: Array[Text]
    """Texts that losses were measured on."""
    cells: Array[TextLoss]
    """A row a model and text; the dense model first."""
    models: Array[MeasuredModel] = ()
    """A row a model; the dense model first."""
    scores: dict[str, Scores] = Field(default_factory=dict)
    """By number of layers: scores of the spans."""
    operators: Array[Operator] = ()
    """A row a gap and repair whose operator is a matrix."""
    prefixes: Array[str] = ()
    """Stretches of the texts that every model continued."""
    writing: Array[Writing] = ()
    """A row a model and manner, where models continued them; the dense model first."""
    tasks: Array[Accuracy] = ()
    """A row a model and task."""
    comparisons: Array[Difference] = ()
    """Each repair against Ghost on the same cut."""
    skipped: Array[Skipped] = ()
    """What was left out."""
    correlations: Array[Correlation] = ()
    """Where every contiguous span was measured: how scores predict losses."""
    files: Array[ModelFile] = ()
    """A row a model and type, where GGUF files were measured; the dense model first."""
    file_losses: Array[FileLoss] = ()
    """A row a model, type and text."""
    recommended: Array[Recommended] = ()
    """A row a share of the layers and engine, where the best cuts were asked for."""
    published: Array[Published] = ()
    """Figures of papers that were given to set beside."""


def read_results(values: Mapping[str, Any], where: str = "the results") -> Results:
    """Results from plain values, as a comparison returns them and ``results.json`` holds them.

    Args:
        values: of this version of the schema or an older one.
        where: what messages call them.

    Raises:
        OutputError: they are of another shape; the message names the place.
    """
    plain = strict(values)
    check(plain, Results, where, OutputError)
    return Results.model_validate(plain)
