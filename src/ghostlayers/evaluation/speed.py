"""How long a model takes to read a prompt."""

import statistics
import time
from typing import TYPE_CHECKING

import torch

from ghostlayers.runtime.machine import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prefill_seconds(
    model: "PreTrainedModel", *, num_tokens: int = 512, repeats: int = 5, warmup: int = 1
) -> float:
    """Median wall-clock seconds of one forward pass over a prompt, without a cache.

    Args:
        model: any causal language model.
        num_tokens: length of the prompt, batch one.
        repeats: timed passes.
        warmup: passes before them.
    """
    return statistics.median(prefill_times(model, num_tokens, repeats, warmup))


@torch.no_grad()
def prefill_times(
    model: "PreTrainedModel", num_tokens: int, repeats: int, warmup: int = 1
) -> list[float]:
    """Wall-clock seconds of each of several forward passes; arguments as `prefill_seconds`."""
    device = input_device(model)
    ids = (torch.arange(num_tokens, device=device) % model.config.vocab_size)[None]
    elapsed = []
    for index in range(warmup + repeats):
        synchronise(device)
        start = time.perf_counter()
        model.base_model(input_ids=ids, use_cache=False)
        synchronise(device)
        if index >= warmup:
            elapsed.append(time.perf_counter() - start)
    return elapsed


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done its work: it goes on after a call has returned."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
