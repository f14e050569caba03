"""The sweep: the residual stream at every layer boundary, one decoder layer at a time.

No knowledge of a model family is needed. Every decoder layer is first replaced by a stub that notes
the arguments it is called with and hands its hidden states on unchanged; one call of the model then
tells each layer's own arguments (masks by layer type, rotary embeddings, positions). After that the
real layers are called one after another with those arguments, which gives the model's own hidden
states bit for bit, and lets a caller stop early, change the stream, or skip layers.

The layers of a running model are put back in any case.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ghostlayers.errors import NonFiniteError, UnsupportedModelError
from ghostlayers.model.residency import Memory, Residency
from ghostlayers.model.stubs import Injector, LayerCall, Recorder
from ghostlayers.model.taps import Taps, tapped
from ghostlayers.modeling import decoder_layers
from ghostlayers.runtime.machine import input_device, room_for_streams
from ghostlayers.text.tokens import Windows

TOKENS_PER_BATCH = 1024
"""Tokens of a micro-batch on a processor, where more only costs memory."""

TOKENS_PER_BATCH_ON_ACCELERATOR = 8192
"""... and on an accelerator, which needs many to be busy."""

Stream = Float[Tensor, "batch sequence hidden"]


@dataclass(frozen=True)
class MicroBatch:
    """Some windows, and how the model would call each of its layers on them.

    Attributes:
        input_ids: [batch, sequence].
        attention_mask: 1 for tokens, 0 for padding, [batch, sequence]; None if nothing is padded.
        calls: one a decoder layer; of the first part, where there are parts.
        parts: the windows a few at a time, where a layer cannot compute all of them at once.
    """

    input_ids: Int[Tensor, "batch sequence"]
    attention_mask: Int[Tensor, "batch sequence"] | None
    calls: tuple[LayerCall, ...]
    parts: "tuple[MicroBatch, ...]" = ()

    def tokens(self, stream: Stream) -> Float[Tensor, "tokens hidden"]:
        """The stream of all tokens that are not padding, in window order."""
        if self.attention_mask is None:
            return stream.flatten(0, 1)
        return stream[self.attention_mask.bool()]


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList as long as the config says.

    Raises:
        UnsupportedModelError: the model has no such list.
    """
    expected = getattr(model.config, "num_hidden_layers", None)
    within: Any = getattr(model, "text_part", model)  # a tower may have as many layers
    layers = None if expected is None else decoder_layers(within, expected)
    if layers is not None:
        return layers
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {expected} decoder layers: expected a decoder-only "
        "causal language model with one residual stream."
    )


class LayerwiseModel:
    """A causal language model whose decoder layers are called one at a time.

    Args:
        network: any Hugging Face causal language model with one stack of decoder layers. It is put
            into evaluation mode and otherwise left as it is.
        memory: how much a run may take beside the weights that stay in memory.
    """

    def __init__(self, network: PreTrainedModel, memory: Memory | None = None) -> None:
        self.network: PreTrainedModel = network.eval()
        self.layers = find_decoder_layers(network)
        self.residency = Residency(self.layers, memory)
        self._returns_tuple: bool | None = None
        accepted = inspect.signature(network.forward).parameters
        self._keeps_some_logits = "logits_to_keep" in accepted

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids belong."""
        return input_device(self.network)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stream."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def hidden_size(self) -> int:
        """Channels of the stream."""
        return int(self.network.config.hidden_size)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights in memory, until another one is asked for."""
        return self.residency.bring(index)

    def windows_per_call(self, sequence_length: int, batch_size: int = 0) -> int:
        """How many windows a layer computes at a time."""
        on_processor = self.device.type == "cpu"
        tokens = TOKENS_PER_BATCH if on_processor else TOKENS_PER_BATCH_ON_ACCELERATOR
        return batch_size or max(1, tokens // sequence_length)

    def windows_at_once(
        self,
        windows: int,
        sequence_length: int,
        batch_size: int = 0,
        copies: int = 1,
        elsewhere: int = 0,
    ) -> int:
        """How many windows pass a layer before the next one is brought in.

        Those of one call, where all layers are in memory. Of an offloaded model as many as there is
        memory and disk for, so that each layer is brought in as seldom as possible.

        Args:
            windows: how many are visited.
            sequence_length: tokens of each.
            batch_size: windows a call; 0 chooses.
            copies: of the stream, that a caller holds at a time.
            elsewhere: copies of the stream that a caller keeps where the layers are.
        """
        if not self.residency.offloaded:
            return self.windows_per_call(sequence_length, batch_size)
        left, stream = self.residency.memory.left, self.stream_bytes(sequence_length)
        fits = windows if left is None else left // ((copies + 1) * stream)
        if elsewhere:
            room = room_for_streams(on_disk=self.residency.on_disk)
            fits = min(fits, room // (elsewhere * stream))
        return max(1, min(windows, fits))

    def stream_bytes(self, sequence_length: int) -> int:
        """Bytes of the residual stream of a window at one boundary."""
        return sequence_length * self.hidden_size * self.dtype.itemsize

    @torch.no_grad()
    def begin(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        attention_mask: Int[Tensor, "batch sequence"] | None = None,
    ) -> tuple[MicroBatch, Stream]:
        """Record how the model calls its layers on these windows, without running them.

        Returns:
            The micro-batch, and its residual stream at boundary 0.
        """
        input_ids = input_ids.to(self.device)
        if self._returns_tuple is None:
            self._ask_one_layer(input_ids[:1, :1])
        together = self.windows_per_call(input_ids.shape[1])
        if self.residency.offloaded and len(input_ids) > together:
            return self._begin_parts(input_ids, attention_mask, together)
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        stubs = [Recorder(layer, self._wrap) for layer in self.layers]
        with self._replaced(stubs):
            self.network.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
        batch = MicroBatch(input_ids, attention_mask, tuple(stub.call() for stub in stubs))
        return batch, stubs[0].hidden_states()

    def _begin_parts(
        self, input_ids: Tensor, attention_mask: Tensor | None, together: int
    ) -> tuple[MicroBatch, Stream]:
        masks = (
            [None] * len(input_ids) if attention_mask is None else attention_mask.split(together)
        )
        begun = [
            self.begin(ids, mask)
            for ids, mask in zip(input_ids.split(together), masks, strict=False)
        ]
        parts = tuple(batch for batch, _ in begun)
        whole = MicroBatch(input_ids, attention_mask, parts[0].calls, parts)
        return whole, torch.cat([stream for _, stream in begun])

    def _ask_one_layer(self, input_ids: Tensor) -> None:
        """Find out on a single token whether layers return tuples; see `_wrap`."""
        with self._replaced([Recorder(layer, self._wrap) for layer in self.layers]):
            self.network.base_model(input_ids=input_ids, use_cache=False)

    def run_layer(
        self,
        layer: int,
        batch: MicroBatch,
        stream: Stream,
        *,
        weights: Mapping[str, Tensor] | None = None,
        taps: Taps = (),
        differentiable: bool = False,
    ) -> Stream:
        """Run one decoder layer on a stream, as the model would on these windows.

        Args:
            layer: which.
            batch: the windows that the stream belongs to.
            stream: the layer's input.
            weights: parameters of the layer, by name, to use instead of its own.
            taps: modules of the layer, by path, whose input or output is wanted.
            differentiable: record it for a backward pass.
        """
        if batch.parts:
            return self._layer_on_parts(layer, batch, stream, weights, taps, differentiable)
        call, module = batch.calls[layer], self.layer(layer)
        with torch.set_grad_enabled(differentiable), tapped(module, taps):
            if weights:
                output = functional_call(module, dict(weights), (stream, *call.args), call.kwargs)
            else:
                output = module(stream, *call.args, **call.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _layer_on_parts(
        self,
        layer: int,
        batch: MicroBatch,
        stream: Stream,
        weights: Mapping[str, Tensor] | None,
        taps: Taps,
        differentiable: bool,
    ) -> Stream:
        """The parts of a batch one after another; what taps catch of them is joined."""
        outputs, caught, taps = [], [], list(taps)
        how: dict[str, Any] = {"weights": weights, "taps": taps, "differentiable": differentiable}
        sizes = [len(part.input_ids) for part in batch.parts]
        for part, some in zip(batch.parts, stream.split(sizes), strict=True):
            outputs.append(self.run_layer(layer, part, some, **how))
            caught.append([tap.value for _, tap in taps])
        for (_, tap), values in zip(taps, zip(*caught, strict=True), strict=False):
            tap.value = None if any(v is None for v in values) else torch.cat(values)
        return torch.cat(outputs)

    def logits(
        self,
        batch: MicroBatch,
        stream: Stream,
        positions: slice | Tensor | None = None,
        *,
        differentiable: bool = False,
    ) -> Float[Tensor, "batch positions vocabulary"]:
        """Everything after the last layer (final norm, head, scaling) on a stream at boundary L.

        Args:
            batch: the windows that the stream belongs to.
            stream: hidden states before the final norm.
            positions: compute the head for these only, where the model can: a head of 262,144
                words on a long window is gigabytes otherwise.
            differentiable: record it for a backward pass.
        """
        stubs: list[nn.Module] = [Injector(layer, self._wrap, stream) for layer in self.layers]
        wanted = slice(None) if positions is None else positions
        options = {}
        if self._keeps_some_logits and positions is not None:
            every = torch.arange(batch.input_ids.shape[1], device=self.device)
            options["logits_to_keep"] = every[positions]
        with torch.set_grad_enabled(differentiable), self._replaced(stubs):
            logits: Tensor = self.network(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **options,
            ).logits
        return logits if options else logits[:, wanted]

    def final_states(
        self, batch: MicroBatch, stream: Stream, *, differentiable: bool = False
    ) -> Stream:
        """What the base model makes of a stream at boundary L: the hidden states behind its norm.

        Args:
            batch: the windows that the stream belongs to.
            stream: hidden states before the final norm.
            differentiable: record it for a backward pass.
        """
        stubs: list[nn.Module] = [Injector(layer, self._wrap, stream) for layer in self.layers]
        with torch.set_grad_enabled(differentiable), self._replaced(stubs):
            states: Tensor = self.network.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        return states

    @contextmanager
    def _replaced(self, stubs: Sequence[nn.Module]) -> Iterator[None]:
        originals = list(self.layers)
        try:
            for index, stub in enumerate(stubs):
                self.layers[index] = stub
            yield
        finally:
            for index, layer in enumerate(originals):
                self.layers[index] = layer

    def _wrap(self, layer: nn.Module, hidden: Stream, call: LayerCall) -> Any:
        """What the model expects a layer to return: a tensor, or a tuple that starts with one.

        Only a real layer knows, so the first stub ever called asks its layer once.
        """
        if self._returns_tuple is None:
            self._returns_tuple = isinstance(layer(hidden, *call.args, **call.kwargs), tuple)
        return (hidden, None) if self._returns_tuple else hidden


def micro_batches(model: LayerwiseModel, windows: Windows, batch_size: int = 0) -> Iterator[Tensor]:
    """Token ids of a few windows at a time; 0 chooses how many."""
    together = model.windows_at_once(len(windows), windows.sequence_length, batch_size)
    yield from windows.input_ids.split(together)


def check_finite(stream: Stream, layer: int) -> None:
    """Refuse a stream with NaN or infinity, naming the layer that wrote it."""
    if bool(torch.isfinite(stream).all()):
        return
    dtype = str(stream.dtype).removeprefix("torch.")
    advice = (
        "float16 overflows above 65,504: try --dtype bfloat16 or float32"
        if stream.dtype is torch.float16
        else "check the model's weights, or try --dtype float32"
    )
    raise NonFiniteError(f"decoder layer {layer} gave NaN or infinity in {dtype}; {advice}.")
