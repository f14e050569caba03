"""What a model writes by what is asked alone: nothing of its own settings of generation counts.

transformers' `generate` takes from a model's generation config whatever the caller does not say:
beams, filters, penalties, forced tokens, kinds of caches. Those differ from one checkpoint to
another whose weights are the same, and may be anything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostlayers.errors import ModelError, NonFiniteError
from ghostlayers.runtime.documents import brief

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Processor = Callable[[Tensor, Tensor], Tensor]


def write_behind(
    model: "PreTrainedModel",
    input_ids: Tensor,
    settings: "GenerationConfig",
    *,
    attention_mask: Tensor | None = None,
    processors: tuple[Processor, ...] = (),
    **more: Any,
) -> Tensor:
    """Token ids of prompts and of what the model writes behind them, [prompts, tokens].

    Args:
        model: a causal language model of transformers.
        input_ids: the prompts, [prompts, tokens], on its device.
        settings: all that is asked; see `plain_settings`.
        attention_mask: 0 where a prompt is padded, [prompts, tokens].
        processors: change the scores of the next token, in order.
        more: for `generate`.

    Raises:
        NonFiniteError: the logits hold NaN or infinity.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    with _set(model, settings):
        written: Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=[_check_scores, *processors],
            **more,
        )
    return written


def plain_settings(new_tokens: int, *, sampled: bool = False, **more: Any) -> "GenerationConfig":
    """The likeliest token each time, or a draw from all of them.

    Args:
        new_tokens: at most so many.
        sampled: draw.
        more: settings beside these.
    """
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    return GenerationConfig(**{"max_new_tokens": new_tokens, "pad_token_id": 0, **drawn, **more})


def end_tokens(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a text, as the model's settings and its tokenizer have them.

    Raises:
        ModelError: the settings name something else.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    known = [token for token in (*listed, tokenizer.eos_token_id) if token is not None]
    for token in known:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ModelError(
                "the model's generation_config.json says which tokens end a text: expected "
                f"'eos_token_id' to be token numbers, got {brief(token)}. Correct or remove it."
            )
    return sorted(set(known))


@contextmanager
def _set(model: Any, settings: "GenerationConfig") -> Iterator[None]:
    """Have the model's own settings be these for as long as it writes."""
    writer = getattr(model.generate, "__self__", model)  # a view's `generate` is the whole model's
    own = writer.generation_config
    writer.generation_config = settings
    try:
        yield
    finally:
        writer.generation_config = own


def _check_scores(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Refuse scores that no token can be chosen by; -inf leaves a token out."""
    del input_ids
    if not bool((scores.max(dim=-1).values.isfinite()).all()):
        raise NonFiniteError(
            "the model's logits hold NaN or infinity, so that it cannot write: check its weights, "
            "or try --dtype float32."
        )
    return scores
