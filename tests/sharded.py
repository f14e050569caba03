"""One of several processes that train a cut model together, divided by FSDP2. Run as a program.

usage: python sharded.py ANSWER.json FOLDER CASE [CRASH]

FOLDER holds ``dense``, ``cut`` and ``text.txt``; CASE is a healing recipe as JSON. Each process
writes what it found to ANSWER.json.RANK; with SAVE in the environment the result is saved there,
with KEEP the run keeps its state. With CRASH, which is RANK:when, the process of that rank dies as
it keeps its state for the third time: ``before`` the others have, or ``after``; or, by ``nan``, its
third lesson is no number.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ghostlayers
from ghostlayers.calibration import journal
from ghostlayers.calibration.journal import digest
from ghostlayers.errors import DistributedError, GhostlayersError
from ghostlayers.healing.engine import Engine
from ghostlayers.healing.state import State
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.runtime import parallel

CASE = {
    "tokens": "2000", "step_tokens": 160, "sequence_length": 32, "held_out_windows": 3,
    "train": "operator+norms+suffix", "positions": 0.5,
}  # fmt: skip
"""Five windows a step give shares that differ."""

BEGUN: list[State] = []
"""What a run holds."""


def healed_of(folder: Path, case: dict[str, Any]) -> Any:
    """What training gives."""
    case = {**CASE, **case}
    options = ghostlayers.RunOptions(dtype=case.pop("dtype", "auto"))
    keep = os.environ.get("KEEP")
    text, held_out = (str(folder / f"{name}.txt") for name in (case.pop("text", "text"), "held"))
    return ghostlayers.heal(
        folder / "cut", against=str(folder / "dense"), data=text, held_out=held_out,
        options=options, keep=keep, **case,
    )  # fmt: skip


def told(healed: Any) -> dict[str, Any]:
    """What can be compared of it."""
    outcome = healed.outcome
    return {
        "looks": [look.losses.to_dict() for look in outcome.looks],
        "losses": list(outcome.training_losses),
        "rates": dict(outcome.rates),
        "numbers": outcome.num_trained,
        "steps": outcome.steps,
    }


def held() -> dict[str, Any]:
    """Numbers that this process holds, and weights of the cut model that it has for itself."""
    state = BEGUN[-1]
    trained = state.trained
    dense, student = (
        {name: _local(each) for name, each in network.named_parameters()}
        for network in (trained.cut.dense.network, trained.network)
    )
    places = {each.data_ptr() for each in dense.values()}
    alone = [n for n, each in student.items() if each.numel() and each.data_ptr() not in places]
    moments = [each["exp_avg"] for each in state.optimiser.state.values()]
    return {
        "masters": sum(each.numel() for each in trained.masters.values()),
        "types": sorted({str(each.dtype) for each in trained.masters.values()}),
        "moments": sum(each.numel() for each in moments),
        "best": sum(each.numel() for each in state.best.values()),
        "dense": sum(each.numel() for name, each in dense.items() if ".layers." in name),
        "alone": sorted(alone),
        "shared": sum(
            one is other
            for one, other in zip(
                find_decoder_layers(trained.network), trained.cut.dense.layers, strict=False
            )
        ),
        "digest": _digest(state),
    }


def _digest(state: State) -> str:
    """Of every bit of a state but the seconds that it took."""
    tensors = {name: each for name, each in state.tensors().items() if name != "notes"}
    tensors["history"] = state.history[:, 2:]
    return digest(*(each.contiguous().numpy().tobytes() for each in tensors.values()))


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def remember() -> None:
    """Have runs leave their states in `BEGUN`."""
    begin = State.begin.__func__

    def remembered(kind: Any, *given: Any) -> State:
        BEGUN.append(begin(kind, *given))
        return BEGUN[-1]

    State.begin = classmethod(remembered)


def crash(when: str) -> None:
    """Die when the state is kept for the third time."""
    together, calls = journal.wait, []

    def wait() -> None:
        calls.append(1)
        if len(calls) == 3 and when == "after":
            together()
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        together()

    journal.wait = wait


def spoil() -> None:
    """Have the third lesson be no number."""
    teach, calls = Engine.teach, []

    def spoilt(engine: Any, *given: Any) -> Any:
        lesson = teach(engine, *given)
        calls.append(1)
        return replace(lesson, stream=lesson.stream * torch.nan) if len(calls) == 3 else lesson

    Engine.teach = spoilt


def main(answer: str, folder: str, case: str, crashes: str = "") -> None:
    torch.set_num_threads(1)
    journal.SECONDS_BETWEEN = 0.0
    here = parallel.join()
    rank, _, when = crashes.partition(":")
    if crashes and int(rank) == here.rank:
        spoil() if when == "nan" else crash(when)
    remember()
    code = 0
    try:
        healed = healed_of(Path(folder), json.loads(case))
        found = {**told(healed), "held": held()}
        if "SAVE" in os.environ:
            healed.save(os.environ["SAVE"])
    except GhostlayersError as error:
        found = {"error": str(error), "kind": type(error).__name__}
        code = 3 if isinstance(error, DistributedError) else 1
    Path(f"{answer}.{here.rank}").write_text(json.dumps(found))
    if code:
        os._exit(code)
    parallel.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
