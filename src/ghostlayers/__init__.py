"""Ghostlayers: remove decoder layers from a language model and repair every cut in closed form.

>>> import ghostlayers
>>> pruned = ghostlayers.prune("HuggingFaceTB/SmolLM2-135M", layers=7)  # doctest: +SKIP
>>> pruned.save("smaller")  # doctest: +SKIP

Importing the package lets transformers' Auto classes load repaired checkpoints without
``trust_remote_code``.
"""

from ghostlayers.runtime.interrupts import leave_at_once as _leave_at_once

_leave_at_once()  # in the program itself: the imports below take seconds

from importlib.metadata import version as _version  # noqa: E402

from ghostlayers.runtime.quiet import quiet_imports as _quiet_imports  # noqa: E402

with _quiet_imports():
    from ghostlayers.checkpoint.adapter import from_adapter, materialize
    from ghostlayers.checkpoint.proof import Verification
    from ghostlayers.checkpoint.records import inspect
    from ghostlayers.errors import GhostlayersError
    from ghostlayers.evaluation import EvaluationResult
    from ghostlayers.model.families import register_auto_classes as _register_auto_classes
    from ghostlayers.pipeline import evaluate, prune, score
    from ghostlayers.presets import PRESETS, Preset
    from ghostlayers.pruned import PrunedModel
    from ghostlayers.recipe import Recipe, RunOptions
    from ghostlayers.selection import ScoreTable, SpanScore
    from ghostlayers.spans import Span
    from ghostlayers.study import Study

__version__ = _version("ghostlayers")

__all__ = [
    "PRESETS",
    "EvaluationResult",
    "GhostlayersError",
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
    "inspect",
    "materialize",
    "prune",
    "score",
]

_register_auto_classes()
