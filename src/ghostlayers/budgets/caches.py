"""What a model keeps of a sequence: keys and values, windows of them, recurrent states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostlayers.evaluation.bench import tensors_in
from ghostlayers.model.dense import DenseModel

SHORT = (2, 4)
"""Tokens of the prompts that tell what a cache keeps of a token and what it keeps in any case."""


@dataclass(frozen=True)
class LayerCache:
    """What one decoder layer keeps of one sequence.

    Attributes:
        per_token: numbers kept of every token, in the type of the cache.
        fixed: bytes kept in any case, such as a recurrent state in its own type.
        window: only the last so many tokens are kept; None for all.
    """

    per_token: int = 0
    fixed: int = 0
    window: int | None = None

    def size(self, context: int, itemsize: int) -> int:
        """Bytes behind so many tokens, a number of the cache taking so many."""
        tokens = context if self.window is None else min(context, self.window)
        return tokens * self.per_token * itemsize + self.fixed


def layer_caches(dense: DenseModel) -> tuple[LayerCache, ...]:
    """What every decoder layer keeps, from the caches of two prompts of a few random tokens."""
    short, long = (_held(dense, tokens) for tokens in SHORT)
    return tuple(map(_layer_cache, short, long))


def caches_size(
    caches: Sequence[LayerCache], kept_layers: Sequence[int], context: int, itemsize: int
) -> int:
    """Bytes of the caches of the layers that stay, behind so many tokens of one sequence."""
    return sum(caches[layer].size(context, itemsize) for layer in kept_layers)


@dataclass(frozen=True)
class _Held:
    """Numbers and bytes of one layer's cache; its window, where it says one."""

    tokens: int
    numbers: int
    size: int
    window: int | None


def _layer_cache(short: _Held, long: _Held) -> LayerCache:
    further = long.tokens - short.tokens
    grown = (long.numbers - short.numbers) // further
    itemsize = (long.size - short.size) // max(1, long.numbers - short.numbers)
    return LayerCache(grown, short.size - grown * short.tokens * itemsize, short.window)


@torch.no_grad()
def _held(dense: DenseModel, tokens: int) -> list[_Held]:
    """The caches of all layers behind a short prompt."""
    config = dense.network.config
    ids = torch.arange(tokens, device=dense.device)[None] % config.get_text_config().vocab_size
    cache = dense.network(input_ids=ids, use_cache=True).past_key_values
    layers = list(getattr(cache, "layers", ()))
    parts = [tensors_in(layers[i]) if i < len(layers) else [] for i in range(dense.num_layers)]
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    windows += [None] * (dense.num_layers - len(layers))
    return [_of(tokens, part, window) for part, window in zip(parts, windows, strict=False)]


def _of(tokens: int, tensors: Sequence[Tensor], window: Any) -> _Held:
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    numbers = sum(tensor.numel() for tensor in floats)
    size = sum(tensor.numel() * tensor.element_size() for tensor in floats)
    return _Held(tokens, numbers, size, None if window is None else int(window))
