"""What a model writes after a prompt."""

from typing import TYPE_CHECKING

import torch

from ghostlayers.evaluation.generating import end_tokens, plain_settings, write_behind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    new_tokens: int,
    *,
    at_least: int = 0,
) -> str:
    """The continuation of a prompt, most likely token first.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: what it continues.
        new_tokens: at most so many; an end-of-sequence token stops it earlier.
        at_least: so many before that token is allowed.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ends = end_tokens(model, tokenizer) or None
    ids = write_behind(
        model,
        inputs["input_ids"],
        plain_settings(new_tokens, min_new_tokens=at_least, eos_token_id=ends),
        attention_mask=inputs["attention_mask"],
    )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))
