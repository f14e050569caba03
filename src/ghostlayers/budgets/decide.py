"""How many layers a budget asks for: the fewest whose cut meets it.

A cut of n layers is counted as the best that n layers can give: of the runs that may go, the one
that gains most, or the n layers apart that do. Nothing can meet the budget with fewer. Which
layers really go is the selection's choice; where they gain too little, one more goes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from ghostlayers.budgets.words import figures_of, sentences
from ghostlayers.calibration.measuring import candidates, eligible
from ghostlayers.calibration.passes import Runner
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.checkpoint.output import Output
from ghostlayers.errors import InputError, SpanError, UnsupportedModelError
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import check_request, check_result
from ghostlayers.recipe import Recipe
from ghostlayers.recipe.decision import Decision
from ghostlayers.recipe.wish import DETAILS, KINDS, Wish
from ghostlayers.spans import Span, merge_layers
from ghostlayers.text.tokens import Windows


class Measure(Protocol):
    """What a budget is in, of the dense model and of its cuts: bytes or seconds."""

    def of(self, spans: Sequence[Span]) -> float:
        """Without these layers, with their repair; of the dense model without spans."""

    def bare(self, spans: Sequence[Span]) -> float:
        """The same without a repair."""

    @property
    def layers(self) -> Sequence[float]:
        """What goes with each decoder layer."""


@dataclass(frozen=True)
class Budget:
    """A budget that is met or not by a cut alone, before any loss is known.

    Attributes:
        dense: the model.
        recipe: as it was asked for, with the wish.
        output: what is made of the result.
        measure: what is counted.
        limit: at most so much of it may be left.
    """

    dense: DenseModel
    recipe: Recipe
    output: Output
    measure: Measure
    limit: float

    @property
    def wish(self) -> Wish:
        """What was wished."""
        wish = self.recipe.wish
        assert wish is not None
        return wish

    def met(self, spans: Sequence[Span]) -> bool:
        """Whether a cut meets it."""
        return self.measure.of(spans) <= self.limit

    def fewest(self) -> int:
        """The smallest number of layers that can meet it.

        Raises:
            InputError: none does, or the dense model does already; says what can be had.
        """
        if self.met(()):
            raise InputError(
                f"{self.wish}: nothing has to go. {sentences(self, ())[0]} Ask for less, or give "
                "--layers."
            )
        counts = range(1, self.dense.num_layers)
        reached = (n for n in counts if self._can_meet(n) and self.may(n))
        count = next(reached, None)
        if count is None:
            raise self.out_of_reach()
        return count

    def after(self, count: int) -> Iterator[int]:
        """The numbers of layers that may go, from one on."""
        return (n for n in range(count, self.dense.num_layers) if self.may(n))

    def may(self, count: int) -> bool:
        """Whether so many layers can go at all."""
        return self._best(count) is not None and not refusal(
            self.dense, settled(self.recipe, count), self.output
        )

    def decision(self, spans: Sequence[Span]) -> Decision:
        """What it came to, for the layers that go."""
        count = sum(map(len, spans))
        return Decision(str(self.wish), count, sentences(self, spans), figures_of(self, spans))

    def foreseen(self, count: int) -> Decision:
        """The same before they are chosen, for those that gain most."""
        best = self._best(count)
        assert best is not None
        return self.decision(best)

    def out_of_reach(self) -> InputError:
        """Why no cut meets it, and what the deepest one gives."""
        most = next((n for n in range(self.dense.num_layers - 1, 0, -1) if self.may(n)), None)
        best = None if most is None else self._best(most)
        if best is None:
            return InputError(f"{self.wish}: no layers of this model can go.")
        gives = sentences(self, best)[0]
        return InputError(
            f"{self.wish} is out of reach: {most} layers are the most that may go. {gives}"
        )

    def _can_meet(self, count: int) -> bool:
        """Whether some cut of so many layers does."""
        whole, own = self.measure.of(()) + self._repair, self.measure.layers
        if whole - sum(sorted(own)[-count:]) > self.limit:  # whichever layers may go
            return False
        best = self._best(count) or ()
        return whole - sum(own[i] for span in best for i in span.layers) <= self.limit

    def _best(self, count: int) -> tuple[Span, ...] | None:
        """The layers that gain most, of those that may go; None if so many may not."""
        own, recipe = self.measure.layers, settled(self.recipe, count)
        study = _Alone(Runner(self.dense), recipe)
        if recipe.selection.contiguous and not recipe.iterative:
            try:
                runs = candidates(study)
            except (SpanError, UnsupportedModelError):
                return None
            return (max(runs, key=lambda run: sum(own[i] for i in run.layers)),)
        layers = sorted(eligible(study), key=lambda i: -own[i])
        return merge_layers(layers[:count]) if count <= len(layers) else None

    @cached_property
    def _repair(self) -> float:
        """What the repair of one gap adds."""
        middle = self.dense.num_layers // 2
        spans = (Span(middle, middle + 1),)
        return max(0.0, self.measure.of(spans) - self.measure.bare(spans))


@dataclass(frozen=True)
class _Alone:
    """A study without text, for what is asked of a model and a recipe alone."""

    runner: Runner
    recipe: Recipe

    @property
    def windows(self) -> Windows:
        """Nobody asks."""
        raise NotImplementedError

    held_out = windows


def settled(recipe: Recipe, count: int, **more: Any) -> Recipe:
    """A recipe whose budget has come to a number of layers."""
    asked = dict.fromkeys((*KINDS, *DETAILS))
    return replace(recipe, **{**asked, "layers": count, **more})


def refusal(
    dense: DenseModel, recipe: Recipe, output: Output, *, surgery_follows: bool = True
) -> Exception | None:
    """Why so many layers cannot go, whichever they are; None if they can."""
    try:
        if surgery_follows:
            check_result(dense, recipe)
            output.check_base(dense, recipe)
        else:
            check_request(dense, recipe, surgery_follows=False)
    except (SpanError, UnsupportedModelError) as error:
        return error
    return None


def check_wished(
    dense: DenseModel, recipe: Recipe, output: Output, *, surgery_follows: bool = True
) -> None:
    """Refuse a budget where no number of layers can go.

    Raises:
        GhostlayersError: what cannot work, whatever the number.
    """
    first: Exception | None = None
    for count in range(1, dense.num_layers):
        error = refusal(dense, settled(recipe, count), output, surgery_follows=surgery_follows)
        if error is None:
            return
        first = first or error
    raise first or SpanError("a model of one decoder layer has none to spare.")


def choose_within(budget: Budget, first: int, choose: Callable[[Recipe], ChosenCut]) -> ChosenCut:
    """The cut of the fewest layers, from a number on, that meets a budget as they were chosen.

    Args:
        budget: to be met.
        first: the smallest number that can.
        choose: the cut by a recipe.

    Raises:
        InputError: none of the cuts that were chosen does.
    """
    for count in budget.after(first):
        cut = choose(settled(budget.recipe, count))
        if budget.met(cut.spans):
            return replace(cut, decision=budget.decision(cut.spans))
    raise budget.out_of_reach()
