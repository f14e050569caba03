"""Bytes of a model, of a cut of it, and of all that running it takes.

Weights count as the result stores them: of a packed base or a GGUF file that is copied, what is
copied counts as it lies. Embeddings count, a weight that serves twice counts once, and what a
repair leaves to run counts as part of the cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ghostlayers.budgets.caches import LayerCache, caches_size, layer_caches
from ghostlayers.budgets.types import TYPES, bytes_in_type
from ghostlayers.checkpoint.output import Output
from ghostlayers.checkpoint.packed import PackedBase
from ghostlayers.model.dense import DenseModel
from ghostlayers.plan.saving import added_numbers, copied_base, result_bytes
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.wish import CONTEXT, FLOATS
from ghostlayers.repairs import RepairMethod, find_method
from ghostlayers.repairs.shapes import operator_numbers
from ghostlayers.spans import Span, kept_layers
from ghostlayers.text.tokens import check_sequence_length

PROMPT = 512
"""Tokens of a prompt that engines read at a time, unless they are told otherwise."""

CHANNELS_AT_ONCE = 4
"""Vectors a token that a layer holds at a time, of the stream's width and of the MLP's each."""

LOGIT = 4
"""Bytes of a logit: engines make them in float32."""


@dataclass(frozen=True)
class Weights:
    """What the weights of a model and of its cuts take.

    Attributes:
        dense: the model.
        recipe: how the cut is repaired and written.
        output: what is made of it.
        as_type: the type of the weights instead; None for how the result is stored.
    """

    dense: DenseModel
    recipe: Recipe
    output: Output
    as_type: str | None = None

    def of(self, spans: Sequence[Span]) -> int:
        """Bytes without these layers, the repair included; without spans, of the dense model."""
        return self._of(spans, self.recipe.method)

    def bare(self, spans: Sequence[Span]) -> int:
        """The same without a repair."""
        return self._of(spans, find_method("none"))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Bytes that go with each decoder layer."""
        whole = self.bare(())
        alone = (self.bare((Span(i, i + 1),)) for i in range(self.dense.num_layers))
        return tuple(whole - own for own in alone)

    @property
    def words(self) -> str:
        """The type that they are counted in."""
        if self.as_type is not None:
            return self.as_type
        if self.output.copies(self.dense):
            return "the file's own types"
        if self.dense.base.quantized and self.recipe.quantized == "keep":
            return f"{self.dense.base.quantized}, packed as in the base"
        return str(self.dense.stored_dtype).removeprefix("torch.")

    @cached_property
    def _base(self) -> PackedBase | None:
        return copied_base(self.dense, self.recipe, self.output)

    def _of(self, spans: Sequence[Span], method: RepairMethod) -> int:
        dense, recipe = self.dense, self.recipe
        if self.as_type is None:
            return result_bytes(dense, recipe, method, spans, self.output, self._base)
        bare = bytes_in_type(dense, kept_layers(spans, dense.num_layers), self.as_type)
        if method.name == "none":
            return bare
        added = added_numbers(dense, recipe, method, spans)
        return bare + added * operator_itemsize(self.as_type)


def operator_itemsize(as_type: str) -> int:
    """Bytes of a number of a repair's operator, which no quantiser takes: 16 bits at the least."""
    return 4 if as_type == "float32" else 2


def repair_bytes(dense: DenseModel, method: RepairMethod) -> int:
    """Bytes of what a repair leaves to run at one gap; 0 where it folds into existing weights."""
    return operator_numbers(method, dense.hidden_size) * dense.stored_dtype.itemsize


@dataclass(frozen=True)
class Room:
    """What running a model takes: weights, caches of one sequence, and room to compute in.

    Attributes:
        weights: see `Weights`.
        caches: see `layer_caches`.
        context: tokens in the caches.
    """

    weights: Weights
    caches: tuple[LayerCache, ...]
    context: int

    @classmethod
    def of_model(cls, weights: Weights, context: int | None = None) -> "Room":
        """That of a model, behind so many tokens or a usual number."""
        return cls(weights, layer_caches(weights.dense), context_of(weights.dense, context))

    def of(self, spans: Sequence[Span]) -> int:
        """Bytes in all, without these layers and with their repair."""
        return self.weights.of(spans) + self.cached(spans) + self.allowance

    def bare(self, spans: Sequence[Span]) -> int:
        """The same without a repair."""
        return self.weights.bare(spans) + self.cached(spans) + self.allowance

    def cached(self, spans: Sequence[Span]) -> int:
        """Bytes of the caches."""
        kept = kept_layers(spans, len(self.caches))
        return caches_size(self.caches, kept, self.context, self.itemsize)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Bytes that go with each decoder layer."""
        own = (cache.size(self.context, self.itemsize) for cache in self.caches)
        return tuple(w + c for w, c in zip(self.weights.layers, own, strict=True))

    @property
    def itemsize(self) -> int:
        """Bytes of a number of a cache: 16 bits, but for models that compute in 32."""
        asked = self.weights.as_type
        if asked in FLOATS:
            return int(getattr(torch, asked).itemsize)
        return self.weights.dense.stored_dtype.itemsize if asked is None else 2

    @property
    def tokens(self) -> int:
        """Of a prompt that are computed at a time."""
        return min(PROMPT, self.context)

    @property
    def allowance(self) -> int:
        """Bytes to compute in: activations of a piece of the prompt, logits of one position."""
        config = self.weights.dense.network.config.get_text_config()
        hidden = int(config.hidden_size)
        inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
        return self.tokens * CHANNELS_AT_ONCE * (hidden + inner) * 2 + LOGIT * int(
            config.vocab_size
        )


def context_of(dense: DenseModel, asked: int | None) -> int:
    """Tokens whose caches are counted: as asked, or a usual number that the model has places for.

    Raises:
        WindowError: more than the model's positions.
    """
    limit = getattr(dense.network.config.get_text_config(), "max_position_embeddings", None)
    context = min(CONTEXT, limit or CONTEXT) if asked is None else asked
    check_sequence_length(dense.config, context, "--context", "caches")
    return context


__all__ = ["TYPES", "Room", "Weights", "context_of", "repair_bytes"]
