"""What every repair says of itself: a frozen dataclass each, whose fields are its arguments."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ghostlayers.repairs.arguments import WithArguments, argument
from ghostlayers.repairs.base import (
    FEATURES,
    FROM_KEPT_LAYER,
    Evidence,
    FitOptions,
    Needs,
    Repair,
)
from ghostlayers.statistics.moments import TokenWeight

Form = Literal["fold", "norm map", "operator"]
"""What a fit gives: changes of existing weights; a map of norm(x) alone; any map of the stream."""

Fit = Callable[[Evidence, FitOptions], Repair]

Per = Literal["gap", "layer"]
"""One operator a gap; or where the layers lie apart, one for every removed layer."""

Ridge = float | Literal["auto"] | None


@dataclass(frozen=True)
class Stage:
    """A change of a kept layer that is fitted and made before the method's own fit.

    Attributes:
        fit: only the folds of its result are used.
        needs: what its evidence must hold.
        back: which layer computes the features and is changed; 1 is the last kept one.
        share: of the discrepancy that is its target.
    """

    fit: Fit
    needs: Needs
    back: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class RepairMethod(WithArguments, ABC):
    """A way to repair a gap: what it has to know, and how it is fitted.

    To write one, extend this class (or `LeastSquares`) by a frozen dataclass that has ``needs`` and
    `fit`. The first line of its docstring says in one sentence what it does, for help and reports;
    below stand its formula, its source and its cost. Everything else has a default:

    Attributes:
        keyword: what its text begins with.
        source: the paper it comes from.
        token_weight: how much each token counts where the caller leaves it open.
        form: of its result, which decides how it can be exported.
        scales: its result is a scale, which every later layer's writes are divided by.
        stacks: its result is a linear map of the stream alone, so that two of them, one after the
            other, are one.
        through_norm: its stages can fit a projection with a norm behind it, too (`through_norm`).
    """

    source: ClassVar[str] = "ours"
    token_weight: ClassVar[TokenWeight] = "balanced"
    form: ClassVar[Form] = "operator"
    scales: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    through_norm: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the evidence must hold."""

    @abstractmethod
    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        """The repair of a gap.

        Args:
            evidence: what was gathered there, as `needs` asks.
            options: how the fit is damped.
        """

    @property
    def name(self) -> str:
        """Its text, arguments included."""
        return str(self)

    @property
    def before(self) -> tuple[Stage, ...]:
        """Stages that come first, each on the stream that the ones before it left."""
        return ()

    @property
    def savable(self) -> bool:
        """Whether a checkpoint can hold its result."""
        return True

    @property
    def writes_weights(self) -> bool:
        """Whether its result changes weights that stay, and not only the stream."""
        return self.form == "fold" or bool(self.before)

    @property
    def solves(self) -> bool:
        """Whether it solves for as many unknowns a channel as it has features.

        It then needs at least as many tokens.
        """
        return False

    @property
    def named_weight(self) -> TokenWeight | None:
        """How much each token counts, where its own text says so."""
        return None

    @property
    def per_layer(self) -> bool:
        """Whether it fits an operator for every removed layer, where these lie apart.

        They act one after the other, in the place of one for every gap.
        """
        return getattr(self, "per", "gap") == "layer"

    @property
    def features(self) -> tuple[str, ...]:
        """What any of its stages regresses on."""
        wanted = {n for stage in self.stages(self.reach) for n in stage.needs.features}
        return tuple(name for name in FEATURES if name in wanted)

    @property
    def reach(self) -> int:
        """Kept layers before the gap that it reads or changes."""
        own = 1 if FROM_KEPT_LAYER & set(self.needs.features) else 0
        return max([own, *(stage.back for stage in self.before)])

    def stages(self, available: int) -> tuple[Stage, ...]:
        """All stages where so many kept layers lie before the gap, the method's own fit last."""
        before = (stage for stage in self.before if stage.back <= available)
        return (*before, Stage(self.fit, self.needs))


@dataclass(frozen=True, kw_only=True)
class LeastSquares(RepairMethod):
    """A repair by ridge regression, which extends this class by ``gathers`` and `solve`.

    Attributes:
        ridge: relative ridge; ``auto`` lets held-out windows choose it, None is the recipe's.
        weight: how much each token counts; None for the recipe's.
    """

    ridge: Ridge = argument(None, note="with another ridge; auto chooses it on held-out tokens")
    weight: TokenWeight | None = argument(None)

    @property
    @abstractmethod
    def gathers(self) -> Needs:
        """What the evidence must hold, whoever chooses the ridge."""

    @abstractmethod
    def solve(self, evidence: Evidence, options: FitOptions) -> Repair:
        """The repair of a gap, damped as its own ridge says."""

    @property
    def needs(self) -> Needs:
        gathers = self.gathers
        return replace(gathers, held_out=gathers.held_out or self.ridge == "auto")

    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        if self.ridge is not None:
            own = None if self.ridge == "auto" else self.ridge
            options = replace(options, ridge=own)
        return self.solve(evidence, options)

    @property
    def solves(self) -> bool:
        return True

    @property
    def named_weight(self) -> TokenWeight | None:
        return self.weight
