"""A pruned checkpoint that stays packed: untouched weights are copied from the base's files.

What a cut leaves alone has the same bytes as in the base, under the number that its layer has now.
What a repair changed or added is written plain, and the config says that it is not packed.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlayers.checkpoint.packed_config import Renaming, renumbered
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model import multimodal
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.expanding import packed_weights
from ghostlayers.model.loading import read_config
from ghostlayers.model.quantized import ENTRY, layout_of, quantization_method
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.model.tensor_files import (
    INDEX,
    ONE_FILE,
    Held,
    held_in,
    held_tensors,
    weight_files,
    width,
)
from ghostlayers.model.tensor_writer import ROOM_FOR_AN_ENTRY, piece_in, write_pieces
from ghostlayers.model.weights import names_in_file, unprefixed
from ghostlayers.recipe import Recipe

SHARD = 5 * 10**9
"""Bytes of a file of weights, about."""

EXPERTS = re.compile(r"^.*?\.experts\b")
"""What engines hold packed as a whole or not at all."""


@dataclass(frozen=True)
class Source:
    """A tensor of a file, and what it will be called.

    Attributes:
        name: its new name.
        held: where it is.
        is_packed: it is a part of a packed weight.
    """

    name: str
    held: Held
    is_packed: bool


class PackedBase:
    """The packed model that a dense one was expanded from.

    Args:
        dense: as it was opened.
    """

    def __init__(self, dense: DenseModel) -> None:
        assert dense.base.folder is not None
        self.network = multimodal.whole_of(dense.network)
        self.config = read_config(str(dense.base.folder))
        self.held = held_in(dense.base.folder)
        self.layout = layout_of(self.config)
        self.packed = packed_weights(self.held, self.layout)
        self.path = layers_path(dense.network)
        self.num_layers = dense.num_layers

    @classmethod
    def of(cls, dense: DenseModel) -> "PackedBase | None":
        """That of a model; None where its weights were plain, or in no folder."""
        packed = dense.base.quantized is not None and dense.base.folder is not None
        return cls(dense) if packed else None

    @property
    def bytes(self) -> int:
        """Of all that its files hold."""
        return sum(held.bytes for held in self.held.values())

    @cached_property
    def file_path(self) -> str:
        """What stands before a decoder layer's number in the names of its files.

        Raises:
            UnsupportedModelError: the files name layers in a way that is not known here.
        """
        there = {*self.held, *self.packed}
        state = self.network.state_dict(keep_vars=True)
        first = {
            name: source for name, source in state.items() if name.startswith(f"{self.path}.0.")
        }
        for name, tensor in first.items():
            end = name.removeprefix(self.path)
            for written in (*names_in_file(self.network, name, tensor), name):
                if written in there and written.endswith(end):
                    return str(written.removesuffix(end))
        for name in first:
            end = name.removeprefix(self.path)
            paths = {name.removesuffix(end) for name in there if name.endswith(end)}
            if len(paths) == 1:
                return paths.pop()
        raise UnsupportedModelError(
            f"the files of this model name its decoder layers otherwise than '{self.path}', so "
            "that their packed weights cannot be copied. Use --quantized expand."
        )

    def bytes_after(self, kept: Sequence[int], changed: Collection[str], itemsize: int) -> int:
        """Bytes of the files of a cut that is still to be made.

        Args:
            kept: the layers that stay.
            changed: weights that it changes, by their names in memory.
            itemsize: bytes of a number of those, which become plain.
        """
        state = self.network.state_dict(keep_vars=True)
        plain = set(with_experts(changed, state))
        experts = {match[0] for name in plain if (match := EXPERTS.match(name))}
        move = Renaming(self.file_path, self.file_path, {old: new for new, old in enumerate(kept)})
        parts = {part.name: name for name, ps in self.packed.items() for part in ps.values()}

        def stays(name: str) -> bool:
            weight = self.path + parts.get(name, name).removeprefix(self.file_path)
            group = EXPERTS.match(weight)
            is_plain = weight in plain or (group is not None and group[0] in experts)
            return move(name) is not None and not is_plain

        sizes = [held.bytes for name, held in self.held.items() if stays(name)]
        sizes += [int(state[name].numel()) * itemsize for name in plain]
        return sum(sizes) + len(sizes) * ROOM_FOR_AN_ENTRY


def packed_base(dense: DenseModel, recipe: Recipe) -> PackedBase | None:
    """The packed model that a result will copy weights of; None if it will be plain.

    Raises:
        UnsupportedModelError: its files name their layers in an unknown way.
    """
    base = PackedBase.of(dense) if recipe.quantized == "keep" else None
    return base if base is None or base.file_path else None


def layers_path(model: PreTrainedModel) -> str:
    """The name of a model's list of decoder layers; in the whole of a vision-language model."""
    layers, whole = find_decoder_layers(model), multimodal.whole_of(model)
    return str(next(name for name, module in whole.named_modules() if module is layers))


class PackedResult:
    """A pruned model whose base is packed: what of it is copied, and what is written.

    Args:
        base: the packed model.
        model: the pruned one; it shares the weights that stayed with the dense one.
    """

    def __init__(self, base: PackedBase, model: PreTrainedModel) -> None:
        self.base, self.model = base, multimodal.whole_of(model)
        self.path = layers_path(model)
        known = {_identity(source): name for name, source in _tensors(base.network)}
        state = dict(_tensors(self.model))
        self.same = {n: known[_identity(t)] for n, t in state.items() if _identity(t) in known}
        self.changed = set(with_experts(state.keys() - self.same.keys(), state))

    @cached_property
    def layers(self) -> dict[int, int]:
        """The number that every layer that stayed has now, by its number in the base."""
        pairs = (
            (_number(new, self.path), _number(old, self.base.path))
            for new, old in self.same.items()
        )
        return {old: new for new, old in pairs if new is not None and old is not None}

    @cached_property
    def renamings(self) -> list[Renaming]:
        """How modules are called now, by their names in memory and by those in files."""
        return [
            Renaming(self.base.path, self.path, self.layers),
            Renaming(self.base.file_path, self.base.file_path, self.layers),
        ]

    def sources(self, written: Mapping[str, Held]) -> list[Source]:
        """What the checkpoint is put together from: the base's files, and what was written anew.

        Args:
            written: the changed tensors, in files.
        """
        own = {self._in_base_words(name): source for name, source in written.items()}
        parts = {part.name: name for name, ps in self.base.packed.items() for part in ps.values()}
        move, sources = self.renamings[1], []
        for name, held in self.base.held.items():
            weight = move(parts.get(name, name))
            new = move(name)
            if new is not None and weight not in own and not self._is_ignored(name):
                sources.append(Source(new, held, name in parts))
        return [*sources, *(Source(name, held, False) for name, held in own.items())]

    def _in_base_words(self, name: str) -> str:
        """A name as transformers writes it, with the beginning that the base's files have."""
        end = unprefixed(name)
        if end == name or _number(name, self.base.file_path) is not None:
            return name
        return f"{self.base.file_path}.{end}"

    def _is_ignored(self, name: str) -> bool:
        """Whether the class has no use for a tensor, layers for several tokens at once say."""
        patterns = getattr(self.base.network, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def left(self, sources: Iterable[Source]) -> list[str]:
        """Modules that were packed in the base and are plain now, by their new names."""
        backwards = {new: old for old, new in self.layers.items()}
        back = Renaming(self.base.file_path, self.base.file_path, backwards)
        plain = {source.name for source in sources if not source.is_packed}
        in_files = {_module(name) for name in plain if back(name) in self.base.packed}
        ends = {unprefixed(f"{name}.") for name in in_files}
        in_memory = {_module(n) for n in self.changed}
        return sorted(in_files | {n for n in in_memory if unprefixed(f"{n}.") in ends})

    def settings(self, sources: Iterable[Source]) -> dict[str, Any]:
        """The base's ``quantization_config``, in the numbers that layers have now."""
        modules = {_module(name) for name in {*self.base.held, *self.base.packed}}
        linear = {n for n, m in self.base.network.named_modules() if isinstance(m, nn.Linear)}
        packed = {unprefixed(f"{_module(name)}.") for name in self.base.packed}
        plain = sorted(name for name in linear if unprefixed(f"{name}.") not in packed)
        moved = {name: self.moved(name) for name in modules | linear}
        method = str(quantization_method(self.base.config))
        left = self.left(sources)
        experts = {match[0] for name in left if (match := EXPERTS.match(name))}
        left = sorted({*left, *experts})  # readers that hold them as one module ask for its name
        return renumbered(self.base.config[ENTRY], method, moved, left, plain)

    def moved(self, module: str) -> str | None:
        """What a module of the base is called now; None if it went."""
        new = module
        for renaming in self.renamings:
            if renaming.applies(module):
                return renaming(module)
        return new

    def write(self, folder: Path, save: Callable[[set[str]], None]) -> list[Source]:
        """Put the weights together.

        Args:
            folder: of the checkpoint.
            save: writes the tensors of these names of the model into the folder, plain.

        Returns:
            What they were put together from.
        """
        save(self.changed)
        files = [
            path.rename(path.with_name(f"changed-{path.name}")) for path in weight_files(folder)
        ]
        (folder / INDEX).unlink(missing_ok=True)
        sources = self.sources(held_tensors(files))
        _write_shards(folder, sources)
        for path in files:
            path.unlink()
        return sources

    def report(self, sources: Sequence[Source]) -> dict[str, Any]:
        """What stayed packed and what is plain, with bytes, for people to read."""
        weights = {
            self.base.layout.part_of(source.name)[0] for source in sources if source.is_packed
        }
        sizes = {
            kind: sum(s.held.bytes for s in sources if s.is_packed is kind)
            for kind in (True, False)
        }
        return {
            "method": quantization_method(self.base.config),
            "weights": len(weights),
            "packed_bytes": sizes[True],
            "plain": self.left(sources),
            "plain_bytes": sizes[False],
        }


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict(keep_vars=True).items()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors that share their numbers."""
    where = id(tensor) if tensor.is_meta else tensor.data_ptr()
    return tensor.device.type, where, tuple(tensor.shape), tensor.dtype


def with_experts(changed: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """Changed tensors, and all others of the experts that one of them belongs to."""
    changed = set(changed)
    groups = {m[0] for name in changed if (m := EXPERTS.match(name))}
    for name in names:
        match = EXPERTS.match(name)
        if name in changed or (match and match[0] in groups):
            yield name


def _number(name: str, path: str) -> int | None:
    """The decoder layer that a name speaks of."""
    match = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _write_shards(folder: Path, sources: Sequence[Source]) -> None:
    """Files of weights, wide numbers first in each, and an index where there are several."""
    shards: list[list[Source]] = [[]]
    for source in sources:
        if shards[-1] and sum(s.held.bytes for s in shards[-1]) + source.held.bytes > SHARD:
            shards.append([])
        shards[-1].append(source)
    places: dict[str, str] = {}
    count = len(shards)
    for number, shard in enumerate(shards, start=1):
        name = ONE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        shard.sort(key=lambda s: (-width(s.held.written), s.name))
        pieces = (piece_in(s.held.file, s.held.name, s.name) for s in shard)
        write_pieces(folder / name, [s.name for s in shard], pieces)
        places |= {s.name: name for s in shard}
    if count > 1:
        total = sum(source.held.bytes for source in sources)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
