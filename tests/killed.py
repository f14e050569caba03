"""Kill runs at random moments, and go on with them. Run as a program.

usage: python killed.py FOLDER KILLS SELECT,REPAIR,OFFLOAD ...

Every run is a child made by fork, which costs milliseconds; the parent never computes, so that no
thread of it can be half-way through anything. For every case it prints a line: what the whole run
gave, what the killed one gave in the end, how often it was killed, and how many windows did not
have to be visited again.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import ghostlayers
from conftest import make_byte_tokenizer, make_documents, make_tiny_llama
from ghostlayers.calibration import journal

torch.set_num_threads(1)
MODEL = make_tiny_llama(num_hidden_layers=8)
TOKENIZER = make_byte_tokenizer(bos=False)
TEXT = make_documents(40)


def run(folder: Path, answer: Path, select: str, repair: str, offload: str) -> None:
    """Prune, and write down all that came of it."""
    model = str(folder.with_name("model")) if offload == "disk" else MODEL
    journal.SECONDS_BETWEEN = 0.0
    resumed = []
    opened = journal.Journal.next_pass

    def note(self: journal.Journal, description: str) -> journal.KeptPass:
        resumed.append(self)
        return opened(self, description)

    journal.Journal.next_pass = note
    pruned = ghostlayers.prune(
        model, tokenizer=TOKENIZER, data=TEXT, layers=3, select=select, repair=repair,
        windows=24, held_out_windows=6, sequence_length=64, keep=folder,
        options=ghostlayers.RunOptions(batch_size=2, offload=offload),
    )  # fmt: skip
    state = pruned.model.state_dict().items()
    weights = {k: v.double().sum().item() for k, v in state if not v.is_meta}
    evidence = {name: vars(sums) for name, sums in pruned.evidence.items()}
    table = None if pruned.table is None else repr(pruned.table.spans)
    told = {"weights": weights, "evidence": evidence, "table": table, "removed": pruned.removed}
    draft = answer.with_suffix(".draft")
    draft.write_text(json.dumps([told, max(each.resumed for each in resumed)]))
    draft.replace(answer)


def child(*arguments: object) -> int:
    """Start a run in a process of its own."""
    found = os.fork()
    if found == 0:
        try:
            run(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return found


def timed(*arguments: object) -> float:
    """Seconds of a run that nobody kills."""
    began = time.monotonic()
    os.waitpid(child(*arguments), 0)
    return time.monotonic() - began


def killed_until_done(
    keep: Path, here: Path, seconds: float, kills: int, rng: random.Random, *how: str
) -> int:
    """Kill so often, then let it end; how often it was killed before it had."""
    count, answer = 0, here / "killed.json"
    answer.unlink(missing_ok=True)
    while not answer.is_file():
        process = child(keep, answer, *how)
        if count < kills:
            time.sleep(rng.uniform(0.2, 1.0) * seconds)
            os.kill(process, signal.SIGKILL)
            count += 1
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise SystemExit("a run failed by itself")
    return count


def main(folder: str, kills: str, *cases: str) -> None:
    for number, case in enumerate(cases):
        here = Path(folder) / str(number)
        here.mkdir()
        print(json.dumps(kill_often(here, int(kills), *case.split(","))), flush=True)


def kill_often(here: Path, kills: int, select: str, repair: str, offload: str) -> dict[str, object]:
    """What a case gave, whole and killed."""
    MODEL.save_pretrained(here / "model", max_shard_size="100KB")
    TOKENIZER.save_pretrained(here / "model")
    seconds = min(
        timed(here / f"kept-whole-{turn}", here / "whole.json", select, repair, offload)
        for turn in range(2)
    )
    rng, count, resumed = random.Random(kills), 0, 0
    # A run that was done before its first kill says nothing, so it is begun anew.
    for attempt in range(9):
        keep = here / f"kept-{attempt}"
        count = killed_until_done(keep, here, seconds, kills, rng, select, repair, offload)
        resumed = json.loads((here / "killed.json").read_text())[1]
        if resumed:
            break
    whole, _ = json.loads((here / "whole.json").read_text())
    killed, _ = json.loads((here / "killed.json").read_text())
    return {"whole": whole, "killed": killed, "kills": count, "resumed": resumed}


if __name__ == "__main__":
    main(*sys.argv[1:])
