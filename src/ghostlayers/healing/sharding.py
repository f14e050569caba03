"""A cut model and its dense one divided among the processes of a run, by FSDP2.

`torch.distributed.fsdp.fully_shard` gives every process a share of each decoder layer, brings a
layer together while it computes, and scatters its gradients. Embeddings, the last norm and the head
stay whole in every process, where the loss uses them directly. The layers come from disk one at a
time, so that no process ever holds a whole model; what is not trained is one share for both models.
The cut model that is saved stays on disk, and takes what was trained at the end.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.healing.adapters import (
    BASE,
    adapted_name,
    adapted_projections,
    add_adapters,
    drawing_adapters,
    is_adapter,
    with_adapters,
)
from ghostlayers.healing.cut_model import CutModel, put
from ghostlayers.healing.parts import named_parts
from ghostlayers.healing.sharding_checks import REPLICAS
from ghostlayers.healing.trained import Trained, start_of
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.residency import Residency, read_tensor
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.parallel import add_up, world
from ghostlayers.surgery.removal import share_weights


def divide_dense(dense: DenseModel) -> None:
    """Give this process its share of every decoder layer of a dense model on disk, in place.

    Raises:
        UnsupportedModelError: layers share weights.
    """
    _check_apart(dense)
    dense.residency.release()
    mesh = _mesh(dense)
    units = []
    for layer in dense.layers:
        _bring_in(layer, dense.device)
        units.append(_divide(layer, mesh, MixedPrecisionPolicy(cast_forward_inputs=False)))
    _share_buffers(units)
    for unit in units:  # torch moves shares that it pads now, before the cut model has them
        unit.unshard()
        unit.reshard()
    _settle(dense.network, dense.device)
    dense.residency = Residency(dense.layers, dense.residency.memory)


def prepare_shares(
    cut: CutModel, recipe: HealingRecipe, parts: tuple[str, ...]
) -> "ShardedTrained":
    """Shares of what is trained, of a cut model on disk whose dense one is divided already.

    Raises:
        RecipeError: the model has nothing of that kind.
        UnsupportedModelError: a layer that is trained computes in several types.
    """
    names = named_parts(cut, parts)
    adapted = adapted_projections(cut, recipe, parts, names)
    network, dense, mesh = share_weights(cut.network), cut.dense, _mesh(cut.dense)
    start = start_of(cut, [*names, *adapted])
    layers, units = find_decoder_layers(network), []
    for number in range(start):  # they are the dense model's, and never run here
        layers[number] = dense.layers[number]
    with drawing_adapters(recipe):
        for number, layer in enumerate(layers[start:], start):
            path = f"{cut.layers_path}.{number}."
            mine, wrapped = (
                [name.removeprefix(path) for name in some if name.startswith(path)]
                for some in (names, adapted)
            )
            _bring_in(layer, dense.device, mine)
            policy = _policy(layer, dense, mine)
            add_adapters(layer, wrapped, recipe)
            units.append(_divide(layer, mesh, policy))
    _share_buffers(units)  # or the gradients of all layers would wait whole for the last one
    _settle(network, dense.device)
    names = with_adapters(names, network, adapted)
    _share(cut, network, names)
    for name in names:
        network.get_parameter(name).requires_grad_()
    parameters = {name: network.get_parameter(name) for name in names}
    masters = {name: _master(tensor) for name, tensor in parameters.items()}
    return ShardedTrained(network, parameters, masters, names, start, adapted, cut=cut, mesh=mesh)


@dataclass(frozen=True)
class ShardedTrained(Trained):
    """Weights that are trained, of which each process holds a share, in float32.

    Of what lies in decoder layers `parameters` are torch's DTensors, and `masters` the very numbers
    of this process's share of them, flat in no dimension but the first: [rows of it, ...]. Adapters
    and what lies elsewhere are whole in every process, as `Trained` has them. What is stored of a
    projection with its adapter in it is this process's share of that, too.

    Attributes:
        mesh: the processes.
    """

    mesh: DeviceMesh = field(repr=False, kw_only=True)

    @property
    def replicas(self) -> Mapping[str, Tensor]:
        """The masters of which every process holds the whole."""
        return {n: tensor for n, tensor in self.masters.items() if not self._is_share(n)}

    @property
    def shares(self) -> Mapping[str, Tensor]:
        """The masters of which every process holds a part."""
        return {n: tensor for n, tensor in self.masters.items() if self._is_share(n)}

    def _is_share(self, name: str) -> bool:
        return isinstance(self.parameters[name], DTensor)

    def take_gradients(self) -> None:
        """Add what a backward pass left to the masters' gradients, in float32."""
        super().take_gradients()
        for name, master in self.shares.items():
            own: Any = self.parameters[name]
            if own.grad is None:
                continue
            gradient = own.grad.to_local()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            own.grad = None

    def shorten_gradients(self, most: float) -> float:
        """The norm of all gradients, which are shortened to ``most`` where it is greater."""
        squares = _squares(self.shares.values())
        add_up([squares])
        norm = (squares + _squares(self.replicas.values())).sqrt()
        nn.utils.clip_grads_with_norm_(list(self.masters.values()), most, norm.float())
        return float(norm)

    @torch.no_grad()
    def healed(self, stored: Mapping[str, Tensor]) -> Any:
        """The cut model with trained weights in their places, gathered one by one.

        It is made in the first process; the others have the cut model as it was.
        """
        whole = {}
        for name, share in self.merged(stored):
            tensor = self._gathered(name, share)
            if world().leads:
                whole[name] = tensor.cpu()
        return self._with_weights(whole.items()) if world().leads else self.cut.network

    def _gathered(self, name: str, share: Tensor) -> Tensor:
        own = self._divided(name)
        if own is None:
            return share
        placed = DTensor.from_local(
            share, self.mesh, [Shard(0)], run_check=False, shape=own.shape, stride=own.stride()
        )
        return placed.full_tensor()

    def _divided(self, name: str) -> DTensor | None:
        """What the network computes with under a name of the cut model, if it is divided."""
        own: Any = self.network.get_parameter(adapted_name(name, self.adapted))
        return own if isinstance(own, DTensor) else None

    def _with_change(self, name: str, change: Tensor) -> Tensor:
        """This process's share of a projection in float32, with what its adapter adds to it."""
        own = self._divided(name)
        assert own is not None
        rows: Any = distribute_tensor(change, self.mesh, [Shard(0)], src_data_rank=None)
        whole: Tensor = own.to_local().float() + rows.to_local()
        return whole

    @contextmanager
    def as_saved(self, stored: Mapping[str, Tensor]) -> Iterator[Any]:
        """The network that is trained, with its weights rounded for a while as they are stored.

        Adapters rest meanwhile: stored projections have them in. Those are the dense model's own
        weights, which must not run before they are back.
        """
        own: dict[str, Tensor] = {}
        try:
            self._put(self.merged(stored), own, resting=True)
            yield self.network
        finally:
            self._put(own.items(), resting=False)

    @torch.no_grad()
    def _put(
        self,
        values: Iterable[tuple[str, Tensor]],
        before: dict[str, Tensor] | None = None,
        *,
        resting: bool,
    ) -> None:
        """Change weights of the cut model; where asked for, take down what they were."""
        for name, value in values:
            numbers = self._numbers(name)
            if before is not None:
                before[name] = numbers.clone()
            numbers.copy_(value)
        for path in self.adapted:
            self.network.get_submodule(path).enable_adapters(not resting)
        self.write_back()

    def _numbers(self, name: str) -> Tensor:
        """What is changed to change a weight of the cut model: its master, or the base of one."""
        master = self.masters.get(adapted_name(name, self.adapted))
        own: Any = self._divided(name) if master is None else None
        numbers: Tensor = own.to_local() if master is None else master
        return numbers.detach()


def _mesh(dense: DenseModel) -> DeviceMesh:
    return init_device_mesh(dense.device.type, (world().size,))


def _share_buffers(units: list[FSDPModule]) -> None:
    """Have layers be brought together and scattered one after another, from torch 2.10 on."""
    share = getattr(fsdp, "share_comm_ctx", None)
    if share is not None:
        share(units)


def _divide(layer: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> FSDPModule:
    """Keep this process's share of a layer: a unit that is brought together when it computes."""
    whole = {p for name, p in layer.named_parameters() if p.dim() == 0 or is_adapter(name)}
    unit: FSDPModule = fully_shard(
        layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole
    )
    unit.set_force_sum_reduction_for_comms(True)
    unit.set_gradient_divide_factor(1.0)  # the loss is a mean over all windows already
    return unit


def _policy(layer: nn.Module, dense: DenseModel, trained: Sequence[str]) -> MixedPrecisionPolicy:
    """Compute in the model's type with weights in float32, and add gradients up in float32.

    Raises:
        UnsupportedModelError: the layer computes in several types.
    """
    others = [n for n, tensor in layer.named_parameters() if tensor.is_floating_point()]
    kinds = {layer.get_parameter(name).dtype for name in others if name not in trained}
    if trained and not kinds <= {dense.dtype}:
        raise UnsupportedModelError(
            f"a decoder layer of '{dense.base.name}' computes in "
            f"{' and '.join(sorted(map(str, kinds | {dense.dtype})))}, but FSDP brings a layer "
            f"together in one type; take --dtype float32. {REPLICAS}."
        )
    computed = dense.dtype if trained else None
    return MixedPrecisionPolicy(computed, torch.float32, cast_forward_inputs=False)


def _check_apart(dense: DenseModel) -> None:
    """Refuse a model of which a weight is in several layers, or twice in one."""
    held = [id(p) for _, p in dense.layers.named_parameters(remove_duplicate=False)]
    if len(set(held)) < len(held):
        raise UnsupportedModelError(
            f"decoder layers of '{dense.base.name}' share weights, which FSDP cannot divide layer "
            f"by layer. {REPLICAS}."
        )


def _bring_in(layer: nn.Module, device: torch.device, trained: Sequence[str] = ()) -> None:
    """Put a layer's weights in for good, those that are trained in float32."""
    weights = {name: read_tensor(layer, name) for name, _ in layer.named_parameters()}
    _settle(layer, device)
    for name, value in weights.items():
        kind = torch.float32 if name in trained else value.dtype
        put(layer, name, nn.Parameter(value.to(device, kind), requires_grad=name in trained))


def _settle(module: nn.Module, device: torch.device) -> None:
    """Take accelerate's hooks off: nothing comes from elsewhere any more."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module, recurse=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _share(cut: CutModel, network: nn.Module, trained: Mapping[str, str]) -> None:
    """Let what is not trained and equals the dense model's be the very same share or weight."""
    dense = dict(cut.dense.network.named_parameters(remove_duplicate=False))
    names = cut.counterparts()
    for name, own in list(network.named_parameters(remove_duplicate=False)):
        plain = name.replace(BASE, ".")
        other = dense.get(names.get(plain, ""))
        if name not in trained and plain not in cut.own and other is not None:
            put(network, name, other)
        elif not isinstance(own, DTensor):
            moved = own.detach().to(cut.dense.device, copy=True)
            put(network, name, nn.Parameter(moved, requires_grad=False))


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimiser changes: this process's numbers, the very ones that torch gathers."""
    own: Any = parameter.detach()
    if isinstance(own, DTensor):
        return nn.Parameter(own.to_local(), requires_grad=False)
    whole = parameter.dtype == torch.float32
    return parameter if whole else nn.Parameter(own.float())


def _squares(masters: Any) -> Tensor:
    """The sum of squares of all gradients, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for master in masters:
        if master.grad is not None:
            total += master.grad.double().square().sum().cpu()
    return total
