"""A contest of repairs: fitted from one sweep, raced on held-out windows, the best one taken."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ghostlayers.calibration.cuts import Cut, race_cuts
from ghostlayers.calibration.fits import make_fitting
from ghostlayers.calibration.fitting import fit_many
from ghostlayers.calibration.measuring import Repairs, StudyLike
from ghostlayers.errors import NumericalError
from ghostlayers.model.dense import DenseModel
from ghostlayers.repairs.auto import NONE, Cost, decide, tied
from ghostlayers.spans import Span, kept_layers
from ghostlayers.statistics.race import Race
from ghostlayers.surgery.eligible import contestants

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of experts of a layer."""


@dataclass(frozen=True)
class Contestant:
    """What was measured of one repair.

    Attributes:
        repair: its name.
        loss_nats: on all windows of the contest; for one that left early, the best's there plus
            how far it was behind.
        behind_nats: how much more it loses than the best, on the windows of both.
        behind_error: the standard error of that.
        windows: that it was measured on.
        finished: whether it was measured to the end.
        overhead: share of the kept layers' arithmetic that it adds.
        added_parameters: that it adds.
    """

    repair: str
    loss_nats: float
    behind_nats: float
    behind_error: float
    windows: int
    finished: bool
    overhead: float
    added_parameters: int


@dataclass(frozen=True)
class Contest:
    """Which repair was taken, and why.

    Attributes:
        winner: that was taken.
        runner_up: the best of the others; None where there was no other.
        reason: in a sentence.
        contestants: the winner first, then by loss.
        refused: those that could not compete, with the reason.
        dense_loss: of the dense model, on the windows that any was measured on.
    """

    winner: str
    runner_up: str | None
    reason: str
    contestants: tuple[Contestant, ...]
    refused: Mapping[str, str]
    dense_loss: float

    def of(self, repair: str) -> Contestant:
        """What was measured of one repair."""
        return next(contestant for contestant in self.contestants if contestant.repair == repair)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        rows = [asdict(contestant) for contestant in self.contestants]
        return {
            "winner": self.winner,
            "runner_up": self.runner_up,
            "reason": self.reason,
            "dense_loss_nats": self.dense_loss,
            "contestants": rows,
            "refused": dict(self.refused),
        }


def hold_contest(
    study: StudyLike,
    spans: Sequence[Span],
    fitted: Mapping[str, Repairs] | None = None,
    barred: Mapping[str, str] | None = None,
) -> tuple[Contest, Repairs]:
    """Fit all repairs that can be had of a cut, race them, and take one.

    All are fitted on the fit windows, together, and measured on held-out ones as the checkpoint
    will hold them: operators and folded weights rounded to the stored type.

    Args:
        study: whose recipe says what must load the result and what it may cost.
        spans: the gaps.
        fitted: repairs of this cut by name, those that can be had among them, where they are
            fitted already.
        barred: repairs that may not be taken, each with the reason.
    """
    able, refused = contestants(study.runner.model, study.recipe, spans)
    names = [name for name in able if name not in (barred or {})]
    refused = {**(barred or {}), **refused}
    unfit: dict[str, str] = {}
    if fitted is None:
        fitted, unfit = fit_contestants(study, spans, names)
    fits = {name: fitted[name] for name in names if name not in unfit}
    costs, dear = price(study, spans, fits)
    ready = {name: fits[name] for name in costs}
    running, broken = _that_run(study.runner.model, ready)
    title = f"Racing {len(running)} repairs"
    race, own = race_cuts(study.runner, study.held_out, running, title=title)
    contest = judge(race, costs, {**refused, **unfit, **dear, **broken}, float(own.mean()))
    return contest, fits[contest.winner]


def fit_contestants(
    study: StudyLike, spans: Sequence[Span], names: Sequence[str]
) -> tuple[dict[str, Repairs], dict[str, str]]:
    """Repairs of one cut by name, from one sweep, and why some cannot be fitted.

    Where one fails, each is fitted alone, which tells which ones do.
    """
    windows = study.windows.first(study.recipe.num_fit_windows)
    model, recipe = study.runner.model, study.recipe
    fittings = {name: make_fitting(model, recipe, name) for name in names}
    with contextlib.suppress(NumericalError):
        return fit_many(study.runner, windows, spans, fittings), {}
    fits: dict[str, Repairs] = {}
    failed: dict[str, NumericalError] = {}
    for name, fitting in fittings.items():
        try:
            fits |= fit_many(study.runner, windows, spans, {name: fitting})
        except NumericalError as error:
            failed[name] = error
    if not fits.keys() - {NONE}:
        raise next(iter(failed.values()))
    return fits, {name: str(error) for name, error in failed.items()}


def price(
    study: StudyLike, spans: Sequence[Span], fits: Mapping[str, Repairs]
) -> tuple[dict[str, Cost], dict[str, str]]:
    """What every repair costs at run time, and which ones cost too much."""
    whole, most = products_of_layers(study.runner.model, spans), study.recipe.most_overhead
    costs = {name: Cost.of(repairs.values(), whole) for name, repairs in fits.items()}
    dear = {
        name: f"adds {cost.overhead:.2%} to the arithmetic of the layers that stay; at most "
        f"{most:.2%} may be added (--overhead)"
        for name, cost in costs.items()
        if cost.overhead > most
    }
    return {name: cost for name, cost in costs.items() if name not in dear}, dear


def products_of_layers(model: DenseModel, spans: Sequence[Span]) -> float:
    """Multiply-adds a token of the weights of all layers that stay.

    Experts count as far as a token runs through them. Attention's own products, which grow with the
    length of the text, are left out: what an operator adds is never understated.
    """
    share = _active_experts(model)
    return sum(
        weight.numel() * (share if "experts" in name.split(".") else 1.0)
        for layer in kept_layers(spans, model.num_layers)
        for name, weight in model.layers[layer].named_parameters()
        if weight.ndim > 1
    )


def _active_experts(model: DenseModel) -> float:
    """The share of a layer's experts that a token runs through; 1 where it is not told."""
    config = model.network.config
    number = next((n for n in (getattr(config, name, None) for name in EXPERTS) if n), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / number if number and used else 1.0


def _that_run(
    model: DenseModel, fits: Mapping[str, Repairs]
) -> tuple[dict[str, Repairs], dict[str, str]]:
    """Repairs whose folded weights the stored type holds, and why the others cannot be had."""
    running: dict[str, Repairs] = {}
    broken: dict[str, str] = {}
    for name, repairs in fits.items():
        try:
            Cut(model, repairs)
        except NumericalError as error:
            broken[name] = str(error)
        else:
            running[name] = repairs
    return running, broken


def judge(
    race: Race, costs: Mapping[str, Cost], refused: Mapping[str, str], dense_loss: float
) -> Contest:
    """The contest that a race decides.

    Args:
        race: of all that competed.
        costs: of each of them.
        refused: those that did not compete.
        dense_loss: on the windows that any was measured on.
    """
    winner = decide(race, costs)
    order = sorted(race.losses, key=lambda name: (name != winner, race.behind(name)[0]))
    runner_up = order[1] if len(order) > 1 else None
    lowest = float(race.losses[race.best].mean())

    def row(name: str) -> Contestant:
        behind, error = race.behind(name)
        windows = len(race.losses[name])
        finished = windows == len(race.losses[race.best])
        cost = costs[name]
        return Contestant(
            *(name, lowest + behind, behind, error, windows, finished),
            *(cost.overhead, cost.parameters),
        )

    reason = _reason(race, winner, runner_up)
    return Contest(winner, runner_up, reason, tuple(map(row, order)), refused, dense_loss)


def _reason(race: Race, winner: str, runner_up: str | None) -> str:
    """Why one was taken, in a sentence."""
    if runner_up is None:
        return "nothing else could compete"
    best = race.best
    behind, error = race.behind(winner if best != winner else runner_up)
    measured = f"{behind:.3f} nats, standard error {error:.3f}"
    if best == winner:
        equal = [name for name in tied(race) if name != winner]
        close = f"; in a tie with it, and no cheaper: {', '.join(equal)}" if equal else ""
        return f"it loses least, {runner_up} more by {measured}{close}"
    if winner == NONE:
        return f"no repair gains beyond chance: without one, more than {best} by {measured}"
    return f"in a tie with {best}, which loses less by {measured}, and free at run time"
