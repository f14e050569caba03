"""What is trained of a cut model: which weights, their float32 masters, and what is saved of them.

The cut model itself stays as it is. Its structure is copied, and in the copy what is trained has
weights of its own; all others are shared, and nothing is recorded of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.healing.adapters import (
    ADAPTER,
    BASE,
    LORA,
    adapted_projections,
    add_adapters,
    drawing_adapters,
    with_adapters,
)
from ghostlayers.healing.cut_model import CutModel, put
from ghostlayers.healing.parts import named_parts
from ghostlayers.model.residency import keep, read_tensor
from ghostlayers.model.weights import like, mark_type, stored_type
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.parallel import add_up, world
from ghostlayers.surgery.removal import share_weights, with_weights


@dataclass(frozen=True)
class Trained:
    """The weights that are trained.

    Attributes:
        network: the cut model's structure with weights of its own where they are trained.
        parameters: what the network computes with, by name.
        masters: the same in float32; the very tensors where they are float32 already.
        parts: which part of the recipe each belongs to, by name.
        start: the first layer of the cut model that is trained or differs from the dense model.
        adapted: projections that carry adapters, by their names in the cut model.
    """

    network: Any
    parameters: Mapping[str, nn.Parameter]
    masters: Mapping[str, Tensor]
    parts: Mapping[str, str]
    start: int
    adapted: tuple[str, ...] = ()
    cut: CutModel = field(repr=False, kw_only=True)
    _spare: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def replicas(self) -> Mapping[str, Tensor]:
        """The masters of which every process holds the whole."""
        return self.masters

    @property
    def num_trained(self) -> int:
        """Numbers that are trained, in all processes together."""
        return sum(tensor.numel() for tensor in self.parameters.values())

    def write_back(self) -> None:
        """Let the network compute with the masters."""
        for name, master in self.replicas.items():
            own = self.parameters[name]
            if own is not master:
                own.data.copy_(master)

    def take_gradients(self) -> None:
        """Add what a backward pass left to the masters' gradients, in float32."""
        for name, master in self.replicas.items():
            own = self.parameters[name]
            if own is master or own.grad is None:
                continue
            if master.grad is not None:
                master.grad.add_(own.grad)
            elif name in self._spare:
                master.grad = self._spare.pop(name).copy_(own.grad)
            else:
                master.grad = own.grad.float()
            own.grad = None

    def set_gradients_aside(self) -> None:
        """Forget all gradients; on a processor their memory, dear to be had anew, is kept."""
        for name, master in self.replicas.items():
            beside = self.parameters[name] is not master and master.device.type == "cpu"
            if beside and master.grad is not None:
                self._spare[name] = master.grad
        for master in self.masters.values():
            master.grad = None

    def add_up_gradients(self) -> None:
        """Have every process hold the gradients of all windows of a step."""
        for master in self.replicas.values() if world().size > 1 else ():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            add_up([master.grad])

    def shorten_gradients(self, most: float) -> float:
        """The norm of all gradients, which are shortened to ``most`` where it is greater."""
        return float(nn.utils.clip_grad_norm_(list(self.masters.values()), most))

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What is trained by its names in the cut model, rounded to the types of its files.

        Adapters are as they are, under names that begin with `LORA`.
        """
        kept: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            plain = name.replace(BASE, ".")
            if self.parts[name] == "lora":
                kept[f"{LORA}{name}"] = master.detach().clone()
            else:
                kept[plain] = master.detach().to(self.kind_of(plain), copy=True)
        return kept

    def merged(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """A state's weights as files hold them, projections with their adapters in them."""
        yield from ((name, value) for name, value in stored.items() if not name.startswith(LORA))
        for path in self.adapted:
            name, down, up = f"{path}.weight", f"{LORA}{path}.lora_A", f"{LORA}{path}.lora_B"
            scale = self.network.get_submodule(path).scaling[ADAPTER]
            change = stored[f"{up}.{ADAPTER}.weight"] @ stored[f"{down}.{ADAPTER}.weight"] * scale
            yield name, self._with_change(name, change).to(self.kind_of(name))

    def kind_of(self, name: str) -> torch.dtype:
        """The type that a weight's file has, or that is computed in, where that rounds it."""
        own = self.cut.network.get_parameter(name)
        kind = stored_type(own, self.cut.dense.stored_dtype)
        return kind if torch.promote_types(kind, own.dtype) == own.dtype else own.dtype

    def healed(self, stored: Mapping[str, Tensor]) -> Any:
        """The cut model with trained weights in their places, as its files will hold them."""
        return self._with_weights(self.merged(stored))

    def _with_weights(self, values: Iterable[tuple[str, Tensor]]) -> Any:
        weights, kinds = {}, {}
        for name, tensor in values:
            weights[name] = tensor.to(self.cut.network.get_parameter(name).dtype)
            kinds[name] = tensor.dtype
        network = with_weights(self.cut.network, weights)
        for name, kind in kinds.items():
            mark_type(network.get_parameter(name), name, kind)
        return network

    @contextmanager
    def as_saved(self, stored: Mapping[str, Tensor]) -> Iterator[Any]:
        """The cut model as `healed` has it, to be measured."""
        yield self.healed(stored)

    def _with_change(self, name: str, change: Tensor) -> Tensor:
        """A projection's weight in float32, with what its adapter adds to it."""
        return read_tensor(self.cut.network, name).float() + change


def prepare(cut: CutModel, recipe: HealingRecipe, parts: tuple[str, ...]) -> Trained:
    """Weights of their own for what is trained.

    Raises:
        RecipeError: the model has nothing of that kind.
    """
    names = named_parts(cut, parts)
    network = share_weights(cut.network)
    for name in names:
        own = read_tensor(cut.network, name)
        put(network, name, like(own, nn.Parameter(own.clone())))
    adapted = adapted_projections(cut, recipe, parts, names)
    for path in adapted:  # adapters go where the weights are
        keep(network.get_submodule(path))
    with drawing_adapters(recipe):
        add_adapters(network, adapted, recipe)
    names = with_adapters(names, network, adapted)
    parameters = dict(network.named_parameters())
    chosen = {name: parameters[name] for name in names}
    masters = {
        name: own if own.dtype == torch.float32 else nn.Parameter(own.detach().float())
        for name, own in chosen.items()
    }
    return Trained(network, chosen, masters, names, start_of(cut, names), adapted, cut=cut)


def start_of(cut: CutModel, trained: Iterable[str]) -> int:
    """The first layer of the cut model that is trained or differs from the dense model.

    Args:
        cut: the cut model.
        trained: names of parameters, or of projections that carry adapters.
    """
    layers = [cut.layer_of(name) for name in {*trained, *cut.own}]
    return min([cut.gap, *(layer for layer in layers if layer is not None)])


@contextmanager
def recording(trained: Trained) -> Iterator[None]:
    """Record what is trained for backward passes, and nothing else, whoever shares it."""
    flags = [(tensor, tensor.requires_grad) for tensor in trained.network.parameters()]
    wanted = {id(tensor) for tensor in trained.parameters.values()}
    try:
        for tensor, _ in flags:
            if tensor.is_floating_point():
                tensor.requires_grad_(id(tensor) in wanted)
        yield
    finally:
        for tensor, flag in flags:
            if tensor.is_floating_point():
                tensor.requires_grad_(flag)
