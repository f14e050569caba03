"""Two healed checkpoints of one cut, made into one by spherical interpolation of their weights."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ghostlayers.calibration.journal import write_once
from ghostlayers.checkpoint.proof import Verification
from ghostlayers.checkpoint.record import evidence_row
from ghostlayers.errors import ModelError, RecipeError
from ghostlayers.healed import save_whole
from ghostlayers.healing.cut_model import CutModel, open_cut
from ghostlayers.healing.held_out import HeldOut
from ghostlayers.healing.text import read_held_out
from ghostlayers.healing.trained import Trained, start_of
from ghostlayers.model.loading import leaves_models_alone
from ghostlayers.model.residency import read_tensor
from ghostlayers.preparation import ModelSource, Tokenizer, open_model
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.runtime import progress
from ghostlayers.runtime.documents import brief
from ghostlayers.runtime.machine import versions
from ghostlayers.statistics.losses import LossSums
from ghostlayers.statistics.slerp import slerp
from ghostlayers.text.tokens import check_sequence_length

TRIED = (0.3, 0.5, 0.7)
"""Shares of the way from the first to the second that ``auto`` tries."""

PARENTS = ("first", "second")
MERGED = "merged"

Candidate = tuple[str, float]
"""Whose weights, and the share of the way."""

Both = tuple[CutModel, CutModel]


@dataclass(frozen=True)
class MergedModel:
    """What was made of two checkpoints, and the evidence for it.

    Attributes:
        model: the network that is kept.
        cut: the parent whose place it takes.
        kept: ``merged``, or ``first`` or ``second`` where that parent was better on its own.
        t: the share of the way from the first to the second.
        losses: on held-out windows, of both parents and of every share of the way that was tried.
        record: provenance, as it is written into the checkpoint.
    """

    model: PreTrainedModel
    cut: CutModel
    kept: str
    t: float
    losses: Mapping[Candidate, LossSums]
    record: dict[str, Any]

    def save(self, out: str | Path, *, overwrite: bool = False) -> Verification:
        """Write a checkpoint, and prove in a fresh process that it reloads.

        Raises:
            OutputError: the folder exists, or cannot be written.
            VerificationError: the reloaded model differs; nothing is left behind.
        """
        read = [parent["checkpoint"] for parent in self.record["merged"]["parents"]]
        return write_once(
            lambda: save_whole(self.cut, self.model, self.record, Path(out), overwrite=overwrite),
            out,
            [self.cut.dense.base.name, *read],
            None,
        )


@leaves_models_alone
def merge(
    first: str | Path,
    second: str | Path,
    *,
    against: ModelSource,
    recipe: HealingRecipe,
    t: float | None = None,
    tokenizer: "Tokenizer | None" = None,
    options: RunOptions | None = None,
) -> MergedModel:
    """Merge two healed checkpoints of one cut, tensor by tensor.

    Args:
        first: a checkpoint that `heal` made, of the dense model.
        second: another one of the same layers and the same repair.
        against: the dense model.
        recipe: names the held-out text, and how it is cut; what it says of training is not asked.
        t: share of the way from the first to the second; None tries some and keeps what has the
            least divergence from the dense model, one of the parents if that is best.
        tokenizer: for a dense model in memory.
        options: how to run.

    Raises:
        GhostlayersError: bad input, or two that are not of one cut.
    """
    if recipe.held_out is None:
        raise RecipeError("say on what text the merged model is measured: --held-out TEXT.")
    if t is not None and not 0 < t < 1:
        raise RecipeError(f"--slerp: expected 'auto' or a share between 0 and 1, got {t:g}.")
    options = options or RunOptions()
    dense = open_model(against, tokenizer, options, surgery_follows=True)
    check_sequence_length(dense.config, recipe.sequence_length)
    parents = (str(first), str(second))
    cuts = open_cut(first, dense, options), open_cut(second, dense, options)
    check_one_cut(cuts, parents)
    whole = Trained(cuts[0].network, {}, {}, {}, _start(cuts), cut=cuts[0])
    windows, name = read_held_out(dense, recipe)
    held_out = HeldOut(whole, windows, options.batch_size)
    losses = _measure(held_out, cuts, TRIED if t is None else (t,))
    choice = _nearest(losses) if t is None else (MERGED, t)
    text = {
        "corpus": name,
        "windows": len(windows),
        "sequence_length": windows.sequence_length,
        "bos": windows.describe_bos(),
    }
    row = {**_row(cuts, parents, losses, choice, held_out.dense_losses()), "held_out": text}
    cut = cuts[1] if choice[0] == PARENTS[1] else cuts[0]
    record = merged_record(cut.record, row)
    return MergedModel(_network(whole, cuts, choice), cut, *choice, losses, record)


def _measure(held_out: HeldOut, cuts: Both, shares: Sequence[float]) -> dict[Candidate, LossSums]:
    """Losses of both parents, and of what lies between them."""
    tried = [(PARENTS[0], 0.0), (PARENTS[1], 1.0), *((MERGED, share) for share in shares)]
    losses = {}
    with progress.stage("Measuring both and what lies between", len(tried)) as advance:
        for candidate in tried:
            losses[candidate] = held_out.losses(_network(held_out.trained, cuts, candidate))
            advance()
    return losses


def _nearest(losses: Mapping[Candidate, LossSums]) -> Candidate:
    """What diverges least from the dense model."""
    return min(losses, key=lambda candidate: losses[candidate].kl_nats)


def _row(
    cuts: Both,
    names: tuple[str, str],
    losses: Mapping[Candidate, LossSums],
    choice: Candidate,
    dense: LossSums,
) -> dict[str, Any]:
    """What the record says of the merge, its text aside."""
    best = _nearest(
        {candidate: sums for candidate, sums in losses.items() if candidate[0] == MERGED}
    )
    shown = {who: sums for (who, t), sums in losses.items() if who != MERGED or t == best[1]}
    return {
        "parents": [
            {"checkpoint": name, "healing": cut.record.get("healing")}
            for name, cut in zip(names, cuts, strict=True)
        ],
        "kept": choice[0],
        "t": choice[1],
        "merged_at": best[1],
        "tried": [{"model": who, "t": t, **sums.to_dict()} for (who, t), sums in losses.items()],
        "evidence": [evidence_row(n, sums) for n, sums in {"dense": dense, **shown}.items()],
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def merged_record(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A parent's record with both parents in it; a parent's training is not the merged model's."""
    own = {"files", "verification", "packed"}
    if row["kept"] == MERGED:
        own |= {"healing", "healed_before"}
    return {**{key: value for key, value in record.items() if key not in own}, "merged": dict(row)}


def check_one_cut(cuts: Both, names: tuple[str, str]) -> None:
    """Refuse two checkpoints of which not every weight is the other's, moved.

    Raises:
        ModelError: other layers were removed, or another repair put in.
    """
    first, second = cuts
    repairs = [cut.record["recipe"]["repair"] for cut in cuts]
    shapes = [_shapes(cut) for cut in cuts]
    if first.spans != second.spans:
        reason = f"one lacks the layers {_spans(first)}, the other {_spans(second)}"
    elif repairs[0] != repairs[1]:
        reason = f"one was repaired by '{repairs[0]}', the other by '{repairs[1]}'"
    elif shapes[0] != shapes[1]:
        differing = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        reason = f"'{differing[0]}' has not the same place, shape or type in both"
    else:
        return
    raise ModelError(
        f"'{names[0]}' and '{names[1]}' cannot be merged: {reason}. Expected two that `ghostlayers "
        "heal` made of one cut model; heal that one twice."
    )


def _spans(cut: CutModel) -> str:
    return ", ".join(f"[{span.start}, {span.stop})" for span in cut.spans)


def _shapes(cut: CutModel) -> dict[str, tuple[Any, ...]]:
    named = cut.network.named_parameters(remove_duplicate=False)
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named}


def _start(cuts: Both) -> int:
    """The first layer in which either differs from the dense model."""
    return min(start_of(cut, ()) for cut in cuts)


def _network(whole: Trained, cuts: Both, candidate: Candidate) -> Any:
    """A parent's network, or one between them, with its weights as its files will hold them."""
    who, t = candidate
    if who in PARENTS:
        return cuts[PARENTS.index(who)].network
    names = sorted(cuts[0].own | cuts[1].own)
    return whole.healed({name: _between(whole, cuts, name, t) for name in names})


def _between(whole: Trained, cuts: Both, name: str, t: float) -> Tensor:
    """One weight; of an operator its tensor is what it adds to the stream, with no identity."""
    first, second = (read_tensor(cut.network, name) for cut in cuts)
    return slerp(first, second, t).to(whole.kind_of(name))


def read_share(text: str) -> float | None:
    """A share of the way as it is typed; None for ``auto``.

    Raises:
        RecipeError: it is neither.
    """
    if text.strip().lower() == "auto":
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise RecipeError(
            f"--slerp: expected 'auto' or a share between 0 and 1, got {brief(text)}."
        )
    return share
