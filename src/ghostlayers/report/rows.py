"""The rows of a comparison's results: what was measured of models, spans and operators."""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Value = TypeVar("Value")
Array = Annotated[tuple[Value, ...], Field(strict=False)]
Pair = Annotated[tuple[int, float | None], Field(strict=False)]
"""Arrays of JSON, which are lists until they are read."""


@dataclass(frozen=True, order=True)
class Key:
    """One model: how many layers went, how they were chosen, how the cut was repaired."""

    layers: int
    select: str
    repair: str

    @property
    def cut(self) -> tuple[int, str]:
        """The number of layers and the selection."""
        return self.layers, self.select

    @property
    def is_dense(self) -> bool:
        """Whether nothing was removed."""
        return self.layers == 0


class Row(BaseModel, frozen=True):
    """A part of the results; types are strict, more keys are welcome."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them: what was given, and no defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class ModelName(Row, frozen=True):
    """Which model a row speaks of."""

    layers: int
    """Decoder layers removed; 0 for the dense model."""
    select: str
    """Selection that chose them, or the preset; empty for the dense model."""
    repair: str
    """Repair of the cut, arguments included; ``dense`` for the dense model."""

    @property
    def key(self) -> Key:
        """The three as one value."""
        return Key(self.layers, self.select, self.repair)


class CutModel(ModelName, frozen=True):
    """Which model, and what it lacks."""

    removed: str = ""
    """Removed layers of the original model, such as ``12-15,17``; ``none`` for the dense model."""


class TextLoss(CutModel, frozen=True):
    """One model on one text."""

    corpus: str
    """Name of the text, as under ``corpora``."""
    num_tokens: int | None = None
    """Tokens predicted."""
    loss_nats: float | None = None
    """Mean negative log-likelihood of the next token, nats a token."""
    kl_nats: float | None = None
    """Mean divergence of the dense model's prediction from this one's, nats a token."""
    greedy_agreement: float | None = None
    """Share of tokens whose likeliest successor is the dense model's, 0 to 1."""
    total_variation: float | None = None
    """Mean total variation distance of this prediction from the dense model's, 0 to 1."""
    acceptance: float | None = None
    """Share of tokens that the dense model keeps where this one drafts them, 0 to 1."""
    tokens_a_verification: float | None = None
    """Tokens that a pass of the dense model gives behind 4 drafted ones, by that share."""


class Gap(Row, frozen=True):
    """What the fit of one gap says about itself."""

    span: Array[int]
    """First removed layer, and the layer behind the last."""
    method: str | None = None
    """Name of the repair."""
    num_tokens: int | None = None
    """Tokens it was fitted on."""
    relative_residual: float | None = None
    """Squared error of the fit, relative to its target."""
    condition_number: float | None = None
    """Of the system that was solved."""
    ridge: float | None = None
    """Damping that was chosen, where the repair chooses one."""
    scale: float | None = None
    """Factor on the whole stream, where the repair has one."""


class Gates(Row, frozen=True):
    """The MLP of one layer behind the cut beside the same layer of the dense model."""

    layer: int
    """Layer of the dense model."""
    mean_shift: float | None = None
    """Difference of the units' mean pre-activations in the dense ones' standard deviations, RMS."""
    spread: float | None = None
    """Standard deviation of the pre-activations as a share of the dense layer's."""
    dead: float | None = None
    """Share of units and tokens that give less than 1% of that token's RMS, 0 to 1."""
    dense_dead: float | None = None
    """That of the dense layer."""


class Healing(Row, frozen=True):
    """How a model was trained after the cut."""

    trained: Array[str]
    """What of it."""
    tokens: int
    """That it was trained on."""
    seconds: float
    """That training took, measurements on held-out windows included."""
    steps: int
    """Of the run."""
    best_step: int
    """Behind which the state was that is measured; 0 if none was better than the closed form."""


class MeasuredModel(CutModel, frozen=True):
    """One model without regard to a text."""

    num_parameters: int | None = None
    """Parameters of the built model."""
    kv_bytes_per_token: int | None = None
    """Keys and values cached for a token, bytes."""
    added_parameters: int | None = None
    """Parameters that the repair adds."""
    checkpoint: str | None = None
    """Form in which it can be saved: ``stock``, ``custom`` or ``not savable``."""
    prefill_ms: float | None = None
    """Median time to read a prompt, milliseconds."""
    prefill_spread_ms: float | None = None
    """Distance of that time's quartiles, milliseconds."""
    prefill_tokens: int | None = None
    """Length of that prompt, tokens."""
    continuation: str | None = None
    """How the model continues ``prompt``."""
    held_out_loss_nats: float | None = None
    """Loss on held-out calibration windows, nats a token."""
    worse_than_none: bool = False
    """Whether that is more than the unrepaired cut's."""
    gaps: Array[Gap] = ()
    """The fit of each gap."""
    boundary_residual: Array[Pair] = ()
    """Pairs of a boundary behind the cut and the relative squared distance to the dense stream."""
    gates: Array[Gates] = ()
    """What the cut shifts in the MLPs of the layers behind it."""
    fit_seconds: float | None = None
    """Time to fit all repairs of the cut, seconds."""
    healing: Healing | None = None
    """How it was trained after the cut; null where it was not."""

    @property
    def method(self) -> str | None:
        """The repair of its gaps: of ``auto``, the one that was taken."""
        return self.gaps[0].method if self.gaps else None


class Scattered(Row, frozen=True):
    """A cut of several gaps that was raced against the spans."""

    layers: Array[int]
    """Its layers."""
    loss_nats: float | None = None
    """As of a span."""
    behind_nats: float | None = None
    """As of a span."""
    behind_error: float | None = None
    """As of a span."""
    finished: bool | None = None
    """As of a span."""


class ScoredSpan(Row, frozen=True):
    """Scores of one contiguous span."""

    start: int
    """First layer."""
    stop: int
    """The layer behind the last."""
    cosine: float | None = None
    """Mean cosine between the stream before and behind the span."""
    angular_distance: float | None = None
    """Mean angle between them at the last token of each window, as a share of pi."""
    residual: float | None = None
    """What a linear repair leaves of the stream, squared and relative to each token."""
    loss_nats: float | None = None
    """Loss of the repaired cut on held-out calibration windows, nats a token."""
    loss_tokens: int | None = None
    """Tokens behind that loss; fewer where the span was given up early."""
    behind_nats: float | None = None
    """Loss above the best span's, on the tokens that both were measured on, nats a token."""
    behind_error: float | None = None
    """Standard error of that difference, nats a token."""
    finished: bool | None = None
    """Whether its loss was measured to the end, so that it may win."""
    massive_activation_born: bool | None = None
    """Whether a massive activation is born inside."""


class Step(Row, frozen=True):
    """One step of a greedy selection."""

    layer: int
    """The layer that went."""
    loss_nats: float | None = None
    """Loss without it and those before, nats a token."""


class Scores(Row, frozen=True):
    """Scores for one number of layers."""

    num_layers: int | None = None
    """Decoder layers of the model."""
    block_influence: Array[float | None] = ()
    """One minus the mean cosine across each layer (ShortGPT)."""
    similarity: Array[Array[float | None]] = ()
    """Mean cosine of the stream between every two boundaries."""
    angular_distance: Array[Array[float | None]] | None = None
    """Mean angle of the last tokens' stream between every two boundaries, as a share of pi."""
    importance: Array[float | None] | None = None
    """By layer: the number by which the selection ranks them, lowest first to go."""
    steps: Array[Step] = ()
    """Of a greedy selection."""
    median_norm: Array[float | None] = ()
    """Median norm of a token's stream, by boundary."""
    largest_norm: Array[float | None] = ()
    """Largest norm of a token's stream, by boundary."""
    dense_loss_nats: float | None = None
    """The dense model's loss on held-out calibration windows, nats a token."""
    scattered: Scattered | None = None
    """A cut of several gaps, where one was raced against the spans."""
    num_loss_tokens: int | None = None
    """Tokens behind each full loss."""
    spans: Array[ScoredSpan] = ()
    """Every candidate span."""


class Operator(CutModel, frozen=True):
    """The matrix M that a repair adds to the identity across one gap."""

    span: Array[int]
    """First removed layer, and the layer behind the last."""
    singular_values: Array[float | None] = ()
    """Of M, largest first."""
    symmetric_share: float | None = None
    """Norm of M's symmetric part over M's."""
    antisymmetric_share: float | None = None
    """Norm of M's antisymmetric part over M's."""
    identity_distance: float | None = None
    """Norm of M over that of the identity."""


class Writing(CutModel, frozen=True):
    """What one model wrote behind the stretches of text under ``prefixes``, in one manner."""

    manner: str
    """``greedy``, or ``sampled`` at temperature 1 behind every fourth of them, ten times each."""
    num_continuations: int | None = None
    """Texts."""
    new_tokens: int | None = None
    """Tokens of each."""
    repeated_4grams: float | None = None
    """Share of a text's 4-grams that stood in it before (seq-rep-4), mean, 0 to 1."""
    loops: float | None = None
    """Share of texts that end in at most 16 tokens said three times or more, 0 to 1."""
    healthy_tokens: float | None = None
    """Mean number of tokens before that loop; all of a text without one."""
    dense_loss_nats: float | None = None
    """The dense model's loss on what was written, nats a token."""
    agreement_tokens: float | None = None
    """Of greedy texts: mean number of tokens before the dense model's text differs."""
    distinct: float | None = None
    """Of sampled texts: mean number of different ones among the ten behind one stretch."""
    texts: Array[str] = ()
    """Greedy: one a stretch; sampled: the first of each."""


class Accuracy(CutModel, frozen=True):
    """What one model answered of one task."""

    task: str
    """Name of the task in lm-evaluation-harness."""
    version: str | int | float | None = None
    """Version of the task."""
    num_documents: int | None = None
    """Documents answered."""
    acc: float | None = None
    """Accuracy, 0 to 1."""
    acc_stderr: float | None = None
    """Its standard error."""
    acc_norm: float | None = None
    """Accuracy with likelihoods divided by the answers' lengths, 0 to 1."""
    acc_norm_stderr: float | None = None
    """Its standard error."""

    @property
    def score(self) -> float | None:
        """Length-normalised accuracy, or the plain one where there is none."""
        return self.acc if self.acc_norm is None else self.acc_norm


class ModelFile(CutModel, frozen=True):
    """One model as a GGUF file of one type, in llama.cpp on the processor."""

    type: str
    """Type of the file, as llama-quantize names it."""
    size_bytes: int
    """Size of the file, bytes."""
    tensor_types: dict[str, int] = Field(default_factory=dict)
    """How many of its tensors have each type."""
    prefill_tokens_s: float | None = None
    """Prompt tokens read a second, from the median time."""
    prefill_spread: float | None = None
    """Distance of that time's quartiles as a share of its median."""
    decode_tokens_s: float | None = None
    """Tokens written a second behind the prompt, from the median time."""
    decode_spread: float | None = None
    """Distance of that time's quartiles as a share of its median."""
    prompt_tokens: int | None = None
    """Length of that prompt, tokens."""
    memory_bytes: int | None = None
    """Memory of weights, workspace and the cache of a whole context, bytes."""
    context: int | None = None
    """Length of that context, tokens."""


class FileLoss(CutModel, frozen=True):
    """One file on one text, from llama.cpp's logits."""

    type: str
    """Type of the file."""
    corpus: str
    """Name of the text, as under ``corpora``."""
    num_tokens: int | None = None
    """Tokens predicted."""
    loss_nats: float | None = None
    """Mean negative log-likelihood of the next token, nats a token."""
    kl_nats: float | None = None
    """Mean divergence of the dense model's F16 file's prediction from this one's, nats a token."""
    greedy_agreement: float | None = None
    """Share of tokens whose likeliest successor is that file's, 0 to 1."""
    total_variation: float | None = None
    """Mean total variation distance of this prediction from that file's, 0 to 1."""
    acceptance: float | None = None
    """Share of tokens that that file keeps where this one drafts them, 0 to 1."""
    tokens_a_verification: float | None = None
    """Tokens that a pass of that file gives behind 4 drafted ones, by that share."""
    window_losses: Array[float | None] = ()
    """Loss of each window, nats a token."""
