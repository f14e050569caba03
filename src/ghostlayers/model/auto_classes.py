"""transformers' Auto classes know repaired checkpoints wherever this package was imported.

They are told when they are there: at once where transformers' table of configs is imported already,
else as soon as somebody imports it. So neither torch nor transformers is imported here.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PREFIX = "ghostlayers_"
"""Before the model type of a checkpoint that carries operators."""

TABLE = "transformers.models.auto.configuration_auto"
"""The module that leads from a model type to its config class, for every Auto class."""


def promise_repaired_classes() -> None:
    """Tell transformers' Auto classes about repaired checkpoints of every family.

    The classes of a family are made when the first such checkpoint is loaded. Safe to call again.
    """
    if TABLE in sys.modules:
        _promise_in(sys.modules[TABLE])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(TABLE, _promise_in))


def _promise_in(table: ModuleType) -> None:
    for model_type in table.CONFIG_MAPPING_NAMES:
        if not model_type.startswith(PREFIX):
            promise = _Promise(f"{PREFIX}{model_type}", (), {"of": model_type})
            table.CONFIG_MAPPING.register(promise.__name__, promise, exist_ok=True)


class _Promise(type):
    """Stands for the config class of a repaired family until somebody uses it."""

    of: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from ghostlayers.model.families import family_to_repair

        return getattr(family_to_repair(cls.of).repaired_classes()[0], name)


class _AfterImport:
    """A finder that finds nothing itself: it has something done once a module is imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then, self.searching = name, then, False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, as the other finders know it, with a loader that goes on here."""
        del path, target
        if name != self.name or self.searching:
            return None
        self.searching = True  # the others are asked next, and this one with them
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            self._go_on_after(spec.loader)
        return spec

    def _go_on_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_go_on(module: ModuleType) -> None:
            loader.exec_module = execute
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then(module)

        loader.exec_module = execute_and_go_on
