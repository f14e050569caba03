"""What it is worth to keep freed memory: one decoder layer, the head and the losses of a window.

python benchmarks/allocator.py MODEL [--tokens 512] [--repeats 8]

Each case runs in a process of its own, as `ghostlayers.runtime.allocator` acts on all of it.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of some repeats."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


@torch.no_grad()
def measure(name: str, tokens: int, repeats: int, *, keep: bool) -> None:
    """Print the milliseconds of each part, and the peak memory."""
    from ghostlayers.model.loading import load_model
    from ghostlayers.recipe import RunOptions
    from ghostlayers.runtime.allocator import keep_freed_memory
    from ghostlayers.statistics.losses import Reference, sum_losses

    if keep:
        keep_freed_memory()
    model = load_model(name, RunOptions(dtype="float32", device="cpu"))
    ids = torch.randint(0, model.network.config.vocab_size, (1, tokens))
    batch, stream = model.begin(ids)
    some = slice(0, min(tokens, 341))
    logits = model.logits(batch, stream, some)[0]
    reference, targets = Reference.of(logits), ids[0, some]
    parts = {
        "layer": lambda: model.run_layer(1, batch, stream),
        "head": lambda: model.logits(batch, stream, some),
        "reference": lambda: Reference.of(logits),
        "losses": lambda: sum_losses(logits, targets, reference),
    }
    found = {part: 1000 * seconds(work, repeats) for part, work in parts.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = "  ".join(f"{part} {value:6.1f} ms" for part, value in found.items())
    print(f"{'kept' if keep else 'given back':10}  {told}  peak {peak:,.0f} MB")


def main() -> None:
    """Run both cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--case", choices=["kept", "given-back"])
    given = parser.parse_args()
    if given.case:
        measure(given.model, given.tokens, given.repeats, keep=given.case == "kept")
        return
    for case in ("given-back", "kept"):
        subprocess.run([sys.executable, *sys.argv, "--case", case], check=True)


if __name__ == "__main__":
    main()
