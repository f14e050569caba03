"""What training a cut model will take: the run's own arithmetic, priced on this machine."""

import math
from dataclasses import replace
from pathlib import Path

from ghostlayers.calibration.cuts import LOGITS_AT_ONCE
from ghostlayers.calibration.passes import Pass
from ghostlayers.healing import schedule
from ghostlayers.healing.adapters import adapted_projections
from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.parts import (
    bytes_of_adapters,
    bytes_trained,
    is_offloaded,
    named_parts,
    numbers_of_adapters,
    parts_of,
)
from ghostlayers.healing.rates import work_of_trial
from ghostlayers.healing.schedule import Work
from ghostlayers.healing.trained import start_of
from ghostlayers.healing.training import is_frugal, work_of
from ghostlayers.plan.probe import Speed, writing_seconds
from ghostlayers.plan.units import Plan, prices
from ghostlayers.recipe.healing import HealingRecipe

KEPT = 4 + 4 + 4
"""Bytes of a trained number that an interrupted run goes on from: its weight and two moments."""

KEPT_BY_A_LAYER = 34
"""Numbers a token and channel that a decoder layer keeps for its backward pass, or so."""


def plan_heal(
    cut: CutModel,
    recipe: HealingRecipe,
    speed: Speed,
    *,
    started: float,
    folder: Path | None = None,
    processes: int = 1,
) -> Plan:
    """What `heal_pipeline.heal` and saving its result will take.

    Args:
        cut: the cut model.
        recipe: the request.
        speed: as probed on this machine, at the recipe's length of windows.
        started: seconds that this process took to start and load the models.
        folder: where the result will lie.
        processes: that share the windows.
    """
    length = recipe.sequence_length
    here = prices(cut.dense, speed, length, processes)
    trial = processes * trial_windows(cut, recipe)  # each makes the whole of it
    windows = None if recipe.num_tokens is None else recipe.num_tokens / length
    if windows is None:
        assert recipe.seconds is not None
        possible = recipe.seconds / here.of(training_pass(cut, recipe, 1.0)).seconds
        left = possible - trial / (1.0 + schedule.SHARE_OF_LOOKS)
        windows = math.ceil(length * max(possible / 2, left)) / length
    size = sum(tensor.numel() * tensor.element_size() for tensor in cut.network.parameters())
    saved = Pass(
        "saving",
        "Writing it, and loading it in a fresh process",
        held=size,
        disk=size,
        fixed=started + writing_seconds(size, folder),
    )
    return here.plan([here.of(training_pass(cut, recipe, windows, trial)), here.of(saved)])


def trial_windows(cut: CutModel, recipe: HealingRecipe) -> float:
    """What trying the learning rates takes, in windows of training."""
    parts, _, _, work = _work(cut, recipe)
    open_parts = [part for part in parts if part not in recipe.told_rates]
    return work_of_trial(len(open_parts), recipe.sequence_length, work) / recipe.sequence_length


def _work(
    cut: CutModel, recipe: HealingRecipe
) -> tuple[tuple[str, ...], list[str], tuple[str, ...], Work]:
    """What is trained, by parts and names; what carries adapters; and what a token costs."""
    parts = parts_of(cut, recipe)
    names = named_parts(cut, parts)
    adapted = adapted_projections(cut, recipe, parts, names)
    start = start_of(cut, [*names, *adapted])
    return parts, list(names), adapted, work_of(cut, start, parts, recipe)


def training_pass(cut: CutModel, recipe: HealingRecipe, windows: float, trial: float = 0.0) -> Pass:
    """Training on so many windows, measurements on held-out ones included.

    Args:
        cut: the cut model.
        recipe: what is trained.
        windows: of text.
        trial: what trying the learning rates takes, in windows.
    """
    parts, names, adapted, work = _work(cut, recipe)
    _, adapters = numbers_of_adapters(cut, recipe, adapted)
    done = windows + trial / (1.0 + schedule.SHARE_OF_LOOKS)
    trained = sum(cut.network.get_parameter(name).numel() for name in names)
    behind = int(work.forward)
    again = is_frugal(cut, cut.num_layers - behind, offloaded=is_offloaded(cut))
    own = replace(work, head=0.0).of_training * (1.0 + schedule.SHARE_OF_LOOKS) + again * behind
    length, model = recipe.sequence_length, cut.dense
    at_once = model.windows_per_call(length) * length * model.hidden_size * model.dtype.itemsize
    a_token = KEPT_BY_A_LAYER + behind if again else KEPT_BY_A_LAYER * max(1, behind)
    activations = at_once * a_token
    streams = 2 * recipe.num_held_out_windows * model.stream_bytes(length)
    weights = trained * bytes_trained(model.dtype) + bytes_of_adapters(cut, recipe, adapted)
    return Pass(
        "healing",
        f"Training {' + '.join(parts)} on {windows * length:,.0f} tokens",
        windows,
        layers=done * own,
        heads=done * schedule.HEADS * work.share * (1.0 + schedule.SHARE_OF_LOOKS),
        held=int(activations + streams + weights + 16 * LOGITS_AT_ONCE),
        disk=trained * (KEPT + model.dtype.itemsize) + adapters * (KEPT + 4),
    )
