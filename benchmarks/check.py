"""Whether a change made calibration slower: ratios in one run, against recorded ones.

    python benchmarks/check.py [--record]

Everything is small and in one process: each way takes turns with the bare forward passes, or with
the plain product, that it is measured by, so that another machine or a busy one changes both. What
is recorded is in `baseline.json`; a ratio more than a quarter above it is told, and the exit code
is 1.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ghostlayers.calibration import scoring
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import micro_batches, sweep
from ghostlayers.repairs import Repair, find_method
from ghostlayers.runtime.machine import processor_name
from ghostlayers.selection.choices import candidate_spans
from ghostlayers.spans import Span
from ghostlayers.statistics.moments import Accumulator
from ghostlayers.surgery import removal
from ghostlayers.text.tokens import Windows

BASELINE = Path(__file__).with_name("baseline.json")
SLOWER = 1.25
REPEATS = 7
GAP = (Span(5, 9),)
CUT = (Span(3, 4), Span(5, 6), Span(8, 10))


def small_model() -> LlamaForCausalLM:
    """A random Llama whose layers take milliseconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1056, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=6, vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def windows_of(count: int) -> Windows:
    """Random tokens."""
    ids = torch.randint(0, 512, (count, 256), generator=torch.Generator().manual_seed(0))
    return Windows(ids, bos=False, available=count, documents=())


def pairs() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """By name: what is measured, and what it is measured by."""
    dense = small_model()
    model, windows = DenseModel(dense), windows_of(12)
    spans = candidate_spans(model.num_layers, 4)

    def bare() -> None:
        for ids in micro_batches(model, windows):
            batch, stream = model.begin(ids)
            for _ in sweep(model, [batch], [stream], stop=model.num_layers):
                pass

    def fit(gaps: tuple[Span, ...], name: str) -> Callable[[], object]:
        return lambda: fit_gaps(Runner(model), windows, gaps, Fitting(find_method(name)))

    x = torch.randn(2048, 384)
    wide = x.double()

    def sums() -> None:
        Accumulator((("x", 384),), 384).add(x, x, [x])

    repair = Repair("none")
    cut = removal.prune_layers(DenseModel(dense), GAP, {GAP[0]: repair})
    ghost = removal.prune_layers(DenseModel(dense), GAP, fit(GAP, "ghost")())  # type: ignore[arg-type]
    ids = windows.input_ids[:2]

    def forward(which: LlamaForCausalLM) -> Callable[[], object]:
        return lambda: which.model(input_ids=ids, use_cache=False)

    return {
        "scores, of bare forwards": (
            lambda: scoring.measure_scores(
                Runner(model), windows, spans, cosine_axis="hidden", residuals=False
            ),
            bare,
        ),
        "fit of one gap, of bare forwards": (fit(GAP, "ghost"), bare),
        "fit of three gaps, of bare forwards": (fit(CUT, "ghost"), bare),
        "fit of joint:x+z, of bare forwards": (fit(GAP, "joint:x+z"), bare),
        "sums of a block, of two float64 products": (
            sums,
            lambda: (wide.T @ wide, wide.T @ wide),
        ),
        "repaired model, of the bare cut": (forward(ghost), forward(cut)),
    }


@torch.no_grad()
def ratio(work: Callable[[], object], by: Callable[[], object]) -> float:
    """The median of ratios of neighbouring runs."""
    found = []
    for turn in range(REPEATS + 1):
        times = []
        for each in (by, work):
            start = time.perf_counter()
            each()
            times.append(time.perf_counter() - start)
        if turn:
            found.append(times[1] / times[0])
    return statistics.median(found)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="take what is measured as baseline")
    arguments = parser.parse_args()
    found = {name: round(ratio(*pair), 3) for name, pair in pairs().items()}
    if arguments.record:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        about = {
            "processor": processor_name(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "date": today,
        }  # fmt: skip
        BASELINE.write_text(json.dumps({"about": about, "ratios": found}, indent=2) + "\n")
    recorded = json.loads(BASELINE.read_text())["ratios"]
    slower = [name for name, value in found.items() if value > SLOWER * recorded[name]]
    for name, value in found.items():
        mark = "  SLOWER" if name in slower else ""
        print(f"{name:45} {value:6.2f}   recorded {recorded[name]:6.2f}{mark}")
    if slower:
        sys.exit(f"{len(slower)} of {len(found)} ratios are more than {SLOWER - 1:.0%} above.")


if __name__ == "__main__":
    main()
