"""Whether `--faster` foretells what `bench` measures: layers timed, cuts built, both side by side.

usage: python benchmarks/budgets.py MODEL [--layers 3,7] [--at 1x512] [--speed decode]

No text is read: speed does not depend on what the numbers are, so the operators of the cuts are
random. The dense model and its cuts take turns in every repeat. Ends with 1 where a factor is
foretold more than a tenth wrong.
"""

import argparse
import sys
from typing import Any

import torch

from ghostlayers.budgets.speed import Point, time_operator, time_parts
from ghostlayers.evaluation.bench import measure_grid
from ghostlayers.model.dense import DenseModel
from ghostlayers.preparation import open_model
from ghostlayers.recipe import RunOptions
from ghostlayers.recipe.wish import place_in
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Operator, Repair
from ghostlayers.repairs.shapes import operator_shapes
from ghostlayers.runtime.machine import processor_name
from ghostlayers.spans import Span
from ghostlayers.surgery.removal import prune_layers

ALLOWED = 0.1
NEW_TOKENS = 16


def span_of(dense: DenseModel, count: int) -> Span:
    """A run of so many layers behind the middle."""
    start = min(dense.num_layers // 2, dense.num_layers - count)
    return Span(start, start + count)


def cut_of(dense: DenseModel, span: Span) -> Any:
    """The model without a run of layers, with a random operator in its place."""
    shapes = operator_shapes(find_method("ghost"), dense.hidden_size)
    small = {name: 1e-3 * torch.randn(shape) for name, shape in shapes.items()}
    return prune_layers(dense, (span,), {span: Repair("ghost", operator=Operator(small))})


def main() -> int:
    """Foretell, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layers", default="3,7")
    parser.add_argument("--at", default="1x512")
    parser.add_argument("--speed", default="decode", choices=("decode", "prefill"))
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    dense = open_model(given.model, None, RunOptions())
    point = Point(given.speed, *place_in(given.at))
    spans = [span_of(dense, int(count)) for count in given.layers.split(",")]
    seconds = time_parts(dense, point)
    operator = time_operator(dense, find_method("ghost"), point)
    points = measure_grid(
        {"dense": dense.network, **{str(span): cut_of(dense, span) for span in spans}},
        batches=[point.batch],
        lengths=[point.length],
        new_tokens=NEW_TOKENS,
        repeats=given.repeats,
    )
    first, *others = [getattr(each, point.speed).median for each in points]
    print(
        f"{given.model}, {point}: {processor_name(dense.device)}, {torch.get_num_threads()} threads"
    )
    print("| layers less | foretold | measured | off by |\n|---|---|---|---|")
    worst = 0.0
    for span, took in zip(spans, others, strict=True):
        foretold = seconds.of(()) / (seconds.bare((span,)) + operator)
        measured = first / took
        off = foretold / measured - 1
        worst = max(worst, abs(off))
        print(f"| {len(span)} | {foretold:.3f}x | {measured:.3f}x | {off:+.1%} |")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
