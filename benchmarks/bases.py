"""How far LinearPatch in a Hadamard basis depends on which basis it is.

    python benchmarks/bases.py MODEL --remove 12-18 --data CALIBRATION --eval A,B,C

The method's own basis, and ten others that are its rows in random order: just as orthogonal, with
entries of the same size. Loss of the repaired model on each text.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from ghostlayers.calibration import cuts
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_many
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.stream import micro_batches
from ghostlayers.preparation import open_model, read_evaluation
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs import find_method
from ghostlayers.repairs.base import Repair, linear
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.repairs.linearpatch import channel_scales
from ghostlayers.spans import merge_layers, parse_layers
from ghostlayers.text.corpora import load_corpus
from ghostlayers.text.tokens import make_windows

ORDERS = 10


def patched(model, windows, span, basis) -> Repair:
    """H diag(d) H' with the scales of all windows in a basis."""
    sums = torch.zeros(2, basis.shape[0], dtype=torch.float64)
    for ids in micro_batches(model, windows):
        batch, stream = model.begin(ids)
        for boundary, here in cuts.Cut(model, {}).walk(batch, stream):
            for row, place in enumerate((span.start, span.stop)):
                if boundary == place:
                    sums[row] += (here.flatten(0, 1).double() @ basis).abs().sum(dim=0)
            if boundary == span.stop:
                break
    scales = channel_scales(sums[0], sums[1])
    return Repair("linearpatch-hadamard", linear((basis * (scales - 1.0)) @ basis.T))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--remove", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--max-windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    dense = open_model(arguments.model, None, RunOptions())
    model = dense
    (span,) = merge_layers(parse_layers(arguments.remove))
    windows = make_windows(
        load_corpus(arguments.data, use="calibration"), dense.tokenizer,
        sequence_length=arguments.length, count=arguments.windows, seed=0,
    )  # fmt: skip
    own = hadamard(dense.network.config.hidden_size)
    named = {"own": own}
    for seed in range(ORDERS):
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        named[f"order {seed}"] = own[order]
    models = {name: {span: patched(model, windows, span, each)} for name, each in named.items()}
    models["none"] = cuts.unrepaired([span])
    plain = Fitting(find_method("linearpatch-diag"))
    ghost = replace(plain, method=find_method("ghost"))
    models |= fit_many(Runner(model), windows, [span], {"diagonal": plain, "ghost": ghost})
    for name in arguments.eval.split(","):
        _, text = read_evaluation(
            name, dense.tokenizer, separator=" " if "ptb" in name else "\n\n", text_column=None,
            sequence_length=arguments.length, max_windows=arguments.max_windows, bos="auto",
        )  # fmt: skip
        losses = cuts.measure_cuts(Runner(model), text, models, divergence=False)
        found = {n: each.loss_nats for n, each in losses.items()}
        orders = [loss for n, loss in found.items() if n.startswith("order")]
        print(
            f"| {Path(arguments.model).name}, {Path(name).stem} | {found['dense']:.3f} "
            f"| {found['none']:.3f} | {found['diagonal']:.3f} | {found['own']:.3f} "
            f"| {min(orders):.3f} to {max(orders):.3f}, mean {statistics.mean(orders):.3f} "
            f"| {found['ghost']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
