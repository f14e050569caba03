"""`ghostlayers bench --draft`: a smaller model as the draft of the dense one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ghostlayers.checkpoint import adapter
from ghostlayers.cli import screen
from ghostlayers.demo.reference_text import split_topics
from ghostlayers.errors import RecipeError
from ghostlayers.evaluation.drafting import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    REPEATS,
    DraftPoint,
    measure_drafts,
)
from ghostlayers.evaluation.request import DraftRequest
from ghostlayers.model.alike import check_same_tokens
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.multimodal import whole_of
from ghostlayers.preparation import open_model, read_evaluation
from ghostlayers.recipe import RunOptions
from ghostlayers.text.corpora import BLANK_LINE, Corpus
from ghostlayers.text.tokens import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 8
"""Windows of a text that are read for each that is continued."""


@dataclass(frozen=True)
class Drafting:
    """What is measured.

    Attributes:
        request: as it was asked for.
        length: tokens of a prompt.
        new_tokens: written behind each.
        repeats: of each measurement.
    """

    request: DraftRequest
    length: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    repeats: int = REPEATS


def open_pair(
    model: str, against: str | None, options: RunOptions, revision: str | None
) -> "tuple[DenseModel, PreTrainedModel]":
    """The dense model, and the one that drafts for it: a checkpoint's, or an adapter's.

    Raises:
        RecipeError: no dense model is named.
        InputError: the two number their tokens differently.
    """
    if against is None:
        raise RecipeError("--draft needs --against, the dense model whose text is written.")
    screen.step(f"Loading {model} ...")
    if (Path(model) / adapter.WEIGHTS).is_file():
        network, dense, _ = adapter.open_adapter(model, against, options)
        return dense, whole_of(network)
    draft, dense = open_model(model, None, options, revision), open_model(against, None, options)
    check_same_tokens(draft, dense)
    return dense, draft.network


def run_drafts(
    dense: DenseModel, draft: "PreTrainedModel", asked: Drafting
) -> tuple[list[DraftPoint], dict[str, Any]]:
    """Measure, and show it; what of it is written into a file, too."""
    names, prompts = _prompts(asked, dense)
    points = measure_drafts(
        dense.network,
        draft,
        dense.tokenizer,
        prompts,
        lengths=asked.request.draft_tokens,
        new_tokens=asked.new_tokens,
        repeats=asked.repeats,
        sampled=asked.request.sampled,
    )
    manner = "sampled" if asked.request.sampled else "greedy"
    say = (
        f"{len(prompts)} stretches of {', '.join(names)}, {prompts.shape[1]} tokens each, {manner}"
    )
    _show(points, say)
    return points, {
        "texts": names,
        "prompt_tokens": prompts.shape[1],
        "manner": manner,
        "drafts": [point.to_dict() for point in points],
    }


def _prompts(asked: Drafting, dense: DenseModel) -> tuple[list[str], Int[Tensor, "prompts prompt"]]:
    """The names of the texts and stretches of them, as many of each, evenly over how they begin."""
    sources: Sequence[str | Corpus] = asked.request.data or [split_topics()[1]]
    names, rows = [], []
    for place, source in enumerate(sources):
        count = len(range(place, asked.request.prompts, len(sources)))
        corpus, windows = read_evaluation(
            source,
            dense.tokenizer,
            separator=BLANK_LINE,
            text_column=None,
            sequence_length=asked.length,
            max_windows=max(1, SPREAD * count),
            bos="auto",
        )
        check_tokens(dense.network, dense.tokenizer, windows)
        count = min(count, len(windows))
        names.append(corpus.name)
        rows.append(windows.input_ids[torch.arange(count) * len(windows) // max(1, count)])
    return names, torch.cat(rows)


def _show(points: Sequence[DraftPoint], title: str) -> None:
    columns = ("drafted at a time", "kept", "tokens a pass", "tokens/s", "x", "same text")
    alone = points[0]
    rows = [
        [
            "dense alone" if point is alone else str(point.draft_tokens),
            "" if point.acceptance is None else f"{point.acceptance:.1%}",
            f"{point.tokens_a_verification:.2f}",
            f"{point.rate:.1f} ± {point.rate * point.time.spread / point.time.median:.1f}",
            f"{point.rate / alone.rate:.2f}",
            "" if point is alone else _same(point),
        ]
        for point in points
    ]
    screen.table(columns, rows, title)
    screen.say(
        screen.dim(
            "Kept: of the tokens that were drafted. A pass: of the dense model, which verifies a "
            "draft and adds a token. Reading the prompts is part of the time."
        )
    )
    for point in points:
        _explain(point)


def _same(point: DraftPoint) -> str:
    if point.differences is None:
        return ""
    return f"{point.prompts - len(point.differences)} of {point.prompts}"


def _explain(point: DraftPoint) -> None:
    """Why texts differ, where any do."""
    if not point.differences:
        return
    widest = max(abs(difference.gap_nats) for difference in point.differences)
    texts = f"{len(point.differences)} texts with {point.draft_tokens} drafted tokens differ"
    if point.by_rounding:
        screen.say(
            f"{texts} from where two tokens lie within {widest:.2g} nats: a pass over several "
            f"tokens sums in another order than over one, and {point.dtype} rounds."
        )
    else:
        screen.warn(
            f"{texts} by {widest:.2g} nats, more than rounding explains: do not use this draft "
            "with this release of transformers, and report it."
        )
