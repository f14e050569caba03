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

from ghostlayers.errors import RecipeError
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
from ghostlayers.model.dense import memory_for
from ghostlayers.model.multimodal import TextView
from ghostlayers.model.residency import keep, read_tensor
from ghostlayers.model.weights import like, mark_type, stored_type
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.parallel import add_up, shards, world
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


def named_parts(cut: CutModel, parts: tuple[str, ...]) -> dict[str, str]:
    """Names of the parameters that parts consist of, and which part trains each.

    What several parts hold is trained as the first of them; adapters are added later.

    Raises:
        RecipeError: a part is empty.
    """
    part_of: dict[str, str] = {}
    for part in parts:
        if part == "lora":
            continue
        names = _names(cut, part)
        if not names:
            raise RecipeError(f"--train {part}: {_MISSING[part]}")
        for name in names:
            part_of.setdefault(name, part)
    return part_of


def _names(cut: CutModel, part: str) -> list[str]:
    """What a part trains: weights of a type that can be, which stand in no other place, too."""
    tied = cut.tied_weights()
    return [
        name
        for name in _CHOOSE[part](cut)
        if cut.network.get_parameter(name).is_floating_point() and name not in tied
    ]


def _operator(cut: CutModel) -> Iterator[str]:
    """Operators, and weights that a repair was folded into."""
    repaired, made = cut.repaired_layers(), cut.made_layers()
    for name, parameter in cut.network.named_parameters():
        layer = cut.layer_of(name)
        leaf = name.rpartition(".")[2]
        if leaf.startswith("repair_") and not leaf.endswith("centroids"):
            yield name
            continue
        folded = layer in repaired and name in cut.own and parameter.dim() > 1
        if folded and (layer not in made or "down_proj" in name):
            yield name


def _norms(cut: CutModel) -> Iterator[str]:
    """Gains (and constants) of norms behind the first cut, the last one included."""
    for path, module in cut.network.named_modules():
        if "norm" not in type(module).__name__.lower():
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            layer = cut.layer_of(name)
            behind = layer >= cut.gap if layer is not None else _is_final(cut, path)
            if behind:
                yield name


def _is_final(cut: CutModel, path: str) -> bool:
    """Whether a norm outside the layers stands behind them: declared after them, beside them."""
    home = cut.layers_path.rpartition(".")[0]
    if path.rpartition(".")[0] != home:
        return False
    order = [name for name, _ in cut.network.get_submodule(home).named_children()]
    return order.index(path.rpartition(".")[2]) > order.index(cut.layers_path.rpartition(".")[2])


def _suffix(cut: CutModel) -> Iterator[str]:
    yield from _layers_from(cut, cut.gap)
    yield from (name for name in _norms(cut) if cut.layer_of(name) is None)


def _all(cut: CutModel) -> Iterator[str]:
    yield from _layers_from(cut, 0)
    yield from (name for name in _norms(cut) if cut.layer_of(name) is None)


def _layers_from(cut: CutModel, first: int) -> Iterator[str]:
    for name, _ in cut.network.named_parameters():
        layer = cut.layer_of(name)
        if layer is not None and layer >= first and not name.endswith("centroids"):
            yield name


_CHOOSE = {"operator": _operator, "norms": _norms, "suffix": _suffix, "all": _all}
_MISSING = {
    "operator": "the model has no operator, and nothing that a repair was folded into (it was cut "
    "with --repair none?). Take suffix or norms.",
    "norms": "the model has no norms with gains behind the cut. Take operator or suffix.",
    "suffix": "no layer stands behind the first cut. Take operator or all.",
    "all": "the model has no weights of a type that can be trained.",
}


SHARE_OF_MEMORY = 0.5
"""That these may take if nothing is said of what is trained."""


def bytes_trained(dtype: torch.dtype) -> float:
    """What a number that is trained takes of each process, in a model that computes in a type.

    In float32 the weight, its gradient and two moments; the best state in the type itself; and in
    another type than float32 also what the network computes with, and that one's gradient. Of a
    sharded model the last two are made layer by layer, and of the others each process has a share;
    while it is measured, the weights are kept beside those rounded as they are stored.
    """
    if shards() > 1:
        return (4 * 4 + 2 * dtype.itemsize) / shards()
    own = 0 if dtype == torch.float32 else 2 * dtype.itemsize
    return 4 * 4 + dtype.itemsize + own


def parts_of(cut: CutModel, recipe: HealingRecipe) -> tuple[str, ...]:
    """What a recipe trains of a model.

    Raises:
        RecipeError: it says something of a part that is not among them.
    """
    if recipe.parts is not None:
        return recipe.parts
    parts = default_parts(cut)
    recipe.check_trained(parts)
    return parts


def default_parts(cut: CutModel) -> tuple[str, ...]:
    """What is trained if nothing is said; see ``docs/results/healing.md`` for what was measured.

    It depends on how much memory there is, not on how much is free, so that a run that goes on
    trains the same.
    """
    parts = tuple(part for part in ("operator", "norms") if _has(cut, part))
    room = SHARE_OF_MEMORY * memory_for(cut.dense)
    wholes = ("suffix",) if _leaves_the_front(cut) else ("all", "suffix")
    for whole in wholes:
        numbers = sum(cut.network.get_parameter(name).numel() for name in _names(cut, whole))
        if 0 < numbers * bytes_trained(cut.dense.dtype) < room:
            return (*parts, whole)
    return parts or ("suffix",)


def _leaves_the_front(cut: CutModel) -> bool:
    """Whether the layers before the cut stay as they are unless somebody says otherwise.

    What is trained of an offloaded model stays in memory; and the first layers of one that sees
    take what images say, which no training text shows.
    """
    comes_and_goes = shards() == 1 and cut.dense.residency.offloaded
    return comes_and_goes or isinstance(cut.network, TextView)


def _has(cut: CutModel, part: str) -> bool:
    return bool(_names(cut, part))
