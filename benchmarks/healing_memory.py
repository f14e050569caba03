"""What training after a cut takes of memory, beside what its parts add up to.

usage: python benchmarks/healing_memory.py MODEL --remove 12-18 --data TEXT [--dtype float32]
       python benchmarks/healing_memory.py shapes

The first trains on 2,048 tokens, and compares the greatest memory of the process with that before
training. The second adds the same parts up for models of 8B and 70B.
"""

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ghostlayers.healing.cut_model import CutModel
from ghostlayers.healing.trained import bytes_trained, default_parts, named_parts
from ghostlayers.recipe import HealingRecipe, RunOptions
from ghostlayers.study import Study

GIB = 2**30
SHAPES = {  # hidden, intermediate, layers, key-value width, vocabulary, removed, layers behind them
    "8B": (4096, 14336, 32, 1024, 128256, 7, 4),
    "70B": (8192, 28672, 80, 1024, 128256, 16, 8),
}


def main() -> None:
    """Measure, or add up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--remove", default="12-18")
    parser.add_argument("--data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train")
    given = parser.parse_args()
    if given.model == "shapes":
        shapes()
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """One run."""
    study = Study.open(
        given.model, data=given.data, windows=8, sequence_length=256, held_out_windows=8,
        remove=given.remove, options=RunOptions(dtype=given.dtype),
    )  # fmt: skip
    cut = study.choose()
    (repairs,) = study.fit(cut, ["ghost"]).values()
    pruned = study.build(cut, repairs)
    model = CutModel.of(study.dense, pruned.model, pruned.spans, pruned.record)
    recipe = HealingRecipe(tokens="2k", train=given.train)
    names = named_parts(model, recipe.parts or default_parts(model))
    numbers = sum(model.network.get_parameter(name).numel() for name in names)
    with peak() as most:
        study.heal(pruned, recipe)
    expected = numbers * bytes_trained(study.dense.dtype)
    print(
        f"{given.model} {given.dtype}: trained {numbers:,} numbers, {expected / 1e6:,.0f} MB; "
        f"beside the weights at most {most[0] / 1e6:,.0f} MB"
    )


@contextmanager
def peak() -> Iterator[list[int]]:
    """The greatest memory of this process beyond that at the start, every 20 milliseconds."""
    process, done = psutil.Process(), threading.Event()
    before, most = process.memory_info().rss, [0]

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield most
    done.set()
    watcher.join()


def shapes() -> None:
    """Weights in bfloat16, and what training takes beside them."""
    print(
        "| model | weights | operator + norms | and the layers behind the cut |\n|---|--:|--:|--:|"
    )
    for name, (hidden, inner, layers, narrow, vocabulary, removed, behind) in SHAPES.items():
        layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
        dense = layers * layer + 2 * vocabulary * hidden
        each = bytes_trained(torch.bfloat16)
        small, large = hidden * hidden * each, behind * layer * each
        print(
            f"| {name}, {removed} of {layers} layers | {2 * dense / GIB:.1f} GiB "
            f"| {small / GIB:.1f} GiB | {(small + large) / GIB:.1f} GiB |"
        )


if __name__ == "__main__":
    main()
