"""What models write behind real prefixes, greedily and by drawing, all of one length.

A cut model's next token can look healthy while its text does not: errors add up, and the first to
show is repetition. So every model continues the same prefixes, and what it wrote is measured beside
what the dense model wrote (`statistics.writing`) and scored by the dense model.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.evaluation.generating import end_tokens, plain_settings, write_behind
from ghostlayers.evaluation.perplexity import LOGITS_AT_ONCE, predictions, vocabulary_of
from ghostlayers.runtime import progress
from ghostlayers.runtime.machine import input_device
from ghostlayers.runtime.progress import Advance
from ghostlayers.statistics.losses import token_losses
from ghostlayers.statistics.writing import (
    agreement_length,
    distinct,
    loop_start,
    repeated_ngrams,
)
from ghostlayers.text.tokens import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX_TOKENS = 64
NEW_TOKENS = 64
CONTINUATIONS = 16
"""Prefixes that are continued, if nobody says otherwise."""

SAMPLES = 10
"""Texts drawn behind one prefix."""

DRAWN_EVERY = 8
"""Behind every so many prefixes texts are drawn, too."""

ROWS_AT_ONCE = 64
"""Texts that are written at a time: a step costs about as much for many as for one."""

Manner = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Written:
    """What one model wrote.

    Attributes:
        prefixes: what it continued, [prefixes, tokens].
        greedy: the likeliest token each time.
        sampled: drawn at temperature 1 behind every `DRAWN_EVERY`-th prefix.
    """

    prefixes: Int[Tensor, "prefixes prefix"]
    greedy: Int[Tensor, "prefixes new"]
    sampled: Int[Tensor, "drawn samples new"]

    @property
    def drawn_behind(self) -> Int[Tensor, "drawn prefix"]:
        """The prefixes of the sampled texts."""
        return self.prefixes[::DRAWN_EVERY]


@dataclass(frozen=True)
class WritingFigures:
    """What one model's texts of one manner show.

    Attributes:
        manner: greedy, or sampled at temperature 1.
        num_continuations: texts.
        new_tokens: of each.
        repeated_4grams: seq-rep-4, mean over texts, 0 to 1.
        loops: share of texts that end in a loop.
        healthy_tokens: mean number of tokens before the loop; all of a text without one.
        dense_loss_nats: the dense model's loss on what was written, nats a token.
        agreement_tokens: of greedy ones: tokens before the dense model's text differs, mean.
        distinct: of sampled ones: classes of the texts behind one prefix, mean.
        texts: one a prefix; of sampled ones the first of each.
    """

    manner: Manner
    num_continuations: int
    new_tokens: int
    repeated_4grams: float
    loops: float
    healthy_tokens: float
    dense_loss_nats: float
    agreement_tokens: float | None
    distinct: float | None
    texts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {**vars(self), "texts": list(self.texts)}


@dataclass(frozen=True)
class WritingReport:
    """What a model and the dense one wrote behind the same prefixes.

    Attributes:
        prefixes: their text.
        figures: of the model, one a manner.
        dense: of the dense model.
    """

    prefixes: tuple[str, ...]
    figures: tuple[WritingFigures, ...]
    dense: tuple[WritingFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with the keys that the command line writes."""
        return {
            "prefixes": list(self.prefixes),
            "writing": [row.to_dict() for row in self.figures],
            "writing_against": [row.to_dict() for row in self.dense],
        }


def tokens_to_write(count: int) -> int:
    """About how many tokens a model computes to continue so many prefixes, those included."""
    rows = count + SAMPLES * -(-count // DRAWN_EVERY)
    return rows * (PREFIX_TOKENS + NEW_TOKENS)


def take_prefixes(
    texts: Sequence[Windows], count: int, model: "PreTrainedModel"
) -> Int[Tensor, "prefixes prefix"]:
    """Stretches of texts to continue: as many of each, evenly over its windows.

    They are read as the windows were: a chat's through its template, and each begins with a
    beginning-of-sequence token where windows do.

    Args:
        texts: windows of one length.
        count: prefixes in all; fewer where the texts have no more.
        model: leaves room to write behind them.
    """
    longest = min(windows.sequence_length for windows in texts)
    length = min(PREFIX_TOKENS, longest, _positions(model) // 2)
    shares = [count // len(texts) + (place < count % len(texts)) for place in range(len(texts))]
    parts = [_spread(windows, n, length) for windows, n in zip(texts, shares, strict=True)]
    return torch.cat(parts)


def _spread(windows: Windows, count: int, length: int) -> Tensor:
    bos = int(windows.bos)
    start, body = windows.input_ids[:, :bos], windows.input_ids[:, bos:]
    pieces = body.unfold(1, length - bos, length - bos)
    heads = start[:, None].expand(-1, pieces.shape[1], -1)
    every = torch.cat([heads, pieces], dim=2).flatten(0, 1)
    count = min(count, len(every))
    return every[torch.arange(count) * len(every) // max(count, 1)]


def _positions(model: "PreTrainedModel") -> int:
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return PREFIX_TOKENS + NEW_TOKENS if known is None else int(known)


def continuations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prefixes: Int[Tensor, "prefixes prefix"],
    *,
    new_tokens: int = NEW_TOKENS,
    samples: int = SAMPLES,
    seed: int = 0,
    title: str = "Writing",
) -> Written:
    """Have a model continue prefixes, greedily and by drawing at temperature 1.

    No text ends before the others: end-of-sequence tokens are not written, so that repetition and
    variety are measured over one length. The noise of a draw belongs to its seed and place, not to
    the model: two models draw alike as far as they predict alike.

    Args:
        model: a causal language model of transformers; its own generation settings are not used.
        tokenizer: its tokenizer.
        prefixes: of one length, so that nothing is padded.
        new_tokens: of each text; fewer where the model has no positions for them.
        samples: texts drawn behind every `DRAWN_EVERY`-th prefix.
        seed: of the draws.
        title: on the screen.

    Raises:
        UnsupportedModelError: the model's class cannot generate.
    """
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no 'generate', so that it cannot continue texts; leave "
            "that out with --continuations 0."
        )
    new_tokens = min(new_tokens, _positions(model) - prefixes.shape[1])
    drawn = prefixes[::DRAWN_EVERY].repeat_interleave(samples, dim=0)
    rows, greedy = torch.cat([prefixes, drawn]), len(prefixes)
    batches = rows.split(ROWS_AT_ONCE)
    generator = torch.Generator().manual_seed(seed)
    ends, written = end_tokens(model, tokenizer), []
    with progress.stage(title, new_tokens * len(batches)) as advance:
        for start, batch in zip(range(0, len(rows), ROWS_AT_ONCE), batches, strict=True):
            draw = _Draw(max(greedy - start, 0), ends, generator, advance)
            written.append(_generate(model, batch, new_tokens, draw))
    texts = torch.cat(written)
    shape = (len(prefixes[::DRAWN_EVERY]), samples, new_tokens)
    return Written(prefixes, texts[:greedy], texts[greedy:].reshape(shape))


class _Draw:
    """Chooses the next token of each text: `generate` takes the likeliest of what it returns.

    The likeliest of log-probabilities with Gumbel noise is a draw from them, so that greedy and
    sampled texts are written side by side, and no global generator is touched.

    Args:
        greedy: so many rows are left as they are, the others drawn.
        ends: tokens that are not written.
        generator: of the noise; on the processor, so that every device draws alike.
        advance: told of every step.
    """

    def __init__(
        self, greedy: int, ends: list[int], generator: torch.Generator, advance: Advance
    ) -> None:
        self.greedy, self.ends, self.generator, self.advance = greedy, ends, generator, advance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        self.advance()
        scores[:, self.ends] = -torch.inf
        drawn = scores[self.greedy :]
        waits = torch.empty(drawn.shape).exponential_(generator=self.generator)
        drawn -= waits.log_().to(drawn.device)  # Gumbel noise is -log of an exponential wait
        return scores


@torch.no_grad()
def _generate(model: "PreTrainedModel", rows: Tensor, new_tokens: int, draw: _Draw) -> Tensor:
    ids = rows.to(input_device(model))
    written = write_behind(model, ids, plain_settings(new_tokens), processors=(draw,))
    return written[:, rows.shape[1] :].cpu()


def writing_figures(
    written: Written,
    dense_greedy: Int[Tensor, "prefixes new"],
    dense: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[WritingFigures, ...]:
    """What a model's texts show beside the dense model's: a value for each manner.

    Args:
        written: by the model.
        dense_greedy: what the dense model wrote greedily behind the same prefixes.
        dense: scores what was written.
        tokenizer: makes words of it.
    """
    pairs = zip(written.greedy.tolist(), dense_greedy.tolist(), strict=True)
    agreement = statistics.fmean(agreement_length(ours, theirs) for ours, theirs in pairs)
    drawn = [_texts(tokenizer, samples) for samples in written.sampled]
    behind = written.drawn_behind.repeat_interleave(written.sampled.shape[1], dim=0)
    sampled = written.sampled.flatten(0, 1)
    return (
        WritingFigures(
            "greedy",
            **_of_tokens(written.greedy),
            dense_loss_nats=float(_losses(dense, written.prefixes, written.greedy).mean()),
            agreement_tokens=agreement,
            distinct=None,
            texts=_texts(tokenizer, written.greedy),
        ),
        WritingFigures(
            "sampled",
            **_of_tokens(sampled),
            dense_loss_nats=float(_losses(dense, behind, sampled).mean()),
            agreement_tokens=None,
            distinct=statistics.fmean(map(distinct, drawn)),
            texts=tuple(texts[0] for texts in drawn),
        ),
    )


def _of_tokens(texts: Tensor) -> dict[str, Any]:
    """The figures that the tokens alone tell."""
    rows: list[list[int]] = texts.tolist()
    starts = [loop_start(row) for row in rows]
    healthy = [len(row) if s is None else s for row, s in zip(rows, starts, strict=True)]
    return {
        "num_continuations": len(rows),
        "new_tokens": texts.shape[1],
        "repeated_4grams": statistics.fmean(map(repeated_ngrams, rows)),
        "loops": statistics.fmean(start is not None for start in starts),
        "healthy_tokens": statistics.fmean(healthy),
    }


def _texts(tokenizer: "PreTrainedTokenizerBase", rows: Tensor) -> tuple[str, ...]:
    return tuple(str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)


def prefix_texts(
    tokenizer: "PreTrainedTokenizerBase", prefixes: Int[Tensor, "prefixes prefix"]
) -> tuple[str, ...]:
    """Prefixes as a reader sees them."""
    return _texts(tokenizer, prefixes)


def _losses(dense: "PreTrainedModel", prefixes: Tensor, new: Tensor) -> Float[Tensor, "texts new"]:
    """The dense model's loss on every written token, in nats."""
    ids = torch.cat([prefixes, new], dim=1)
    at_once = max(1, LOGITS_AT_ONCE // (ids.shape[1] * vocabulary_of(dense)))
    return torch.cat([_batch_losses(dense, rows, new.shape[1]) for rows in ids.split(at_once)])


def _batch_losses(dense: "PreTrainedModel", ids: Tensor, new_tokens: int) -> Tensor:
    logits = predictions(dense, ids)
    targets = ids[:, 1:].flatten().to(logits.device)
    return token_losses(logits, targets).view(len(ids), -1)[:, -new_tokens:].cpu()


def write_and_measure(
    model: "PreTrainedModel",
    dense: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[Windows],
    count: int = CONTINUATIONS,
) -> WritingReport:
    """Have a model and the dense one continue the same texts, and measure what both wrote.

    Args:
        model: any causal language model.
        dense: the one that it is compared with, over the same vocabulary.
        tokenizer: of both.
        texts: windows whose stretches are continued.
        count: prefixes.
    """
    prefixes = take_prefixes(texts, count, model)
    theirs, ours = (
        continuations(writer, tokenizer, prefixes, title=title)
        for writer, title in ((dense, "The dense model writes"), (model, "The model writes"))
    )
    return WritingReport(
        prefix_texts(tokenizer, prefixes),
        writing_figures(ours, theirs.greedy, dense, tokenizer),
        writing_figures(theirs, theirs.greedy, dense, tokenizer),
    )
