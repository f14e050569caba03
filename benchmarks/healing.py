"""What training after a cut wins: by what is trained, learning rate, positions, text and tokens.

usage: python benchmarks/healing.py MODEL -o RESULTS.jsonl --remove 12-18 --data TRAIN
           --held-out TEXT --eval TEXT,TEXT,... --cells CELLS.yaml

Every cell is a mapping of fields of `HealingRecipe`, and `start`, the repair that training starts
from. Each is pruned once, healed, and measured on texts that it was not trained on. A cell whose
result lies in the file is not computed again.

    - {start: ghost, train: operator, tokens: 25k, learning_rate: "1e-4"}

`python benchmarks/healing.py table RESULTS.jsonl` writes them as Markdown.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from ghostlayers.errors import GhostlayersError
from ghostlayers.model.multimodal import whole_of
from ghostlayers.pipeline import evaluate
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.runtime.documents import read_yaml
from ghostlayers.runtime.machine import processor_name
from ghostlayers.study import Study

LENGTH = 512


def main() -> None:
    """Measure every cell, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("-o", dest="out", type=Path)
    parser.add_argument("--remove", default="12-18")
    parser.add_argument("--data")
    parser.add_argument("--held-out")
    parser.add_argument("--eval", dest="texts", default="")
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--windows", type=int, default=32, help="that repairs are fitted on")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-windows", type=int, default=6)
    given = parser.parse_args()
    if given.model == "table":
        print(table([json.loads(line) for line in given.results.read_text().splitlines()]))
        return
    cells = read_yaml(given.cells, GhostlayersError)
    done = {key(row["cell"]) for row in rows(given.out)}
    bench = Bench(given)
    for cell in cells:
        if key(cell) not in done:
            with given.out.open("a") as file:
                file.write(json.dumps(bench.measure(cell)) + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """What was measured before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(cell: dict[str, Any]) -> str:
    """A cell as text."""
    return json.dumps(cell, sort_keys=True)


class Bench:
    """One dense model, cut once, with every repair that a cell starts from."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.study = Study.open(
            given.model, data=given.data.split(",")[0], windows=given.windows,
            sequence_length=LENGTH, held_out_windows=4, remove=given.remove,
            options=RunOptions(dtype=given.dtype),
        )  # fmt: skip
        self.cut = self.study.choose()
        self.dense = self.losses(self.study.dense.network)
        self.pruned: dict[str, Any] = {}

    def losses(self, network: Any) -> list[float]:
        """Loss on each text."""
        texts = self.given.texts.split(",")
        found = evaluate(
            whole_of(network), data=texts, tokenizer=self.study.dense.tokenizer,
            sequence_length=LENGTH, max_windows=self.given.max_windows,
            separators=[" " if "ptb" in text else "\n\n" for text in texts],
        )  # fmt: skip
        return [each.sums.loss_nats for each in found]

    def start(self, repair: str) -> tuple[Any, list[float]]:
        """The cut model with a repair, and its losses."""
        if repair not in self.pruned:
            (fitted,) = self.study.fit(self.cut, [repair]).values()
            pruned = self.study.build(self.cut, fitted)
            self.pruned[repair] = pruned, self.losses(pruned.model)
        found: tuple[Any, list[float]] = self.pruned[repair]
        return found

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Heal one cell, and what it wins."""
        chosen = {"data": self.given.data, "held_out": self.given.held_out, **cell}
        pruned, before = self.start(chosen.pop("start"))
        began = time.time()
        outcome = self.study.heal(pruned, HealingRecipe(**chosen)).outcome
        row = {
            "cell": cell,
            "dense": self.dense,
            "before": before,
            "after": self.losses(outcome.network),
            "seconds": outcome.seconds,
            "wall": time.time() - began,
            "tokens": outcome.text.num_tokens,
            "steps": outcome.steps,
            "trained": outcome.num_trained,
            "best_step": outcome.best_step,
            "rates": outcome.rates,
            "kl": [look.losses.kl_nats for look in outcome.looks],
            "processor": processor_name(),
            "dtype": str(self.study.dense.dtype),
            "threads": torch.get_num_threads(),
        }
        mean = sum(row["after"]) / len(before) - sum(self.dense) / len(before)
        print(key(cell), f"excess {mean:.4f} after {row['seconds']:.0f} s", flush=True)
        return row


def table(found: list[dict[str, Any]]) -> str:
    """Excess over dense before and after, a row a cell."""
    lines = [
        "| cell | tokens | seconds | excess before | after | left |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        dense = sum(row["dense"]) / len(row["dense"])
        before, after = (sum(row[name]) / len(row[name]) - dense for name in ("before", "after"))
        cell = ", ".join(f"{name} {value}" for name, value in row["cell"].items())
        numbers = f"{row['tokens']:,} | {row['seconds']:,.0f} | {before:.3f} | {after:.3f}"
        lines.append(f"| {cell} | {numbers} | {after / before:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
