"""Low-rank adapters on the projections of the layers: which, how, and by what names."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ghostlayers.errors import RecipeError, suggest
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.model.multimodal import name_in_whole
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.quiet import quiet_imports

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "heal"
"""What the adapters of ``lora`` are called in the network."""

LORA = "adapter "
"""Before the names of adapters among what is kept of a state."""

BASE = ".base_layer."
"""What PEFT puts into the names of weights whose projection carries an adapter."""


def with_adapters(
    names: Mapping[str, str], network: nn.Module, adapted: Sequence[str]
) -> dict[str, str]:
    """What is trained, by its names in a network whose projections carry adapters; those, too."""
    held = [name for name, _ in network.named_parameters() if is_adapter(name)] if adapted else []
    renamed = {adapted_name(name, adapted): part for name, part in names.items()}
    return renamed | dict.fromkeys(held, "lora")


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's."""
    return ".lora_" in name


def adapted_name(name: str, adapted: Sequence[str]) -> str:
    """A parameter's name once its module is wrapped by an adapter."""
    path, _, leaf = name.rpartition(".")
    return f"{path}{BASE}{leaf}" if path in adapted else name


def lora_config(recipe: HealingRecipe, names: Sequence[str]) -> "LoraConfig":
    """The adapters that a recipe puts on projections, as PEFT describes them."""
    with quiet_imports():
        from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(names),
        task_type="CAUSAL_LM",
    )


def adapters_of(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a state, by the names that PEFT has for them in its files."""
    mine = {
        name.removeprefix(LORA): tensor for name, tensor in stored.items() if name.startswith(LORA)
    }
    return {
        f"base_model.model.{name_in_whole(name).replace(f'.{ADAPTER}.', '.')}": tensor
        for name, tensor in mine.items()
    }


def adapted_projections(
    cut: CutModel, recipe: HealingRecipe, parts: Sequence[str], trained: Container[str]
) -> tuple[str, ...]:
    """The projections of decoder layers that adapters are put on, if any are asked for.

    A projection that is trained itself, as that of a repair that is a layer, gets none.

    Raises:
        RecipeError: PEFT is missing, or there are none, or none of the names that are asked for.
    """
    if "lora" not in parts:
        return ()
    if not has_peft():
        raise RecipeError(
            "--train lora makes its adapters with PEFT, which is not installed: pip install peft. "
            "Or take all, or operator+norms."
        )
    names = projections_of(cut)
    if not names:
        raise RecipeError(
            "--train lora: the decoder layers hold no linear projection. Take all, or "
            "operator+norms."
        )
    if recipe.modules is not None:
        names = _of_names(names, recipe.modules)
    left = tuple(path for path in names if f"{path}.weight" not in trained)
    if not left:
        others = "+".join(part for part in parts if part != "lora")
        either = "" if recipe.modules is None else ", or name others by --modules"
        raise RecipeError(
            f"--train {'+'.join(parts)}: {others} trains all projections that adapters would go "
            f"on: {', '.join(names)[:200]}. Give --train {others}{either}."
        )
    return left


def has_peft() -> bool:
    """Whether PEFT is installed, which makes adapters."""
    return find_spec("peft") is not None


def projections_of(cut: CutModel) -> tuple[str, ...]:
    """Linear projections of decoder layers whose weights stand in one place alone."""
    tied = cut.tied_weights()
    return tuple(
        path
        for path, module in cut.network.named_modules()
        if isinstance(module, nn.Linear)
        and cut.layer_of(f"{path}.weight") is not None
        and f"{path}.weight" not in tied
    )


def add_adapters(module: nn.Module, paths: Sequence[str], recipe: HealingRecipe) -> None:
    """Put adapters on the projections of a network, or of a part of it, in place."""
    if not paths:
        return
    with quiet_imports():
        from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(recipe, paths), module, adapter_name=ADAPTER)
    module.eval()


@contextmanager
def drawing_adapters(recipe: HealingRecipe) -> Iterator[None]:
    """Have adapters drawn by the recipe's seed, and nobody else's draws changed by it."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(recipe.seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(generator_state)


def _of_names(paths: tuple[str, ...], modules: str) -> tuple[str, ...]:
    """Those projections that have one of the names in a comma-separated list.

    Raises:
        RecipeError: a name is none of theirs.
    """
    wanted = [name.strip() for name in modules.split(",")]
    known = {path.rpartition(".")[2] for path in paths}
    for name in wanted:
        if name not in known:
            raise RecipeError(
                f"--modules {modules[:60]}: no projection of a decoder layer is called "
                f"'{name[:60]}'. {suggest(name, known)}"
            )
    return tuple(path for path in paths if path.rpartition(".")[2] in wanted)
