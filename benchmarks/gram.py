"""The sums of a fit: what tiles save, and how exact products from slices are.

    python benchmarks/gram.py [--model FOLDER --data TEXT] [--hard 4096] [--device cuda]

The first table times one block of tokens, as `moments.Accumulator` adds it. The second compares
repairs fitted from sums in float64, from slices (`products`), and from plain float32, on
equilibrated columns with the default ridge and with none: of a model's stream before and behind its
middle third, or (`--hard`) of a made stream so wide, worse than those of real models, with a
condition number of 1e8 and massive activations.
"""

import argparse
import time

import torch

from ghostlayers.errors import SingularError
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.preparation import read_evaluation
from ghostlayers.recipe import RunOptions
from ghostlayers.repairs import FitOptions
from ghostlayers.repairs.solve import solve_ridge
from ghostlayers.runtime.machine import processor_name
from ghostlayers.statistics import moments
from ghostlayers.statistics.moments import Accumulator
from ghostlayers.statistics.products import add_gram, blocks_of_rows, cut

ROWS = 2048


def seconds(work: object, device: torch.device, repeats: int = 3) -> float:
    """The fastest of a few runs."""
    times = []
    for _ in range(repeats + 1):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def add_tiles(total: torch.Tensor, block: torch.Tensor, tiles: list[tuple[slice, slice]]) -> None:
    """As the accumulator does."""
    for rows, columns in tiles:
        total[rows, columns].addmm_(block[:, rows].T, block[:, columns])


def add_slices(total: torch.Tensor, x: torch.Tensor, tiles: list[tuple[slice, slice]]) -> None:
    """As the accumulator does where float64 is slow."""
    for rows in blocks_of_rows(len(x)):
        add_gram(total, cut(x[rows]), tiles)


def time_products(device: torch.device) -> None:
    """One block of tokens, by hidden size and way."""
    ways = ("float64, whole", "float64, tiles", "slices of bfloat16", "slices of float32")
    print(f"{processor_name(device)}\n\n| hidden | " + " | ".join(ways) + " |")
    print("|---:|---:|---:|---:|---:|")
    for hidden in (576, 1024, 2048, 4096):
        x = torch.randn(ROWS, hidden, device=device)
        wide, half = x.double(), x.bfloat16()
        total = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        tiles = Accumulator((("x", hidden),), hidden, device, split=False)._tiles

        found = [
            seconds(lambda w=wide, t=total: t.addmm_(w.T, w), device),
            seconds(lambda w=wide, t=total, p=tiles: add_tiles(t, w, p), device),
            seconds(lambda h=half, t=total, p=tiles: add_slices(t, h, p), device, 1),
            seconds(lambda h=x, t=total, p=tiles: add_slices(t, h, p), device, 1),
        ]
        print(f"| {hidden:,} | " + " | ".join(f"{1e3 * each:.1f} ms" for each in found) + " |")


@torch.no_grad()
def streams(model: DenseModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Before and behind the middle third."""
    start, stop = model.num_layers // 3, 2 * model.num_layers // 3
    before, after = [], []
    for window in ids:
        batch, hidden = model.begin(window[None])
        for layer in range(stop):
            if layer == start:
                before.append(hidden[0].clone())
            hidden = model.run_layer(layer, batch, hidden)
        after.append(hidden[0].clone())
    return torch.cat(before), torch.cat(after)


def hard_streams(tokens: int, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A stream whose channels depend on one another, and what layers might make of it."""
    torch.manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(hidden, hidden, device=device))
    sizes = torch.logspace(0, -4, hidden, device=device)
    x = torch.randn(tokens, hidden, device=device) * sizes @ directions
    x[::512, 7] = 3e3 * x[:, 7].std()
    change = torch.randn(hidden, hidden, device=device) * (0.1 / hidden**0.5)
    return x, x + x @ change + 0.05 * x.std() * torch.randn(tokens, hidden, device=device)


def repair_error(found: moments.Moments, exact: moments.Moments, options: FitOptions) -> str:
    """Of the map solved from some sums; errors in the sums can make them singular."""
    try:
        ours, theirs = (solve_ridge(each, options) for each in (found, exact))
    except SingularError:
        return "singular"
    return f"{float((ours - theirs).norm() / theirs.norm()):.1e}"


def compare_repairs(x: torch.Tensor, y: torch.Tensor) -> None:
    """Errors of the Gram matrix and of the repair, against float64."""
    hidden = x.shape[1]
    weights = moments.token_weights(y, "balanced")
    sums = {}
    for name, split in (("float64", False), ("slices", True)):
        each = Accumulator((("x", hidden),), hidden, x.device, split=split)
        each.add(x, y, [x], weights)
        sums[name] = each.moments()
    f, d = x.float(), (y - x).float()
    weighted = f if weights is None else f * weights.float()[:, None]
    sums["plain float32"] = moments.replace(
        sums["float64"], gram=(weighted.T @ f).double(), cross=(weighted.T @ d).double()
    )
    scale = sums["float64"].gram.diagonal().sqrt()
    norms = scale[:, None] * scale[None, :]
    condition = float(torch.linalg.cond(sums["float64"].gram / norms))
    pieces = [len(cut(each[:ROWS]).pieces) for each in (x, x.bfloat16())]
    print(f"\n{len(x):,} tokens of {hidden} channels; equilibrated condition number "
          f"{condition:.1e}; {pieces[0]} pieces in {x.dtype}, {pieces[1]} in bfloat16")  # fmt: skip
    print("| sums | largest error of the Gram matrix | of W, ridge 1e-6 | of W, no ridge |")
    print("|---|---:|---:|---:|")
    exact = sums["float64"]
    for name, found in sums.items():
        gram = float(((found.gram - exact.gram) / norms).abs().max())
        errors = [repair_error(found, exact, FitOptions(ridge=each)) for each in (1e-6, 0.0)]
        print(f"| {name} | {gram:.1e} | {errors[0]} | {errors[1]} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--hard", type=int, metavar="HIDDEN")
    parser.add_argument("--tokens", type=int, default=8192, help="of the hard stream")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    time_products(device)
    if arguments.hard:
        compare_repairs(*hard_streams(arguments.tokens, arguments.hard, device))
    if arguments.model:
        loaded = load_model(arguments.model, RunOptions(dtype="float32", device=arguments.device))
        _, windows = read_evaluation(
            arguments.data, loaded.tokenizer, separator="\n\n", text_column=None,
            sequence_length=512, max_windows=16, bos="auto",
        )  # fmt: skip
        compare_repairs(*streams(loaded, windows.input_ids))


if __name__ == "__main__":
    main()
