"""Ghostlayers: remove decoder layers from a language model and repair every cut in closed form.

>>> import ghostlayers
>>> pruned = ghostlayers.prune("HuggingFaceTB/SmolLM2-135M", layers=7)  # doctest: +SKIP
>>> pruned.save("smaller")  # doctest: +SKIP

Importing the package lets transformers' Auto classes load repaired checkpoints without
``trust_remote_code``. It imports neither torch nor transformers: each public name does, when it is
first used.
"""

from ghostlayers.runtime.interrupts import leave_at_once as _leave_at_once

_leave_at_once()  # in the program itself: what is imported from here on takes seconds

from typing import TYPE_CHECKING, Any  # noqa: E402

from ghostlayers.model.auto_classes import promise_repaired_classes as _promise  # noqa: E402

if TYPE_CHECKING:
    from ghostlayers.checkpoint.adapter import from_adapter, materialize
    from ghostlayers.checkpoint.proof import Verification
    from ghostlayers.checkpoint.records import inspect
    from ghostlayers.cli.screen import show_progress
    from ghostlayers.errors import GhostlayersError
    from ghostlayers.evaluation import EvaluationResult
    from ghostlayers.heal_pipeline import heal
    from ghostlayers.healed import HealedModel
    from ghostlayers.merged import MergedModel, merge
    from ghostlayers.pipeline import evaluate, prune, score
    from ghostlayers.presets import PRESETS, Preset
    from ghostlayers.pruned import PrunedModel
    from ghostlayers.recipe import HealingRecipe, Recipe, RunOptions
    from ghostlayers.recommending.answer import recommend
    from ghostlayers.selection import ScoreTable, SpanScore
    from ghostlayers.spans import Span
    from ghostlayers.study import Study
    from ghostlayers.writing.writing import write_data

    __version__: str

__all__ = [
    "PRESETS",
    "EvaluationResult",
    "GhostlayersError",
    "HealedModel",
    "HealingRecipe",
    "MergedModel",
    "Preset",
    "PrunedModel",
    "Recipe",
    "RunOptions",
    "ScoreTable",
    "Span",
    "SpanScore",
    "Study",
    "Verification",
    "evaluate",
    "from_adapter",
    "heal",
    "inspect",
    "materialize",
    "merge",
    "prune",
    "recommend",
    "score",
    "show_progress",
    "write_data",
]

_HOMES = {
    "PRESETS": "presets",
    "EvaluationResult": "evaluation",
    "GhostlayersError": "errors",
    "HealedModel": "healed",
    "HealingRecipe": "recipe",
    "MergedModel": "merged",
    "Preset": "presets",
    "PrunedModel": "pruned",
    "Recipe": "recipe",
    "RunOptions": "recipe",
    "ScoreTable": "selection",
    "Span": "spans",
    "SpanScore": "selection",
    "Study": "study",
    "Verification": "checkpoint.proof",
    "evaluate": "pipeline",
    "from_adapter": "checkpoint.adapter",
    "heal": "heal_pipeline",
    "inspect": "checkpoint.records",
    "materialize": "checkpoint.adapter",
    "merge": "merged",
    "prune": "pipeline",
    "recommend": "recommending.answer",
    "score": "pipeline",
    "show_progress": "cli.screen",
    "write_data": "writing.writing",
}
"""The module of every public name, imported when the name is first used (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version(__name__)
    elif name in _HOMES:
        from importlib import import_module

        from ghostlayers.runtime.quiet import quiet_imports

        with quiet_imports():
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


_promise()
