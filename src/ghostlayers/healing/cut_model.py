"""A cut model over the weights of its dense one: what is equal is in memory once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.checkpoint import records
from ghostlayers.checkpoint.adapter import open_adapter
from ghostlayers.errors import ModelError
from ghostlayers.model.alike import check_same_tokens
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.model.multimodal import text_view
from ghostlayers.model.residency import is_offloaded, keep, read_tensor
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.model.weights import like
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs import find_method
from ghostlayers.spans import Span, kept_layers, pruned_boundary


@dataclass(frozen=True)
class CutModel:
    """A cut and repaired model beside the dense one that it was made of.

    Attributes:
        dense: the dense model.
        network: the cut one; where a weight is the dense model's, it is that tensor.
        spans: what was removed, in the dense model's numbering.
        record: its provenance.
        own: names of the network's parameters that are not the dense model's.
        folder: the checkpoint that it was read from.
    """

    dense: DenseModel
    network: Any
    spans: tuple[Span, ...]
    record: dict[str, Any]
    own: frozenset[str]
    folder: Path | None = None

    @classmethod
    def of(
        cls, dense: DenseModel, network: Any, spans: tuple[Span, ...], record: dict[str, Any]
    ) -> "CutModel":
        """Of a network in memory, whose weights are replaced by the dense model's where equal.

        Raises:
            ModelError: it was not made of that dense model.
        """
        _check_kin(dense, network, spans)
        own = frozenset(_share(dense, network, spans))
        cut = cls(dense, network, spans, record, own)
        _check_untouched(cut)
        return cut

    @property
    def layers_path(self) -> str:
        """Where the network holds its decoder layers."""
        return layers_path(self.network)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the cut model."""
        return len(find_decoder_layers(self.network))

    @property
    def gap(self) -> int:
        """The first boundary with a cut, in both models' numbering."""
        return self.spans[0].start

    def layer_of(self, name: str) -> int | None:
        """The number of the decoder layer that a parameter is in; None if it is in none."""
        prefix = f"{self.layers_path}."
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        return int(number) if number.isdigit() else None

    def counterparts(self) -> dict[str, str]:
        """Names of its parameters, and of the dense model's in the same places."""
        return dict(_counterparts(self.dense, self.network, self.spans))

    def tied_weights(self) -> frozenset[str]:
        """Names of parameters that stand in several places (a block that several layers share)."""
        named = list(self.network.named_parameters(remove_duplicate=False))
        places = Counter(id(parameter) for _, parameter in named)
        return frozenset(name for name, parameter in named if places[id(parameter)] > 1)

    def repaired_layers(self) -> frozenset[int]:
        """Layers of the cut model whose weights its repairs may have changed."""
        reach = find_method(self.record["recipe"]["repair"]).reach
        layers: set[int] = set()
        for span in self.spans:
            boundary = pruned_boundary(span, self.spans)
            layers.update(range(max(0, boundary - reach), boundary))
        return frozenset(layers | self.made_layers())

    def made_layers(self) -> frozenset[int]:
        """Layers that the dense model has not got: repairs written as layers."""
        count = self.num_layers - (self.dense.num_layers - sum(map(len, self.spans)))
        boundaries = [pruned_boundary(span, self.spans) for span in self.spans[:count]]
        return frozenset(boundary + number for number, boundary in enumerate(boundaries))


def open_cut(folder: str | Path, dense: DenseModel, options: RunOptions) -> CutModel:
    """A checkpoint or an adapter that Ghostlayers made, over the weights of its dense model.

    Args:
        folder: of the checkpoint or adapter.
        dense: the model that it was cut from.
        options: how to run.

    Raises:
        ModelError: the folder holds neither, or was made of another model.
        InputError: the two number their tokens differently.
    """
    record = records.inspect(folder)
    spans = tuple(Span(start, stop) for start, stop in record["cut"]["spans"])
    if not spans:
        raise ModelError(f"the record in '{folder}' names no cut: there is nothing to heal.")
    if record["mode"] == "adapter":
        network, _, adapter = open_adapter(folder, dense.base.name, options)
        record = {k: value for k, value in adapter.record.items() if k not in ("gaps", "files")}
    else:
        opened = load_model(str(folder), options)
        check_same_tokens(opened, dense)
        network = opened.network
    cut = CutModel.of(dense, text_view(network), spans, dict(record))
    return replace(cut, folder=Path(folder)) if record["mode"] != "adapter" else cut


def layers_path(network: nn.Module) -> str:
    """Where a network holds its decoder layers."""
    layers = find_decoder_layers(network)
    return str(next(name for name, module in network.named_modules() if module is layers))


def _check_kin(dense: DenseModel, network: Any, spans: tuple[Span, ...]) -> None:
    """Refuse two models of which one was not cut from the other."""
    staying = dense.num_layers - sum(map(len, spans))
    num_layers = len(find_decoder_layers(network))
    mine, theirs = _embedding(network), _embedding(dense.network)
    theirs = theirs.to(mine.device)
    if spans[-1].stop > dense.num_layers or num_layers not in (staying, staying + len(spans)):
        reason = (
            f"its record removes {sum(map(len, spans))} layers up to {spans[-1].stop - 1}, it has "
            f"{num_layers}, and '{dense.base.name}' has {dense.num_layers}"
        )
    elif mine.shape != theirs.shape or not torch.equal(mine, theirs):
        reason = f"its embedding is another than that of '{dense.base.name}'"
    else:
        return
    raise ModelError(
        f"the cut model was not made of '{dense.base.name}': {reason}. Give the dense model that "
        "it was cut from (--against), opened in the same --dtype."
    )


def _check_untouched(cut: CutModel) -> None:
    """Refuse a cut model that differs from the dense one where nothing was repaired or trained."""
    before = [*cut.record.get("healed_before", ()), cut.record.get("healing")]
    trained = {part for row in before if row for part in row["trained"]}
    if "all" in trained or cut.record.get("merged"):
        return
    repaired = cut.repaired_layers()
    theirs = {name for name, _ in cut.dense.network.named_parameters(remove_duplicate=False)}
    others = sorted(
        name
        for name, same in cut.counterparts().items()
        if name in cut.own
        and same in theirs  # a repair that is a layer gives all layers biases
        and (layer := cut.layer_of(name)) is not None
        and layer not in repaired
        and not (trained and layer >= cut.gap)
        and not ("lora" in trained and cut.network.get_parameter(name).dim() == 2)
    )
    if others:
        raise ModelError(
            f"the cut model was not made of '{cut.dense.base.name}', or was changed afterwards: "
            f"{len(others):,} weights that nothing has repaired or trained differ, such as "
            f"{others[0]}. Give the dense model that it was cut from (--against), opened in the "
            "same --dtype."
        )


def _embedding(network: Any) -> Tensor:
    weight: Tensor = network.get_input_embeddings().weight
    return weight


def _share(dense: DenseModel, network: Any, spans: tuple[Span, ...]) -> Iterator[str]:
    """Put the dense model's weights where they are equal; names of all others."""
    names = dict(_counterparts(dense, network, spans))
    theirs = dict(dense.network.named_parameters(remove_duplicate=False))
    offloaded = is_offloaded(network) or is_offloaded(dense.network)
    shared: dict[int, nn.Parameter] = {}  # tied weights stay one
    for name, own in list(network.named_parameters(remove_duplicate=False)):
        other = theirs.get(names.get(name, ""))
        if other is own:
            continue
        if other is None or other.shape != own.shape or other.dtype != own.dtype:
            yield name
        elif offloaded:
            mine, pair = read_tensor(network, name), read_tensor(dense.network, names[name])
            if not torch.equal(mine, pair.to(mine.device)):
                yield name
        elif own.data_ptr() == other.data_ptr():
            continue
        elif torch.equal(own, other):
            one = shared.setdefault(id(other), nn.Parameter(other.detach(), requires_grad=False))
            put(network, name, like(own, one))
        else:
            yield name


def _counterparts(
    dense: DenseModel, network: Any, spans: tuple[Span, ...]
) -> Iterator[tuple[str, str]]:
    """Names of the cut model's parameters, and of the same weights in the dense one."""
    here, there = f"{layers_path(network)}.", f"{layers_path(dense.network)}."
    kept = kept_layers(spans, dense.num_layers)
    made = len(find_decoder_layers(network)) - len(kept)
    places: list[int | None] = []
    for number in kept:
        if made and any(span.stop == number for span in spans):
            places.append(None)
        places.append(number)
    for name, _ in network.named_parameters(remove_duplicate=False):
        if not name.startswith(here):
            yield name, name
            continue
        number, _, end = name.removeprefix(here).partition(".")
        place = places[int(number)] if int(number) < len(places) else None
        if place is not None:
            yield name, f"{there}{place}.{end}"


def put(network: nn.Module, name: str, parameter: Tensor) -> None:
    """Put a parameter into a network under a name that it has."""
    path, _, leaf = name.rpartition(".")
    assert isinstance(parameter, nn.Parameter)
    module = network.get_submodule(path)
    keep(module)
    module.register_parameter(leaf, parameter)
