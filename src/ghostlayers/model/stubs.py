"""Stand-ins for decoder layers: they note a call, or put another stream in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ghostlayers.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerCall:
    """The arguments, hidden states aside, with which the model calls one decoder layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stub(nn.Module):
    """Stands in for a decoder layer and answers every other attribute from it."""

    def __init__(
        self, layer: nn.Module, wrap: Callable[[nn.Module, Tensor, LayerCall], Any]
    ) -> None:
        super().__init__()
        # A plain tuple hides the layer from nn.Module, so that it is not registered twice.
        self._real = (layer,)
        self._wrap = wrap

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._real[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (
            (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        )  # families pass the stream either way
        call = LayerCall(tuple(rest), kwargs)
        return self._wrap(self._real[0], self._see(hidden, call), call)

    def _see(self, hidden: Tensor, call: LayerCall) -> Tensor:
        raise NotImplementedError


class Recorder(_Stub):
    """Notes its call and hands the stream on."""

    _seen: tuple[Tensor, LayerCall] | None = None

    def _see(self, hidden: Tensor, call: LayerCall) -> Tensor:
        self._seen = (hidden, call)
        return hidden

    def call(self) -> LayerCall:
        return self._require()[1]

    def hidden_states(self) -> Tensor:
        return self._require()[0]

    def _require(self) -> tuple[Tensor, LayerCall]:
        if self._seen is None:
            raise UnsupportedModelError(
                f"the model never called its {type(self._real[0]).__name__}: expected one call of "
                "every decoder layer a forward pass."
            )
        return self._seen


class Injector(_Stub):
    """Replaces the stream by the given one, whatever came before."""

    def __init__(self, layer: nn.Module, wrap: Any, stream: Tensor) -> None:
        super().__init__(layer, wrap)
        self._stream = (stream,)

    def _see(self, hidden: Tensor, call: LayerCall) -> Tensor:
        del hidden, call
        return self._stream[0]
