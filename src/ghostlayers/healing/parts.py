"""What the parts of a recipe are in a cut model, and which are trained if nothing is said."""

from collections.abc import Iterator, Sequence
from math import prod

import torch

from ghostlayers.errors import RecipeError
from ghostlayers.healing.adapters import has_peft, projections_of
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.model.dense import memory_for
from ghostlayers.model.multimodal import TextView
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.parallel import shards


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


def bytes_of_adapters(cut: CutModel, recipe: HealingRecipe, adapted: Sequence[str]) -> float:
    """What adapters take of each process, and what has them merged while it is measured or stored.

    Args:
        cut: the cut model.
        recipe: says their rank.
        adapted: projections that carry them.
    """
    projections, adapters = numbers_of_adapters(cut, recipe, adapted)
    copies = 2 if is_offloaded(cut) else 1  # what they stand on stays in memory, too
    merged = copies * projections * cut.dense.dtype.itemsize / shards()
    return shards() * adapters * bytes_trained(cut.dense.dtype) + merged  # whole in every process


def numbers_of_adapters(
    cut: CutModel, recipe: HealingRecipe, adapted: Sequence[str]
) -> tuple[int, int]:
    """Numbers of the projections that carry adapters, and of the adapters."""
    shapes = [cut.network.get_parameter(f"{path}.weight").shape for path in adapted]
    return sum(map(prod, shapes)), sum(recipe.rank * sum(shape) for shape in shapes)


def is_offloaded(cut: CutModel) -> bool:
    """Whether layers come and go; those that are divided are read from disk once."""
    return shards() == 1 and cut.dense.residency.offloaded


def parts_of(cut: CutModel, recipe: HealingRecipe) -> tuple[str, ...]:
    """What a recipe trains of a model.

    Raises:
        RecipeError: it says something of a part that is not among them.
    """
    if recipe.parts is not None:
        return recipe.parts
    parts = default_parts(cut, recipe)
    recipe.check_trained(parts)
    return parts


def default_parts(cut: CutModel, recipe: HealingRecipe) -> tuple[str, ...]:
    """What is trained if nothing is said; see ``docs/results/healing.md`` for what was measured.

    It depends on how much memory there is, not on how much is free, so that a run that goes on
    trains the same.

    Args:
        cut: the cut model.
        recipe: says the rank of adapters.
    """
    parts = tuple(part for part in ("operator", "norms") if _names(cut, part))
    room = SHARE_OF_MEMORY * memory_for(cut.dense)
    for whole in ("suffix",) if _leaves_the_front(cut) else ("all", "lora", "suffix"):
        if 0 < _bytes_of(cut, recipe, whole) < room:
            return (*parts, whole)
    return parts or ("suffix",)


def _bytes_of(cut: CutModel, recipe: HealingRecipe, whole: str) -> float:
    """What every layer, those behind the cut, or adapters take; nothing where there are none."""
    if whole == "lora":
        return bytes_of_adapters(cut, recipe, projections_of(cut)) if has_peft() else 0.0
    numbers: int = sum(cut.network.get_parameter(name).numel() for name in _names(cut, whole))
    return numbers * bytes_trained(cut.dense.dtype)


def _leaves_the_front(cut: CutModel) -> bool:
    """Whether the layers before the cut stay as they are unless somebody says otherwise.

    What is trained of an offloaded model stays in memory; and the first layers of one that sees
    take what images say, which no training text shows.
    """
    return is_offloaded(cut) or isinstance(cut.network, TextView)
