"""Slow transcriptions and small materials that several tests compare with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ghostlayers.calibration.cuts import Cut
from ghostlayers.calibration.fits import Fitting
from ghostlayers.calibration.fitting import fit_gaps
from ghostlayers.calibration.passes import Runner
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.recipe import Recipe, RunOptions
from ghostlayers.repairs import FitOptions, find_method
from ghostlayers.repairs.base import Repair
from ghostlayers.repairs.base import linear as linear_map
from ghostlayers.spans import Span
from ghostlayers.study import Study
from ghostlayers.surgery.features import check_method
from ghostlayers.text.corpora import Corpus
from ghostlayers.text.tokens import Windows

CUTS = {
    "first": (Span(0, 2),),
    "middle": (Span(1, 3),),
    "last": (Span(3, 5),),
    "both ends": (Span(0, 1), Span(4, 5)),
    "two gaps": (Span(1, 2), Span(3, 4)),
}


def token_ids(batch: int = 2, length: int = 13, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def deltas(spans: tuple[Span, ...]) -> dict[Span, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        span: 0.05 * torch.randn(32, 32, generator=generator, dtype=torch.float64) for span in spans
    }


def operators(spans: tuple[Span, ...]) -> dict[Span, Repair]:
    return {span: Repair("ghost", linear_map(delta)) for span, delta in deltas(spans).items()}


def random_windows(count: int = 40, length: int = 13) -> Windows:
    ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(8))
    return Windows(ids, bos=False, available=count, documents=())


def study_of(runner: Runner, recipe: Recipe, windows: Windows, held_out: Windows) -> Study:
    return Study(runner, recipe, RunOptions(), Corpus("windows", ()), windows, held_out)


def left_behind(dense: Any, repairs: dict[Span, Repair], span: Span) -> tuple[float, int]:
    """The share of a gap's discrepancy that is left in the repaired stream, and its fork."""
    layerwise = DenseModel(dense)
    batch, stream = layerwise.begin(random_windows().input_ids)
    bare = dict(Cut(layerwise, {}).walk(batch, stream))
    cut = Cut(layerwise, repairs)
    repaired = dict(cut.walk(batch, bare[cut.fork], cut.fork))
    want = bare[span.stop]
    weight = 1 / want.double().square().sum(dim=-1)
    left, whole = (
        float(((want - stream).double().square().sum(dim=-1) * weight).sum())
        for stream in (repaired[span.stop], bare[span.start])
    )
    return left / whole, cut.fork


GENERATION = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
"""Options of so many tokens, the likeliest each."""


def fitted(dense: Any, name: str, spans: tuple[Span, ...]) -> dict[Span, Repair]:
    method = find_method(name)
    check_method(DenseModel(dense), method, spans)
    how = Fitting(method, FitOptions(ridge=1e-4), token_weight="relative")
    return fit_gaps(Runner(DenseModel(dense)), random_windows(), spans, how)


def literal_repaired(dense: Any, spans: tuple[Span, ...], ids: Tensor) -> Tensor:
    """Hooks on the dense model that skip removed layers and add x M at each gap."""
    maps = deltas(spans)
    handles = []

    def instead(output: Any, stream: Tensor) -> Any:
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    def skip(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return instead(output, args[0] if args else kwargs["hidden_states"])

    def repair(span: Span) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return instead(output, x + linear(x, maps[span].T.float()))

        return hook

    for span in spans:
        for index in span.layers:
            layer = find_decoder_layers(dense)[index]
            last = index == span.stop - 1
            handles.append(
                layer.register_forward_hook(repair(span) if last else skip, with_kwargs=True)
            )
    result = logits(dense, ids)
    for handle in handles:
        handle.remove()
    return result


@contextmanager
def skipping(model: Any, deltas: dict[Span, Tensor], more: tuple[int, ...] = ()) -> Iterator[None]:
    """Layers of gaps hand their input on, the last one repaired; further ones just hand it on."""

    def hook(_: Any, args: Any, output: Any, delta: Tensor | None) -> Tensor:
        return args[0] if delta is None else args[0] + args[0] @ delta.float()

    handles = []
    for layer, module in enumerate(model.model.layers):
        gap = next((span for span in deltas if layer in span), None)
        if gap is None and layer not in more:
            continue
        delta = deltas[gap] if gap is not None and layer == gap.stop - 1 else None
        handles.append(
            module.register_forward_hook(lambda m, a, o, delta=delta: hook(m, a, o, delta))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def literal_streams(model: Any, ids: Tensor, deltas: dict[Span, Tensor] | None = None) -> Tensor:
    """The stream entering every layer and leaving the last, [boundaries, windows, tokens, hidden].

    Layers of gaps are there, and do what `skipping` makes of them.
    """
    seen: list[Tensor] = []
    places = [*model.model.layers, model.model.norm]
    handles = [place.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for place in places]
    with skipping(model, deltas or {}):
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def literal_ghost(x: Tensor, y: Tensor) -> Tensor:
    """The paper, written out: (X'X + 1e-6 I) M = X'(Y - X) in float64."""
    x, y = (stream.flatten(0, -2).double() for stream in (x, y))
    eps = 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(x.T @ x + eps, x.T @ (y - x))
