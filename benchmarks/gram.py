"""The sums of a fit: what tiles save.

    python benchmarks/gram.py [--device cuda]

Times one block of tokens, as `moments.Accumulator` adds it.
"""

import argparse
import time

import torch

from ghostlayers.runtime.machine import processor_name
from ghostlayers.statistics.moments import Accumulator

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


def time_products(device: torch.device) -> None:
    """One block of tokens, by hidden size and way."""
    print(f"{processor_name(device)}\n\n| hidden | float64, whole | float64, tiles |")
    print("|---:|---:|---:|")
    for hidden in (576, 1024, 2048, 4096):
        block = torch.randn(ROWS, hidden, device=device, dtype=torch.float64)
        total = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        tiles = Accumulator((("x", hidden),), hidden, device)._tiles
        found = [
            seconds(lambda x=block, t=total: t.addmm_(x.T, x), device),
            seconds(lambda x=block, t=total, p=tiles: add_tiles(t, x, p), device),
        ]
        print(f"| {hidden:,} | " + " | ".join(f"{1e3 * each:.1f} ms" for each in found) + " |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    time_products(torch.device(parser.parse_args().device))


if __name__ == "__main__":
    main()
