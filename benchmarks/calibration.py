"""What calibration costs, beside bare forward passes and beside a straightforward implementation.

See ``benchmarks/README.md`` for what every case is and how to read the table. On the processor
every case runs in a child process of its own, so that no case's memory is another's; on an
accelerator, whose allocator tells what each case holds, all run in one.
"""

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ghostlayers.calibration import fitting as fits
from ghostlayers.calibration import scoring, search
from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.passes import Runner
from ghostlayers.calibration.search import ChosenCut
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.model.stream import find_decoder_layers, micro_batches
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import FitOptions, find_method
from ghostlayers.runtime.machine import processor_name
from ghostlayers.selection import ScoreTable
from ghostlayers.selection.choices import candidate_spans, select
from ghostlayers.selection.residual import TokenSample, sample_mask, span_residual
from ghostlayers.spans import Span, check_layers, format_layers, merge_layers, parse_layers
from ghostlayers.study import Study
from ghostlayers.text.corpora import Corpus, load_corpus
from ghostlayers.text.tokens import Windows, check_sequence_length, make_windows

BARE = "bare"
RANDOM_VOCABULARY = 32_000
INTERMEDIATE = 2.75
"""Width of a random model's MLP over its hidden size: 2,816 for 1,024."""

NOTABLE_MB = 1.0
"""Less extra memory than this is not divided by."""

SHARE_BATCHES = 5
"""Batches, at least, from which the layers' shares of a forward pass are taken."""

SAMPLE_FACTORS = (1.5, 2.0, 3.0, 5.0, 8.0, 16.0)
KNOWN_CUTS = {(30, 7): "12-15,17,25,26", (16, 7): "3,4,6,8,9,11,13"}
"""Cuts that are not contiguous, by decoder layers and layers removed."""

Pass = tuple[int, int, int]
"""Layers [start, stop) run on so many windows; from 0, the embedding comes with them."""

Pair = tuple[int, int]
"""Two boundaries: before and after a candidate."""


@dataclass(frozen=True)
class Bench:
    """What every case works on.

    Attributes:
        model: the dense model.
        windows: windows that spans are scored on.
        fit_windows: windows that repairs are fitted on.
        held_out: windows that candidates' losses are measured on.
        layers: how many layers a selection removes.
        gap: the one contiguous gap that is fitted.
        cut: the gaps of the cut that is not contiguous.
        batch_size: windows at a time, for the bare forward and for this package; 0 chooses.
        plain_batch_size: windows at a time for the straightforward implementation.
    """

    model: Any
    windows: Windows
    fit_windows: Windows
    held_out: Windows
    layers: int
    gap: tuple[Span, ...]
    cut: tuple[Span, ...]
    batch_size: int
    plain_batch_size: int

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(find_decoder_layers(self.model))

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        where: torch.device = self.model.device
        return where

    @property
    def runner(self) -> Runner:
        """How this package runs: in silence, with these batches."""
        return Runner(DenseModel(self.model), self.batch_size)

    def choose(self, selection: str) -> ChosenCut:
        """What a selection takes, repairs fitted as by default."""
        text = Corpus("windows", ()), self.windows, self.held_out
        return search.choose(Study(self.runner, self.recipe(selection), RunOptions(), *text))

    def recipe(self, selection: str) -> Recipe:
        """The recipe that selects so, everything else as it is by default."""
        return Recipe(
            layers=self.layers,
            select=selection,
            windows=len(self.windows),
            fit_windows=len(self.fit_windows),
            held_out_windows=len(self.held_out),
            sequence_length=self.windows.sequence_length,
        )

    def fitting(self, *, repaired: bool = True) -> Fitting:
        """The default repair, fitted on repaired or on original inputs."""
        return Fitting(
            find_method("ghost"), repaired_inputs=repaired, stored_dtype=self.model.dtype
        )


@dataclass(frozen=True)
class Outcome:
    """What a case says about the work it did.

    Attributes:
        work: the forward passes that the answer cannot do without.
        heads: windows whose logits are needed besides.
        copy_mb: a copy of the model that is held throughout.
        notes: for the reader.
        operators: what a straightforward fit found, to be checked.
    """

    work: tuple[Pass, ...] = ()
    heads: int = 0
    copy_mb: float = 0.0
    notes: tuple[str, ...] = ()
    operators: Mapping[Span, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One case as measured in its child process.

    Attributes:
        seconds: of every repeat.
        bare_seconds: of the bare forward before every repeat, with ``--paired``.
        extra_mb: highest resident memory of all repeats, less that of the loaded, warm model.
        work: see `Outcome`.
        heads: see `Outcome`.
        copy_mb: see `Outcome`; part of the extra memory.
        notes: see `Outcome`.
        elapsed: of the bare case alone: share of a bare forward gone by at each boundary.
        head_share: of the bare case alone: the head on all windows, over a bare forward.
        num_layers: decoder layers.
    """

    seconds: tuple[float, ...]
    bare_seconds: tuple[float, ...]
    extra_mb: float
    work: tuple[Pass, ...]
    heads: int
    copy_mb: float
    notes: tuple[str, ...]
    num_layers: int
    elapsed: tuple[float, ...] = ()
    head_share: float = 0.0

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        label: what is done.
        run: does it.
        rivals: straightforward cases that, one after another, do the same.
        most_needed: aim: at most so many times the bare forwards that are needed.
        least_gain: aim: at least so many times faster and smaller than the rivals.
    """

    label: str
    run: Callable[[Bench], Outcome]
    rivals: tuple[str, ...] = ()
    most_needed: float | None = None
    least_gain: float | None = None


# --- the reference ---------------------------------------------------------------------------


@torch.no_grad()
def run_bare(bench: Bench) -> Outcome:
    """All windows through the base model, without head and without cache."""
    for ids in micro_batches(DenseModel(bench.model), bench.windows, bench.batch_size):
        bench.model.base_model(input_ids=ids.to(bench.device), use_cache=False)
    return Outcome(((0, bench.num_layers, len(bench.windows)),))


@torch.no_grad()
def elapsed_shares(bench: Bench) -> tuple[float, ...]:
    """Share of the bare forward that is over when each boundary is reached: medians of batches."""
    layers = find_decoder_layers(bench.model)
    ticks: list[float] = []

    def tick(*_: Any) -> None:
        wait_for(bench.device)
        ticks.append(time.perf_counter())

    batches = list(micro_batches(DenseModel(bench.model), bench.windows, bench.batch_size))
    passes = math.ceil(SHARE_BATCHES / len(batches))
    shares: list[list[float]] = []
    with ExitStack() as hooks:
        hooks.callback(layers[0].register_forward_pre_hook(tick).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(tick).remove)
        for ids in batches * passes:
            ticks.clear()
            wait_for(bench.device)
            start = time.perf_counter()
            bench.model.base_model(input_ids=ids.to(bench.device), use_cache=False)
            wait_for(bench.device)
            whole = time.perf_counter() - start
            shares.append([(at - start) / whole for at in ticks])
    return tuple(statistics.median(column) for column in zip(*shares, strict=True))


@torch.no_grad()
def head_seconds(bench: Bench) -> float:
    """The head on all windows, judged from one window."""
    head = bench.model.get_output_embeddings()
    hidden = torch.randn(
        1, bench.windows.sequence_length, bench.model.config.hidden_size, dtype=bench.model.dtype,
        device=bench.device,
    )  # fmt: skip
    seconds = [timed(lambda: head(hidden), bench.device)[0] for _ in range(4)]
    return statistics.median(seconds[1:]) * len(bench.windows)


# --- this package ----------------------------------------------------------------------------


def select_work(bench: Bench) -> tuple[Pass, ...]:
    """A score of every span needs every layer once."""
    return ((0, bench.num_layers, len(bench.windows)),)


def fit_work(bench: Bench, spans: Sequence[Span], *, repaired: bool) -> tuple[Pass, ...]:
    """A fit needs the layers before its last gap's end; on repaired inputs, some of them twice.

    Those are the layers kept between two gaps: they carry the dense and the repaired stream.
    """
    count = len(bench.fit_windows)
    dense: Pass = (0, spans[-1].stop, count)
    if not repaired:
        return (dense,)
    between = ((a.stop, b.start, count) for a, b in pairwise(spans))
    return (dense, *between)


def loss_work(bench: Bench, spans: Sequence[Span]) -> tuple[Pass, ...]:
    """Losses of candidates: the dense model once, and each candidate from its gap on."""
    last, count = bench.num_layers, len(bench.held_out)
    return ((0, last, count), *((span.stop, last, count) for span in spans))


def run_score(bench: Bench, *, residuals: bool) -> Outcome:
    """Scores of every candidate span."""
    table, _ = scoring.measure_scores(
        bench.runner,
        bench.windows,
        candidate_spans(bench.num_layers, bench.layers),
        residuals=residuals,
    )
    notes = [describe_selection(name, table, bench.layers) for name in ("streamline", "shortgpt")]
    return Outcome(select_work(bench), notes=tuple(notes))


def describe_selection(name: str, table: ScoreTable, count: int) -> str:
    """What a selection takes."""
    return describe_layers(name, select(name, table, count))


def describe_layers(name: str, spans: Sequence[Span]) -> str:
    """Spans behind a name, as layers."""
    return f"{name} selects {format_layers(layer for span in spans for layer in span.layers)}"


def run_recoverable(bench: Bench) -> Outcome:
    """The default selection, whole."""
    found = bench.choose("recoverable")
    assert found.table is not None
    measured = [score.span for score in found.table.spans if score.loss is not None]
    notes = (
        describe_layers("recoverable", found.spans),
        f"{len(measured)} candidates measured on {len(bench.held_out)} held-out windows",
    )
    work = (*select_work(bench), *loss_work(bench, measured))
    return Outcome(work, heads=(len(measured) + 1) * len(bench.held_out), notes=notes)


def run_fit(bench: Bench, spans: tuple[Span, ...], *, repaired: bool) -> Outcome:
    """Repairs of given gaps."""
    fitting = bench.fitting(repaired=repaired)
    fit_gaps(bench.runner, bench.fit_windows, spans, fitting)
    return Outcome(fit_work(bench, spans, repaired=repaired and len(spans) > 1))


def run_select_and_fit(bench: Bench, selection: str, spans: tuple[Span, ...]) -> Outcome:
    """A selection, then a fit: of the given gaps, so that both sides and every model do the same.

    What the selection takes is only noted.
    """
    found = bench.choose(selection)
    fit_gaps(bench.runner, bench.fit_windows, spans, bench.fitting())
    work = (*select_work(bench), *fit_work(bench, spans, repaired=len(spans) > 1))
    return Outcome(work, notes=(describe_layers(selection, found.spans),))


# --- a straightforward implementation --------------------------------------------------------


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a layer's arguments."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def layer_output(output: Any) -> Tensor:
    """The hidden states among a layer's results."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def hooked(
    layer: nn.Module,
    *,
    on_input: Callable[[Tensor], None] | None = None,
    on_output: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Show a layer's input or output to a function whenever the layer runs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if on_input is not None:
            on_input(layer_input(args, kwargs).detach().float())
        if on_output is not None:
            on_output(layer_output(output).detach().float())

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def keeper(boundaries: dict[int, Tensor], index: int) -> Callable[[Tensor], None]:
    """Keeps a boundary's hidden states."""

    def keep(hidden: Tensor) -> None:
        boundaries[index] = hidden

    return keep


@torch.no_grad()
def plain_similarities(bench: Bench, pairs: Sequence[Pair]) -> dict[Pair, float]:
    """Mean cosine of every candidate: hooks on all layers, sample by sample."""
    layers = find_decoder_layers(bench.model)
    cosines: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(hooked(layer, on_input=keeper(kept, index)))
        stack.enter_context(hooked(layers[-1], on_output=keeper(kept, len(layers))))
        for ids in bench.windows.input_ids.split(bench.plain_batch_size):
            bench.model(ids.to(bench.device), use_cache=False)
            for sample in range(ids.shape[0]):
                for a, b in pairs:
                    cosine = F.cosine_similarity(kept[a][sample], kept[b][sample], dim=-1)
                    cosines[a, b].append(float(cosine.mean()))
            kept.clear()
    return {pair: statistics.fmean(values) for pair, values in cosines.items()}


def run_plain_gap_selection(bench: Bench) -> Outcome:
    """The contiguous span of highest cosine."""
    candidates = candidate_spans(bench.num_layers, bench.layers)
    scores = plain_similarities(bench, [(span.start, span.stop) for span in candidates])
    best = Span(*max(scores, key=lambda pair: scores[pair]))
    return Outcome(notes=(describe_layers("streamline", [best]),))


def run_plain_cut_selection(bench: Bench) -> Outcome:
    """The single layers of highest cosine."""
    scores = plain_similarities(bench, [(i, i + 1) for i in range(bench.num_layers)])
    best = sorted(scores, key=lambda pair: -scores[pair])[: bench.layers]
    return Outcome(notes=(describe_layers("shortgpt", merge_layers(pair[0] for pair in best)),))


@torch.no_grad()
def collect_activations(bench: Bench, span: Span) -> tuple[list[Tensor], list[Tensor]]:
    """The stream before and after a span, of all tokens, from a pass of the whole model."""
    layers = find_decoder_layers(bench.model)
    before: list[Tensor] = []
    after: list[Tensor] = []
    with (
        hooked(layers[span.start], on_input=before.append),
        hooked(layers[span.stop - 1], on_output=after.append),
    ):
        for ids in bench.fit_windows.input_ids.split(bench.plain_batch_size):
            bench.model(ids.to(bench.device), use_cache=False)
    return before, after


def plain_operator(bench: Bench, span: Span) -> Tensor:
    """M of one span by float64 normal equations over all its activations at once."""
    before, after = collect_activations(bench, span)
    X = torch.cat(before).flatten(0, 1).double()
    D = torch.cat(after).flatten(0, 1).double() - X
    gram = X.T @ X + 1e-6 * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    operator: Tensor = torch.linalg.solve(gram, X.T @ D)
    return operator


def run_plain_fit(bench: Bench, spans: Sequence[Span]) -> Outcome:
    """One pass and one fit a span, beside a copy of the model, which the repairs would go into."""
    pruned = copy.deepcopy(bench.model)
    operators = {span: plain_operator(bench, span) for span in spans}
    del pruned
    return Outcome(operators=operators, copy_mb=model_mb(bench))


def single_layers(spans: Sequence[Span]) -> list[Span]:
    """Every removed layer as a span of its own."""
    return [Span(layer, layer + 1) for span in spans for layer in span.layers]


def model_mb(bench: Bench) -> float:
    """Size of the weights, tied ones counted once."""
    sizes = [each.numel() * each.element_size() for each in bench.model.parameters()]
    return float(sum(sizes)) / 2**20


def check_operators(bench: Bench, operators: Mapping[Span, Tensor]) -> str:
    """How far a straightforward fit is from this package's, at the same settings."""
    same = Fitting(
        find_method("ghost"),
        FitOptions(ridge=0.0, absolute_ridge=1e-6),
        token_weight="uniform",
        repaired_inputs=False,
        stored_dtype=torch.float64,
    )
    ours = fits.fit_gaps(Runner(DenseModel(bench.model)), bench.fit_windows, list(operators), same)
    worst = 0.0
    for span, theirs in operators.items():
        delta = ours[span].delta
        assert delta is not None
        worst = max(worst, float((delta - theirs).norm() / theirs.norm()))
    return f"operators differ from this package's at the same settings by {worst:.1e}"


# --- the cases -------------------------------------------------------------------------------

CASES: dict[str, Case] = {
    BARE: Case("bare forward, no head", run_bare),
    "score": Case(
        "score: cosine only (streamline)",
        lambda bench: run_score(bench, residuals=False),
        rivals=("plain-select-gap",),
    ),
    "score-residual": Case(
        "score: cosine and residual", lambda bench: run_score(bench, residuals=True)
    ),
    "recoverable": Case(
        "select: recoverable, with candidates' losses", run_recoverable, most_needed=1.3
    ),
    "fit-gap": Case(
        "fit: contiguous",
        lambda bench: run_fit(bench, bench.gap, repaired=True),
        rivals=("plain-fit-gap",),
    ),
    "fit-cut-original": Case(
        "fit: not contiguous, original inputs",
        lambda bench: run_fit(bench, bench.cut, repaired=False),
        rivals=("plain-fit-cut",),
        least_gain=3.0,
    ),
    "fit-cut-repaired": Case(
        "fit: not contiguous, repaired inputs",
        lambda bench: run_fit(bench, bench.cut, repaired=True),
        rivals=("plain-fit-cut",),
        least_gain=3.0,
    ),
    "select-fit-gap": Case(
        "select + fit: streamline, contiguous",
        lambda bench: run_select_and_fit(bench, "streamline", bench.gap),
        rivals=("plain-select-gap", "plain-fit-gap"),
        most_needed=1.1,
    ),
    "select-fit-cut": Case(
        "select + fit: shortgpt, not contiguous",
        lambda bench: run_select_and_fit(bench, "shortgpt", bench.cut),
        rivals=("plain-select-cut", "plain-fit-cut"),
        most_needed=1.1,
        least_gain=3.0,
    ),
    "plain-select-gap": Case("straightforward select: streamline", run_plain_gap_selection),
    "plain-select-cut": Case("straightforward select: shortgpt", run_plain_cut_selection),
    "plain-fit-gap": Case(
        "straightforward fit: contiguous", lambda bench: run_plain_fit(bench, bench.gap)
    ),
    "plain-fit-cut": Case(
        "straightforward fit: not contiguous",
        lambda bench: run_plain_fit(bench, single_layers(bench.cut)),
    ),
}


# --- models and windows ----------------------------------------------------------------------


def random_config(args: argparse.Namespace) -> Any:
    """Tied embeddings and 64 channels a head; or as Llama 3 has it."""
    from transformers import LlamaConfig

    hidden, layers = args.random
    sizes: dict[str, Any] = {
        "vocab_size": RANDOM_VOCABULARY,
        "intermediate_size": round(INTERMEDIATE * hidden),
        "num_attention_heads": max(1, hidden // 64),
        "tie_word_embeddings": True,
    }
    if args.llama3:
        sizes = {
            "vocab_size": 128_256,
            "intermediate_size": round(3.5 * hidden),
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": max(1, hidden // 512),
            "tie_word_embeddings": False,
        }
    positions = max(2048, args.sequence_length)
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, max_position_embeddings=positions, **sizes
    )


def random_model(args: argparse.Namespace) -> Any:
    """A Llama with random weights, made where it computes."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return LlamaForCausalLM(random_config(args)).eval()
    finally:
        torch.set_default_dtype(before)


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and its tokenizer if it has one."""
    if args.model is None:
        return random_model(args), None
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = load_model(args.model, RunOptions(dtype=args.dtype, device=args.device))
    return loaded.network, loaded.tokenizer


def read_windows(args: argparse.Namespace, config: Any, tokenizer: Any) -> Windows:
    """Windows of a text, or of random token ids; the held-out ones come last."""
    count = args.windows + held_out_count(args)
    if args.text is not None:
        return make_windows(
            load_corpus(args.text, use="calibration"),
            tokenizer,
            sequence_length=args.sequence_length,
            count=count,
            seed=args.seed,
        )
    generator = torch.Generator().manual_seed(args.seed)
    shape = (count, args.sequence_length)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    return Windows(ids, bos=False, available=count, documents=())


def held_out_count(args: argparse.Namespace) -> int:
    """Held-out windows: as many as a recipe of so many windows has by default."""
    return Recipe(windows=args.windows).num_held_out_windows


def open_bench(args: argparse.Namespace) -> Bench:
    """The model and the windows that the command line asks for."""
    model, tokenizer = open_model(args)
    check_sequence_length(model.config, args.sequence_length)
    windows, held_out = read_windows(args, model.config, tokenizer).split_at(args.windows)
    fit_windows = windows.first(args.fit_windows or args.windows)
    check_tokens(fit_windows, model.config.hidden_size)
    num_layers = len(find_decoder_layers(model))
    return Bench(
        model=model,
        windows=windows,
        fit_windows=fit_windows,
        held_out=held_out,
        layers=args.layers,
        gap=named_layers(args.gap or default_gap(num_layers, args.layers), num_layers),
        cut=named_layers(args.cut or default_cut(num_layers, args.layers), num_layers),
        batch_size=args.batch_size,
        plain_batch_size=args.plain_batch_size,
    )


def check_tokens(windows: Windows, hidden: int) -> None:
    """Refuse fewer fit tokens than channels before anything is timed."""
    available = windows.input_ids.numel()
    if available < hidden:
        raise SystemExit(f"{available} fit tokens cannot fit {hidden} channels; give more windows.")


def named_layers(text: str, num_layers: int) -> tuple[Span, ...]:
    """The gaps of layers written such as ``12-15,17``."""
    return check_layers(parse_layers(text), num_layers)


def default_gap(num_layers: int, count: int) -> str:
    """A contiguous gap a little behind the middle."""
    start = round(0.6 * (num_layers - count))
    return f"{start}-{start + count - 1}"


def default_cut(num_layers: int, count: int) -> str:
    """A cut that is not contiguous: a known one, or every other layer about the middle."""
    if (num_layers, count) in KNOWN_CUTS:
        return KNOWN_CUTS[num_layers, count]
    start = (num_layers - 2 * count + 1) // 2
    if start < 0:
        raise SystemExit(f"no default cut removes {count} of {num_layers} layers; give --cut.")
    return ",".join(str(start + 2 * index) for index in range(count))


# --- measuring in a child process ------------------------------------------------------------


CPU = torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device = CPU) -> tuple[float, Any]:
    """Seconds, and what was computed."""
    wait_for(device)
    start = time.perf_counter()
    value = work()
    wait_for(device)
    return time.perf_counter() - start, value


class Memory:
    """What is held: resident in the processor's memory, or by an accelerator's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.there = None if device.type == "cpu" else torch.get_device_module(device)
        self.forget()
        self.base = resident_mb() if self.there is None else self._allocated()

    def _allocated(self) -> float:
        assert self.there is not None
        return float(self.there.memory_allocated()) / 2**20

    def forget(self) -> None:
        """Give freed memory back, and forget the peak so far."""
        release_memory()
        if self.there is None:
            reset_peak()
        else:
            self.there.empty_cache()
            self.there.reset_peak_memory_stats()

    def peak(self) -> float:
        """The highest since then, in MB."""
        if self.there is None:
            return peak_mb()
        return float(self.there.max_memory_allocated()) / 2**20


def status_mb(key: str) -> float | None:
    """An entry of /proc/self/status, in MB; None where there is no such file."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
    return None


def resident_mb() -> float:
    """Resident memory now."""
    with suppress(ImportError):
        import psutil

        return float(psutil.Process().memory_info().rss) / 2**20
    return status_mb("VmRSS") or 0.0


def peak_mb() -> float:
    """Highest resident memory since the last reset, or since the start where none is possible."""
    peak = status_mb("VmHWM")  # ru_maxrss can hold the parent's memory at the time of the fork
    if peak is not None:
        return peak
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak() -> None:
    """Forget the peak so far, which loading a model may have set; Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def release_memory() -> None:
    """Give freed memory back to the system, so that it is not counted as the model's."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def warm_up(bench: Bench) -> None:
    """One window through the model, and every weight read once: files may be mapped lazily."""
    ids = bench.windows.input_ids[:1].to(bench.device)
    bench.model.base_model(input_ids=ids, use_cache=False)
    for parameter in bench.model.parameters():
        parameter.sum()


def measure(args: argparse.Namespace, name: str) -> Result:
    """Run one case as often as asked, in a process that has done nothing else."""
    torch.set_num_threads(args.threads)
    return measure_on(open_bench(args), args, name)


def measure_on(bench: Bench, args: argparse.Namespace, name: str) -> Result:
    """Run one case as often as asked."""
    case = CASES[name]
    warm_up(bench)
    memory = Memory(bench.device)
    if memory.there is not None:
        case.run(bench)  # its kernels are loaded, and its products tuned, the first time
    seconds, bare_seconds, peaks = [], [], []
    outcome = Outcome()
    for _ in range(args.repeats):
        del outcome  # it may hold operators, and belongs to no further repeat's memory
        if args.paired and name != BARE:
            bare_seconds.append(timed(lambda: run_bare(bench), bench.device)[0])
        memory.forget()
        spent, outcome = timed(lambda: case.run(bench), bench.device)
        seconds.append(spent)
        peaks.append(memory.peak())
    notes = list(outcome.notes)
    if args.check and outcome.operators:
        notes.append(check_operators(bench, outcome.operators))
    is_bare = name == BARE
    return Result(
        seconds=tuple(seconds),
        bare_seconds=tuple(bare_seconds),
        extra_mb=max(0.0, max(peaks) - memory.base),
        work=outcome.work,
        heads=outcome.heads,
        copy_mb=outcome.copy_mb,
        notes=tuple(notes),
        num_layers=bench.num_layers,
        elapsed=elapsed_shares(bench) if is_bare else (),
        head_share=head_seconds(bench) / statistics.median(seconds) if is_bare else 0.0,
    )


def run_child(argv: Sequence[str], name: str, threads: int) -> Result | None:
    """Measure a case in a fresh process; None if it died."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--child", name]
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **counts}, check=False
    )
    if done.returncode != 0:
        report(f"{name} failed with exit status {done.returncode}")
        return None
    values = json.loads(done.stdout.strip().splitlines()[-1])
    values["work"] = tuple(tuple(each) for each in values["work"])
    return Result(**values)


def run_all(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Result]:
    """Measure every case asked for, the bare forward first; save after each."""
    results: dict[str, Result] = {}
    here = None if args.device == "cpu" else open_bench(args)
    for name in [BARE, *(name for name in chosen_cases(args) if name != BARE)]:
        if here is None:
            result = run_child(argv, name, args.threads)
        else:
            result = measure_on(here, args, name)
        if result is None:
            if name == BARE:
                raise SystemExit("without a bare forward there is nothing to compare with.")
            continue
        results[name] = result
        report(f"{name}: {result.median:.2f} s, {result.extra_mb:.0f} MB extra")
        save(args, {"cases": {key: asdict(value) for key, value in results.items()}})
    return results


def chosen_cases(args: argparse.Namespace) -> list[str]:
    """The cases of --only, in the table's order; all by default."""
    wanted = args.only.split(",") if args.only else list(CASES)
    unknown = sorted(set(wanted) - set(CASES))
    if unknown:
        raise SystemExit(f"no case is called {', '.join(unknown)}; there are {', '.join(CASES)}.")
    return [name for name in CASES if name in wanted]


def report(line: str) -> None:
    """Tell who waits."""
    print(line, file=sys.stderr, flush=True)


def save(args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Write a JSON file if one is wanted."""
    if args.json is not None:
        text = json.dumps({"header": header(args), **content}, indent=2)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


# --- the table -------------------------------------------------------------------------------


def needed_share(bare: Result, work: Sequence[Pass]) -> float:
    """Forward passes in units of the bare forward of all windows, from measured shares."""
    windows = bare.work[0][2]
    return sum(
        (bare.elapsed[stop] - (bare.elapsed[start] if start else 0.0)) * count / windows
        for start, stop, count in work
    )


def times_bare(result: Result, bare: Result) -> float:
    """Time over the bare forward's: the one measured beside it, if there is one."""
    reference = statistics.median(result.bare_seconds or bare.seconds)
    return result.median / reference


def rivals_of(name: str, results: Mapping[str, Result]) -> list[Result]:
    """The straightforward cases that do the same; none if any of them is missing."""
    names = CASES[name].rivals
    return [results[each] for each in names] if all(each in results for each in names) else []


def gains(name: str, results: Mapping[str, Result]) -> tuple[float, float] | None:
    """How many times longer, and larger, the straightforward cases are; None without them."""
    rivals, ours, bare = rivals_of(name, results), results[name], results[BARE]
    if not rivals:
        return None
    time_gain = sum(times_bare(rival, bare) for rival in rivals) / times_bare(ours, bare)
    memory = max(rival.extra_mb for rival in rivals)
    return time_gain, memory / max(ours.extra_mb, NOTABLE_MB)


def copy_note(name: str, results: Mapping[str, Result]) -> str | None:
    """The memory gain that is left when the straightforward copy of the model is not counted."""
    rivals = rivals_of(name, results)
    if not any(rival.copy_mb for rival in rivals):
        return None
    memory = max(rival.extra_mb - rival.copy_mb for rival in rivals)
    gain = memory / max(results[name].extra_mb, NOTABLE_MB)
    return f"{name}: memory {gain:.1f} x if the straightforward copy of the model is left out"


def aims(case: Case, over_needed: float, gain: tuple[float, float] | None) -> str:
    """The aims of a case, and whether they are met."""
    texts = []
    if case.most_needed is not None:
        texts.append(f"<= {case.most_needed:g} x needed: {yes_no(over_needed <= case.most_needed)}")
    if case.least_gain is not None and gain is not None:
        goal = f"1/{case.least_gain:g}"
        texts.append(f"time <= {goal}: {yes_no(gain[0] >= case.least_gain)}")
        texts.append(f"memory <= {goal}: {yes_no(gain[1] >= case.least_gain)}")
    return "; ".join(texts)


def yes_no(met: bool) -> str:
    """Whether an aim is met, in a word."""
    return "yes" if met else "NO"


HEAD = ("case", "seconds", "x bare", "needed", "x needed", "extra MB", "time", "memory", "aims")


def table_row(name: str, results: Mapping[str, Result]) -> list[str]:
    """One case as cells, in the order of `HEAD`."""
    case, result, bare = CASES[name], results[name], results[BARE]
    over_bare = times_bare(result, bare)
    needed = needed_share(bare, result.work)
    gain = gains(name, results)
    return [
        case.label,
        f"{result.median:.2f}",
        f"{over_bare:.2f}",
        f"{needed:.2f}" if needed else "",
        f"{over_bare / needed:.2f}" if needed else "",
        f"{result.extra_mb:.0f}",
        f"{gain[0]:.1f} x" if gain else "",
        f"{gain[1]:.1f} x" if gain else "",
        aims(case, over_bare / needed if needed else 0.0, gain),
    ]


def sum_row(label: str, parts: Sequence[str], results: Mapping[str, Result]) -> list[str]:
    """Straightforward cases one after another: their times add, the larger memory counts."""
    bare, chosen = results[BARE], [results[part] for part in parts]
    return [
        label,
        f"{sum(each.median for each in chosen):.2f}",
        f"{sum(times_bare(each, bare) for each in chosen):.2f}",
        "",
        "",
        f"{max(each.extra_mb for each in chosen):.0f}",
        "",
        "",
        "",
    ]


SUMS = {
    "straightforward select + fit: contiguous (sum)": ("plain-select-gap", "plain-fit-gap"),
    "straightforward select + fit: not contiguous (sum)": ("plain-select-cut", "plain-fit-cut"),
}


def table_rows(results: Mapping[str, Result]) -> list[list[str]]:
    """All cells of the table."""
    rows = [table_row(name, results) for name in results]
    sums = [
        sum_row(label, parts, results)
        for label, parts in SUMS.items()
        if all(part in results for part in parts)
    ]
    return rows + sums


def render(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """A table: first and last column to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, len(head) - 1}

    def cells(line: Sequence[str]) -> list[str]:
        pairs = enumerate(zip(line, widths, strict=True))
        return [text.ljust(width) if i in left else text.rjust(width) for i, (text, width) in pairs]

    if not markdown:
        return "\n".join("  ".join(cells(line)).rstrip() for line in lines)
    rule = [
        ("-" * width if i in left else "-" * (width - 1) + ":") for i, width in enumerate(widths)
    ]
    body = [cells(head), rule, *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in body)


def notes_of(results: Mapping[str, Result]) -> list[str]:
    """What the cases say about themselves, and what the heads cost that no ``needed`` counts."""
    bare = results[BARE]
    a_window = bare.head_share / bare.work[0][2]
    heads = [
        f"{name}: needs the head on {result.heads} windows too, "
        f"{result.heads * a_window:.2f} x bare that 'needed' leaves out"
        for name, result in results.items()
        if result.heads
    ]
    copies = [note for name in results if (note := copy_note(name, results)) is not None]
    return heads + copies + [f"{name}: {note}" for name in results for note in results[name].notes]


def model_name(args: argparse.Namespace) -> str:
    """A folder's own name, or the random model's shape."""
    if args.model is not None:
        return Path(args.model).resolve().name
    hidden, layers = args.random
    shape = ", shaped as Llama 3" if args.llama3 else ""
    return f"random Llama, {args.dtype}{shape}, hidden {hidden}, {layers} layers"


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on, and with what settings."""
    return {
        "processor": processor_name(torch.device(args.device)),
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": datetime.now(UTC).date().isoformat(),
        "model": model_name(args),
        "windows": args.windows,
        "fit_windows": args.fit_windows or args.windows,
        "sequence_length": args.sequence_length,
        "layers": args.layers,
        "batch_size": args.batch_size,
        "plain_batch_size": args.plain_batch_size,
        "repeats": args.repeats,
        "paired": args.paired,
        "seed": args.seed,
        "tokens": "random" if args.text is None else Path(args.text).name,
    }


def header_line(args: argparse.Namespace) -> str:
    """The header in one line."""
    about = header(args)
    return (
        f"{about['model']}; {about['windows']} windows of {about['sequence_length']} "
        f"({about['tokens']} tokens), fits on {about['fit_windows']}, {about['layers']} layers "
        f"removed; {about['processor']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['date']}, median of {about['repeats']}"
    )


def print_results(args: argparse.Namespace, results: Mapping[str, Result]) -> None:
    """The header, the table, and the notes."""
    notes = [f"- {note}" for note in notes_of(results)]
    print(header_line(args), "", render(HEAD, table_rows(results), markdown=args.markdown), "",
          *notes, sep="\n")  # fmt: skip


# --- how many tokens a residual needs --------------------------------------------------------


@dataclass(frozen=True)
class SampleRow:
    """Rankings of spans by the residual on samples of one size.

    Attributes:
        factor: tokens a channel; None for all tokens.
        num_tokens: tokens of a sample.
        correlations: Spearman's with the ranking by all tokens, one a seed.
        best: the best span, one a seed.
        regret: residual of the best span, measured on all tokens, less the lowest; the worst seed.
        seconds: to compute every span's residual, the median seed.
    """

    factor: float | None
    num_tokens: int
    correlations: tuple[float, ...]
    best: tuple[str, ...]
    regret: float
    seconds: float


@torch.no_grad()
def all_streams(bench: Bench) -> Tensor:
    """The stream of every token at every boundary, [boundaries, windows, sequence, hidden]."""
    model = DenseModel(bench.model)
    shape = (*bench.windows.input_ids.shape, bench.model.config.hidden_size)
    streams = torch.empty(bench.num_layers + 1, *shape, dtype=bench.model.dtype)
    done = 0
    for ids in micro_batches(DenseModel(bench.model), bench.windows, bench.batch_size):
        batch, stream = model.begin(ids)
        rows = slice(done, done + ids.shape[0])
        for boundary, hidden in Cut(model, {}).walk(batch, stream):
            streams[boundary, rows] = hidden
        done += ids.shape[0]
    return streams


def residuals(streams: Tensor, mask: Tensor, spans: Sequence[Span]) -> list[float]:
    """Residual of every span on the masked tokens."""
    # Only a few tokens of every boundary are copied at a time: all of them may be gigabytes.
    held_out = TokenSample(torch.empty(0, int(mask.sum()), 0)).held_out()
    return [
        span_residual(streams[span.start][mask], streams[span.stop][mask], held_out)
        for span in spans
    ]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of values without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def sample_row(
    streams: Tensor, spans: Sequence[Span], truth: Sequence[float], factor: float, seeds: int
) -> SampleRow:
    """Rank spans on samples of one size, one a seed."""
    windows, length, hidden = streams.shape[1:]
    wanted = round(factor * hidden)
    correlations, best, regrets, seconds = [], [], [], []
    for seed in range(seeds):
        mask = sample_mask(windows, length, wanted, torch.Generator().manual_seed(seed))
        spent, values = timed(partial(residuals, streams, mask, spans))
        winner = values.index(min(values))
        correlations.append(spearman(values, truth))
        best.append(str(spans[winner]))
        regrets.append(truth[winner] - min(truth))
        seconds.append(spent)
    return SampleRow(
        factor, wanted, tuple(correlations), tuple(best), max(regrets), statistics.median(seconds)
    )


def sample_rows(args: argparse.Namespace) -> list[SampleRow]:
    """One row a sample size, and one for all tokens."""
    torch.set_num_threads(args.threads)
    bench = open_bench(args)
    streams = all_streams(bench)
    spans = candidate_spans(bench.num_layers, bench.layers)
    everything = torch.ones(streams.shape[1:3], dtype=torch.bool)
    spent, truth = timed(lambda: residuals(streams, everything, spans))
    total = everything.numel()
    best = str(spans[truth.index(min(truth))])
    rows = [
        sample_row(streams, spans, truth, factor, args.sample_seeds)
        for factor in SAMPLE_FACTORS
        if factor * bench.model.config.hidden_size < total
    ]
    return [*rows, SampleRow(None, total, (1.0,), (best,), 0.0, spent)]


SAMPLE_HEAD = ("tokens a channel", "tokens", "Spearman", "lowest", "regret", "seconds", "best span")


def sample_cells(row: SampleRow) -> list[str]:
    """One sample size as cells, in the order of `SAMPLE_HEAD`."""
    return [
        "all" if row.factor is None else f"{row.factor:g}",
        f"{row.num_tokens}",
        f"{statistics.fmean(row.correlations):.3f}",
        f"{min(row.correlations):.3f}",
        f"{row.regret:.4f}",
        f"{row.seconds:.2f}",
        ", ".join(row.best),
    ]


def run_residual_sample(args: argparse.Namespace) -> None:
    """Print how well samples of several sizes rank spans."""
    rows = sample_rows(args)
    save(args, {"samples": [asdict(row) for row in rows]})
    table = render(SAMPLE_HEAD, [sample_cells(row) for row in rows], markdown=args.markdown)
    print(header_line(args), f"{args.sample_seeds} seeds a size", "", table, sep="\n")


# --- the command line ------------------------------------------------------------------------


def shape(text: str) -> tuple[int, int]:
    """``hidden,layers`` as numbers."""
    hidden, layers = (int(part) for part in text.split(","))
    return hidden, layers


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a model's folder")
    source.add_argument("--random", type=shape, metavar="HIDDEN,LAYERS", help="a random Llama")
    parser.add_argument("--llama3", action="store_true", help="proportions of a random Llama")
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator such as cuda")
    parser.add_argument("--text", help="calibration text; random token ids by default")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--fit-windows", type=int, help="the first so many; all by default")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=7, help="how many layers are removed")
    parser.add_argument("--gap", help="the contiguous gap that is fitted, such as 14-20")
    parser.add_argument("--cut", help="the cut that is not contiguous, such as 12-15,17,25,26")
    parser.add_argument("--batch-size", type=int, default=0, help="windows; 0: the library's")
    parser.add_argument("--plain-batch-size", type=int, default=1, help="straightforward cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--paired", action="store_true", help="a bare forward before every repeat")
    parser.add_argument("--check", action="store_true", help="compare operators with the library's")
    parser.add_argument("--only", metavar="CASE,...", help=", ".join(CASES))
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--residual-sample", action="store_true", help="how many tokens are enough")
    parser.add_argument("--sample-seeds", type=int, default=3)
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure, and print a table."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.text is not None and args.model is None:
        parser.error("--text needs a --model, whose tokenizer reads it")
    if args.residual_sample and args.text is None:
        parser.error("--residual-sample needs a --model and --text: random tokens rank nothing")
    if args.child is not None:
        print(json.dumps(asdict(measure(args, args.child))))
    elif args.residual_sample:
        run_residual_sample(args)
    else:
        print_results(args, run_all(args, argv))


if __name__ == "__main__":
    main(sys.argv[1:])
