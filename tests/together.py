"""One of several processes that prune together. Run as a program.

usage: python together.py ANSWER.json [CRASH]

Each writes what it found to ANSWER.json.RANK. With CRASH, which is RANK:how, the process of that
rank dies in the middle of a pass: by ``kill`` (its connections break) or ``stop`` (it is silent).
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import ghostlayers
from conftest import make_byte_tokenizer, make_documents, make_tiny_llama
from ghostlayers import pipeline
from ghostlayers.calibration import journal, passes
from ghostlayers.errors import DistributedError
from ghostlayers.runtime import parallel

CASES = {
    "whole": {"layers": 3, "select": "recoverable"},
    "greedy": {"layers": 2, "select": "recoverable:greedy"},
    "losses": {"layers": 2, "select": "perplexity", "repair": "refit:2"},
    "gradients": {"layers": 2, "select": "taylor:unprotected", "repair": "piecewise:2"},
    "gaps": {"remove": "2,5", "repair": "joint:x+z"},
    "sample": {"remove": "3-4", "repair": "replaceme:cosine"},
    "ridge": {"remove": "3-4", "repair": "ghost:ridge=auto"},
}
"""Every kind of pass; 21 windows in groups of two give shares that differ."""


def found_by(case: dict[str, Any], keep: Path | None = None) -> dict[str, Any]:
    """What a prune decides, fits and measures."""
    model = make_tiny_llama(num_hidden_layers=8)
    pruned = ghostlayers.prune(
        model, tokenizer=make_byte_tokenizer(bos=False), data=make_documents(40), windows=21,
        fit_windows=21, held_out_windows=5, sequence_length=64, keep=keep,
        options=ghostlayers.RunOptions(batch_size=2), **case,
    )  # fmt: skip
    weights = {
        name: [float(each.double().sum()), float(each.double().norm())]
        for name, each in pruned.model.state_dict().items()
    }
    return {
        "removed": pruned.removed,
        "weights": weights,
        "losses": {name: sums.to_dict() for name, sums in pruned.evidence.items()},
    }


def offloaded(folder: Path) -> dict[str, Any]:
    """What the same finds of a model on disk, whose sampled stream lies in a file too."""
    if parallel.world().leads:
        make_tiny_llama(num_hidden_layers=8).save_pretrained(folder)
        make_byte_tokenizer(bos=False).save_pretrained(folder)
    parallel.wait()
    options = ghostlayers.RunOptions(offload="disk", batch_size=2)
    table = pipeline.score(
        str(folder), data=make_documents(40), windows=21, held_out_windows=5, sequence_length=64,
        layers=3, select="recoverable", options=options,
    )  # fmt: skip
    return {"spans": [[each.cosine, each.residual, each.loss or 0.0] for each in table.spans]}


def healed() -> dict[str, Any]:
    """What training a cut model gives; five windows a step give shares that differ."""
    pruned = ghostlayers.prune(
        make_tiny_llama(num_hidden_layers=8), tokenizer=make_byte_tokenizer(bos=False),
        data=make_documents(40), remove="3-4", windows=21, fit_windows=21, held_out_windows=5,
        sequence_length=64, options=ghostlayers.RunOptions(batch_size=2),
    )  # fmt: skip
    outcome = ghostlayers.heal(
        pruned, data=make_documents(30, seed=2), tokens="2000", step_tokens=160,
        sequence_length=32, held_out_windows=3, train="operator+norms+suffix", positions=0.5,
    ).outcome  # fmt: skip
    return {
        "looks": [look.losses.to_dict() for look in outcome.looks],
        "losses": list(outcome.training_losses),
        "best": outcome.best_step,
    }


def scores() -> dict[str, Any]:
    """What `score` and `evaluate` give."""
    model, tokenizer = make_tiny_llama(num_hidden_layers=8), make_byte_tokenizer(bos=False)
    options = ghostlayers.RunOptions(batch_size=2)
    table = pipeline.score(
        model, tokenizer=tokenizer, data=make_documents(40), windows=21, held_out_windows=5,
        sequence_length=64, layers=3, select="recoverable", options=options,
    )  # fmt: skip
    (result,) = pipeline.evaluate(
        model, tokenizer=tokenizer, data=[make_documents(9)], sequence_length=64, options=options
    )
    return {
        "spans": [[each.cosine, each.residual, each.loss or 0.0] for each in table.spans],
        "norms": float(table.norms.norms.double().sum()),
        "evaluation": result.to_dict(),
    }


def crash_in_pass(how: str) -> None:
    """Die when the second group of windows of a pass is handed out."""
    handed_out = passes.Runner.visit

    def visit(runner: Any, declared: Any, *args: Any) -> Any:
        for index, item in enumerate(handed_out(runner, declared, *args)):
            if index == 1 and declared.key == "sweep":
                os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            yield item

    passes.Runner.visit = visit


def main(answer: str, crash: str = "") -> None:
    torch.set_num_threads(1)
    journal.SECONDS_BETWEEN = 0.0
    here = parallel.join()
    rank, _, how = crash.partition(":")
    if crash and int(rank) == here.rank:
        crash_in_pass(how)
    cases = {"whole": CASES["whole"]} if crash or "KEEP" in os.environ else CASES
    keep = Path(os.environ["KEEP"]) if "KEEP" in os.environ else None
    try:
        found = {name: found_by(case, keep) for name, case in cases.items()}
        if cases is CASES:
            found["scores"], found["healed"] = scores(), healed()
            found["offloaded"] = offloaded(Path(f"{answer}-model"))
    except DistributedError as error:
        found = {"error": str(error)}
    Path(f"{answer}.{here.rank}").write_text(json.dumps(found))
    if "error" in found:
        os._exit(3)  # as a process does whose connections are broken
    parallel.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
