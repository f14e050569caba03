"""Where the weights of decoder layers are while they are not needed.

An offloaded model (accelerate's big-model loading) leaves its decoder layers on disk, or in the
processor's memory beside an accelerator, and brings the weights of a module in for each call. A
sweep calls one layer on many windows before the next, so here a layer is brought in whole, once,
and stays until another is wanted; the next one is fetched meanwhile (`ahead`).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.model.ahead import Ahead, offloaded_modules, offloading_hook, stretches
from ghostlayers.model.weights import like
from ghostlayers.runtime.allocator import return_freed_memory


@dataclass
class Memory:
    """How much memory a run may take beside its model's resident weights.

    Attributes:
        limit: bytes that the process may hold in all; None for what is free.
        spent: bytes of it that weights, code and workspace take.
    """

    limit: int | None = None
    spent: int = 0

    @contextlib.contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Count bytes as taken for as long as the context lasts."""
        self.spent += size
        try:
            yield
        finally:
            self.spent -= size

    @property
    def left(self) -> int | None:
        """Bytes for streams and sums; None if nothing limits them."""
        return None if self.limit is None else max(0, self.limit - self.spent)


class Residency:
    """Which decoder layer of a model is in memory.

    Args:
        layers: the decoder layers.
        memory: how much a run may take beside them.
    """

    def __init__(self, layers: Iterable[nn.Module], memory: Memory | None = None) -> None:
        self._layers = list(layers)
        self._held: int | None = None
        self._hooks: list[tuple[nn.Module, Any]] = []
        self._ahead = Ahead()
        self.offloaded = any(map(is_offloaded, self._layers))
        self.on_disk = self.offloaded and any(stretches(layer) for layer in self._layers)
        self.memory = memory or Memory()

    def bring(self, index: int) -> nn.Module:
        """The layer of that number with its weights in place; the one before it may go."""
        if not self.offloaded or self._held == index:
            return self._layers[index]
        self._let_go()
        layer = self._layers[index]
        self._ahead.wait()
        for module, hook in offloaded_modules(layer):
            hook.pre_forward(module)
            hook.offload = False  # its calls find the weights in place
            self._hooks.append((module, hook))
        self._held = index
        if index + 1 < len(self._layers):
            self._ahead.fetch(self._layers[index + 1])
        return layer

    def release(self) -> None:
        """Let the layer in memory go, and the one after it."""
        self._ahead.wait()
        self._let_go()

    def _let_go(self) -> None:
        for module, hook in self._hooks:
            hook.offload = True
            hook.post_forward(module, None)
        self._hooks, self._held = [], None
        return_freed_memory()


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights of a model are elsewhere while they are not used."""
    return any(True for _ in offloaded_modules(model))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, which is not where offloaded weights are."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = [d for h in hooks if (d := getattr(h, "execution_device", None)) is not None]
    return torch.device(devices[0] if devices else "cpu")


def keep(module: nn.Module) -> None:
    """Bring a module's weights in for good, so that they can be changed."""
    hook = offloading_hook(module)
    if hook is not None:
        hook.pre_forward(module)
        hook.offload = False


def sorted_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, one at a time, offloaded ones read from where they are."""
    for name, _ in sorted(model.named_parameters()):
        yield name, read_tensor(model, name)


def read_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by name, read from where it is if it is offloaded."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    own: Tensor = getattr(module, leaf)
    held = own
    if own.is_meta:
        held = module._hf_hook.weights_map[leaf]  # type: ignore[union-attr,index]
    return like(own, held.detach())


@contextlib.contextmanager
def without_hook(module: nn.Module) -> Iterator[None]:
    """Take accelerate's hook off a module whose class is about to change, and put it back.

    The hook calls the method of the class that it found, not of the new one.
    """
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)
    yield
    if hook is not None:
        add_hook_to_module(module, hook)


def shared_maps(model: nn.Module) -> list[Any]:
    """What hooks know of weights: a copy of the model reads the same."""
    maps: list[Any] = []
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for name in ("weights_map", "tied_params_map"):
            shared = getattr(hook, name, None)
            if shared is not None:
                maps.append(shared)
    return maps


def offloaded_sets(model: nn.Module) -> list[Any]:
    """What holds the offloaded weights of a model, each once."""
    maps = [hook.weights_map for _, hook in offloaded_modules(model)]
    return list({id(d): d for entry in maps if (d := getattr(entry, "dataset", entry))}.values())


def largest_layer(layers: Sequence[nn.Module]) -> int:
    """Bytes of the biggest decoder layer in the type that it computes in."""
    return max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers)
