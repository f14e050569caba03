"""A smaller model as the draft of the dense one: what is kept of it, and what that saves.

In speculative decoding the smaller model proposes some tokens, and the dense one reads all of them
in one pass, keeps those that it would have written itself, and adds one. What is written is the
dense model's own text; only the time differs. It is measured by transformers' assisted generation.

References:
    Leviathan, Kalman, Matias, Fast Inference from Transformers via Speculative Decoding,
    arXiv:2211.17192, algorithm 1.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.errors import InputError, UnsupportedModelError, first_line
from ghostlayers.evaluation.bench import Timing
from ghostlayers.evaluation.generating import end_tokens, plain_settings, write_behind
from ghostlayers.evaluation.perplexity import vocabulary_of
from ghostlayers.evaluation.speed import synchronise
from ghostlayers.runtime import progress
from ghostlayers.runtime.machine import input_device
from ghostlayers.runtime.progress import Advance
from ghostlayers.statistics.writing import agreement_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_TOKENS = 64
NEW_TOKENS = 64
REPEATS = 3
"""Of a measurement, if nobody says otherwise."""

ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}
"""How far apart, in nats, two tokens may lie that rounding puts in another order.

A pass over several tokens sums in another order than one over one token. In models of dozens of
layers that moves a logit by about so much.
"""

_CANNOT = (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError)
"""How transformers says, in one release or another, that it cannot draft for a model."""


@dataclass(frozen=True)
class Difference:
    """Where a text written with a draft leaves the dense model's own.

    Attributes:
        prompt: its number, from 0.
        token: the first that differs, from 0.
        gap_nats: how much likelier the dense model holds its own token, in one pass over the text.
    """

    prompt: int
    token: int
    gap_nats: float


@dataclass(frozen=True)
class DraftPoint:
    """Texts written with a draft of one length.

    Attributes:
        draft_tokens: proposed before each verification; 0 where the dense model writes alone.
        prompts: texts.
        new_tokens: of each.
        verifications: passes of the dense model, the one over the prompt included.
        drafted: tokens that were proposed, in all.
        accepted: of them kept.
        time: of all texts, reading the prompts included.
        differences: from what the dense model writes alone; None where both are drawn.
        dtype: in which the dense model computes.
    """

    draft_tokens: int
    prompts: int
    new_tokens: int
    verifications: int
    drafted: int
    accepted: int
    time: Timing
    differences: tuple[Difference, ...] | None
    dtype: str

    @property
    def acceptance(self) -> float | None:
        """Kept tokens a drafted one; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_a_verification(self) -> float:
        """Written tokens a pass of the dense model."""
        return self.prompts * self.new_tokens / self.verifications

    @property
    def rate(self) -> float:
        """Written tokens a second."""
        return self.prompts * self.new_tokens / self.time.median

    @property
    def by_rounding(self) -> bool:
        """Whether every difference begins where rounding alone decides."""
        limit = ROUNDING.get(getattr(torch, self.dtype), 0.0)
        return all(abs(difference.gap_nats) <= limit for difference in self.differences or ())

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **asdict(self),
            "acceptance": self.acceptance,
            "tokens_a_verification": self.tokens_a_verification,
            "tokens_s": self.rate,
        }


@dataclass(frozen=True)
class _Row:
    """A text, how long it was after each pass of the dense model, and the seconds it took."""

    text: list[int]
    ends: list[int]
    seconds: float

    def drafted(self, draft_tokens: int) -> int:
        """Tokens proposed; the last one of a text is the dense model's own."""
        starts = [0, *self.ends[:-1]]
        return sum(min(draft_tokens, len(self.text) - start - 1) for start in starts)


def measure_drafts(
    dense: "PreTrainedModel",
    draft: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Int[Tensor, "prompts prompt"],
    *,
    lengths: Sequence[int],
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    sampled: bool = False,
) -> list[DraftPoint]:
    """Have the dense model write alone and with a draft, and compare texts and time.

    Every text has the same number of tokens: end-of-sequence tokens are not written. The lengths of
    drafts take turns within every repeat, so that a machine that grows warm meets them all alike.
    The models' own generation settings are not used, and are left as they are.

    Args:
        dense: the model whose text is written.
        draft: the smaller one, with the same vocabulary.
        tokenizer: of both.
        prompts: of one length.
        lengths: tokens that are drafted before each verification, one after the other.
        new_tokens: written behind each prompt.
        repeats: of each measurement; one round before them does not count.
        sampled: draw at temperature 1 instead; texts cannot be compared then.

    Returns:
        A point for the dense model alone, then one a length.

    Raises:
        InputError: the two models do not share a vocabulary.
        UnsupportedModelError: transformers cannot take back what is not kept, as in models with a
            recurrent state.
    """
    _check_pair(dense, draft)
    writer = _Writer(dense, draft, end_tokens(dense, tokenizer), new_tokens, sampled)
    rounds: dict[int, list[list[_Row]]] = {length: [] for length in (0, *lengths)}
    steps = (repeats + 1) * len(rounds) * len(prompts)
    with progress.stage("Drafting", steps) as advance:
        for _, length in itertools.product(range(repeats + 1), rounds):
            rounds[length].append(writer.write_all(prompts, length, advance))
    (alone, *_) = rounds[0]
    points = []
    for length, (rows, *timed) in rounds.items():  # the first round is for warmth
        differences = None if sampled else _differences(dense, prompts, alone, rows)
        time_taken = Timing.of([sum(row.seconds for row in rows) for rows in timed])
        points.append(_point(length, rows, time_taken, differences, dense.dtype))
    return points


def _point(
    length: int,
    rows: Sequence[_Row],
    time_taken: Timing,
    differences: tuple[Difference, ...] | None,
    dtype: torch.dtype,
) -> DraftPoint:
    verifications, new_tokens = sum(len(row.ends) for row in rows), len(rows[0].text)
    return DraftPoint(
        draft_tokens=length,
        prompts=len(rows),
        new_tokens=new_tokens,
        verifications=verifications,
        drafted=sum(row.drafted(length) for row in rows),
        accepted=len(rows) * new_tokens - verifications,
        time=time_taken,
        differences=differences,
        dtype=str(dtype).removeprefix("torch."),
    )


def _check_pair(dense: "PreTrainedModel", draft: "PreTrainedModel") -> None:
    sizes = vocabulary_of(dense), vocabulary_of(draft)
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the dense model knows {sizes[0]:,} tokens and the draft {sizes[1]:,}; a draft needs "
            "the vocabulary of the model that verifies it."
        )
    for model in (dense, draft):
        if not hasattr(model, "generate"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no 'generate', so that it cannot draft or verify."
            )


@dataclass(frozen=True)
class _Writer:
    """Writes one text after the other, as `measure_drafts` was asked."""

    dense: "PreTrainedModel"
    draft: "PreTrainedModel"
    ends: list[int]
    new_tokens: int
    sampled: bool

    def write_all(
        self, prompts: Int[Tensor, "prompts prompt"], length: int, advance: Advance
    ) -> list[_Row]:
        """Continue each prompt with a draft of so many tokens; alone with none."""
        rows = []
        for seed, prompt in enumerate(prompts):
            rows.append(self._write(prompt, length, seed))
            advance()
        return rows

    def _write(self, prompt: Int[Tensor, " prompt"], length: int, seed: int) -> _Row:
        device = input_device(self.dense)
        ids, rounds = prompt[None].to(device), _Rounds(len(prompt))
        accelerators = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(accelerators), _drafting(self.draft, length) as assistant:
            torch.manual_seed(seed)
            synchronise(device)
            start = time.perf_counter()
            text = self._generate(ids, rounds, length, assistant)
            synchronise(device)
            seconds = time.perf_counter() - start
        return _Row(text[0, len(prompt) :].tolist(), rounds.ends, seconds)

    @torch.no_grad()
    def _generate(
        self, ids: Tensor, rounds: "_Rounds", length: int, assistant: dict[str, Any]
    ) -> Tensor:
        # No token of a text: `generate` takes those in a draft's text for padding, and hides them.
        padding = {"pad_token_id": vocabulary_of(self.dense)}
        # A model may draft for itself, by the settings that it then has.
        more = {**padding, **(_drafts_of(length) if assistant else {})}
        settings = plain_settings(self.new_tokens, sampled=self.sampled, **more)
        try:
            text = write_behind(
                self.dense,
                ids,
                settings,
                processors=(self._leave_out_ends,),
                stopping_criteria=[rounds],
                **assistant,
            )
        except torch.OutOfMemoryError:
            raise
        except _CANNOT as error:
            raise _refusal(self.dense, self.draft, error) from error
        return text

    def _leave_out_ends(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        scores[:, self.ends] = -torch.inf
        return scores


class _Rounds:
    """Notes how long a text is after each pass of the dense model; `generate` asks it to stop.

    Args:
        start: tokens of the prompt.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.ends: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        del scores
        self.ends.append(input_ids.shape[1] - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _refusal(
    dense: "PreTrainedModel", draft: "PreTrainedModel", error: Exception
) -> UnsupportedModelError:
    kinds = " and ".join(dict.fromkeys(model.config.model_type for model in (dense, draft)))
    return UnsupportedModelError(
        f"transformers cannot write with a draft here ({kinds}): {first_line(error)}. Models whose "
        "state cannot be taken back, such as recurrent ones, can neither draft nor verify."
    )


def _drafts_of(length: int) -> dict[str, Any]:
    """Settings of a draft that always proposes so many tokens."""
    return {
        "num_assistant_tokens": length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


@contextmanager
def _drafting(draft: "PreTrainedModel", length: int) -> Iterator[dict[str, Any]]:
    """What `generate` is told: a draft of so many tokens each time, whatever became of the last."""
    if length == 0:
        yield {}
        return
    from transformers import GenerationConfig

    own = draft.generation_config
    draft.generation_config = GenerationConfig(**_drafts_of(length))
    try:
        yield {"assistant_model": draft}
    finally:
        draft.generation_config = own


def _differences(
    dense: "PreTrainedModel", prompts: Tensor, alone: Sequence[_Row], rows: Sequence[_Row]
) -> tuple[Difference, ...]:
    differences = []
    for row, (own, other) in enumerate(zip(alone, rows, strict=True)):
        place = agreement_length(own.text, other.text)
        if place < len(own.text):
            before, pair = own.text[:place], (own.text[place], other.text[place])
            differences.append(Difference(row, place, _gap(dense, prompts[row], before, pair)))
    return tuple(differences)


@torch.no_grad()
def _gap(
    dense: "PreTrainedModel", prompt: Tensor, before: Sequence[int], pair: tuple[int, int]
) -> float:
    """By how many nats the first of two tokens is likelier behind a text."""
    ids = torch.cat([prompt, torch.tensor(before, dtype=prompt.dtype)])[None]
    output = dense(input_ids=ids.to(input_device(dense)), use_cache=False, logits_to_keep=1)
    logits = output.logits[0, -1].float()
    return float(logits[pair[0]] - logits[pair[1]])
