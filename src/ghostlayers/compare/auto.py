"""``auto`` among the repairs of a comparison: the one that held-out windows choose on each cut."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from ghostlayers.calibration.contest import hold_contest
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.errors import RecipeError
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.recipe import Engine
from ghostlayers.repairs import RepairMethod, find_method
from ghostlayers.repairs.auto import AUTO
from ghostlayers.repairs.base import Repair
from ghostlayers.spans import Span
from ghostlayers.study import Study
from ghostlayers.surgery.eligible import contestants

ENGINES: tuple[Engine, ...] = typing.get_args(Engine)

Fits = dict[str, Mapping[Span, Repair]]


def is_auto(name: str) -> bool:
    """Whether held-out windows choose: ``auto``, or for an engine, such as ``auto:llama.cpp``."""
    return name.split(":")[0] == AUTO


def contested(recipe: Recipe, name: str) -> Recipe:
    """A recipe that leaves its repair to held-out windows.

    Args:
        recipe: any.
        name: ``auto`` or ``auto:ENGINE``.

    Raises:
        RecipeError: there is no such engine.
    """
    asked = name.partition(":")[2] or "any"
    engine = next((known for known in ENGINES if known == asked), None)
    if engine is None:
        raise RecipeError(
            f"repair '{name}': behind 'auto:' stands what must load the result, "
            f"{', '.join(ENGINES)}; got '{asked[:60]}'."
        )
    return dataclasses.replace(recipe, repair=AUTO, engine=engine, overhead=None)


def method_named(name: str) -> RepairMethod:
    """The repair of a name; of ``auto`` the one that stands for those that it chooses from.

    Raises:
        RecipeError: there is none.
    """
    return contested(Recipe(), name).method if is_auto(name) else find_method(name)


def fit_named(study: Study, spans: tuple[Span, ...], names: Sequence[str]) -> Fits:
    """The repairs of one cut by the names that they go by here, all from one sweep."""
    races = {name: contested(study.recipe, name) for name in names if is_auto(name)}
    wanted = [name for name in names if name not in races]
    for recipe in races.values():
        wanted += contestants(study.dense, recipe, spans)[0]
    fits = study.fit(ChosenCut(study.recipe, spans), list(dict.fromkeys(wanted)))
    chosen: Fits = {}
    for name, recipe in races.items():
        named = dataclasses.replace(study, recipe=recipe)
        chosen[name] = hold_contest(named, spans, fits)[1]
    return {name: chosen[name] if name in chosen else fits[name] for name in names}
