"""Which cuts of a model a GGUF file can hold, told before anything is computed for one.

llama.cpp decides some things by a layer's number or by the number of layers, whatever a file says.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.configs import slice_config
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_families import check_facts
from ghostlayers.model.gguf_file import open_gguf
from ghostlayers.model.gguf_header import check_kept
from ghostlayers.recipe import Recipe
from ghostlayers.selection.choices import candidate_spans, eligible_layers
from ghostlayers.spans import Span, format_layers, kept_layers, merge_layers
from ghostlayers.surgery import removal

SHOWN = 5
"""Lengths and runs in a message."""


@dataclass(frozen=True)
class GgufCuts:
    """The cuts of a model, as files.

    Attributes:
        dense: the model.
        copied: the file is copied from the model's own, and not made of a checkpoint.
    """

    dense: DenseModel
    copied: bool

    @cached_property
    def _config(self) -> Any:
        """The model's config as a cut's checkpoint has it, of all layers."""
        return removal.prune_layers(self.dense, ()).config

    def check(self, spans: Sequence[Span]) -> None:
        """Refuse a cut that no file can hold.

        Raises:
            UnsupportedModelError: with the reason.
        """
        kept, config = kept_layers(spans, self.dense.num_layers), copy.deepcopy(self._config)
        slice_config(config, kept)
        if self.copied:
            assert self.dense.base.file is not None
            check_kept(open_gguf(self.dense.base.file), self.dense.config, config, kept)
        else:
            check_facts(config)

    def check_choice(self, recipe: Recipe) -> None:
        """Refuse to choose layers where not every choice, or hardly any, could be written.

        Args:
            recipe: says how many layers go, and how they are chosen.

        Raises:
            UnsupportedModelError: with the reason, and what could be chosen.
        """
        assert recipe.layers is not None
        if recipe.selection.contiguous and not recipe.iterative:
            self._check_runs(recipe.layers, recipe.kept_edges)
        else:
            self._check_apart(recipe)

    def _check_runs(self, length: int, keep: tuple[int, int] | None) -> None:
        runs = removal.allowed_cuts(
            self.dense, candidate_spans(self.dense.num_layers, length, keep)
        )
        reasons = {run: self._reason((run,)) for run in runs}
        reason = next((reason for reason in reasons.values() if reason), None)
        if reason is None:
            return
        fit = [format_layers(run.layers) for run, reason in reasons.items() if not reason]
        raise UnsupportedModelError(
            f"{reason} Of runs of {length}, {_listed(fit) or 'none'} can go (name it with "
            f"--remove); {self._lengths(length, keep)}"
        )

    def _check_apart(self, recipe: Recipe) -> None:
        """A first layer that goes gives all others another number: so near every choice does."""
        assert recipe.layers is not None
        method, depth = recipe.method, self.dense.num_layers
        eligible = eligible_layers(
            recipe.selection, depth, recipe.kept_edges, keep_first=method.reach > 0
        )
        last = eligible[len(eligible) - recipe.layers + 1 :]
        reason = self._reason(merge_layers([eligible[0], *last]))
        if reason is not None:
            raise UnsupportedModelError(
                f"{reason} '{recipe.select}' chooses layers one by one: name them (--remove), or "
                f"take --select recoverable, by which one run goes; "
                f"{self._lengths(recipe.layers, recipe.kept_edges)}"
            )

    def _lengths(self, wanted: int, keep: tuple[int, int] | None) -> str:
        """The numbers of layers that may go wherever they lie, in words."""
        depth = self.dense.num_layers
        most = min(depth - 1, depth - sum(keep or (0, 0)))
        fit = [n for n in range(1, most + 1) if self._all_fit(candidate_spans(depth, n, keep))]
        near = sorted(sorted(fit, key=lambda n: abs(n - wanted))[:SHOWN])
        if not near:
            return "no other number of layers can go wherever they lie."
        return f"runs of {_listed(map(str, near))} layers can go wherever they lie (--layers)."

    def _all_fit(self, runs: Iterable[Span]) -> bool:
        return all(self._reason((run,)) is None for run in runs)

    def _reason(self, spans: Sequence[Span]) -> str | None:
        """Why a cut cannot be written; None if it can."""
        try:
            self.check(spans)
        except UnsupportedModelError as error:
            return str(error)
        return None


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join([*words[:SHOWN], *(["..."] if len(words) > SHOWN else [])])
