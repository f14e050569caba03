"""Reading what a repair regresses on: the stream, and what the layers beside the gap compute."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghostlayers.errors import InputError, WindowError
from ghostlayers.model.anatomy import Anatomy, row_map, writers
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.stream import Stream
from ghostlayers.model.taps import Tap, tapped
from ghostlayers.modeling import norm_eps, unit_rms
from ghostlayers.repairs.base import FEATURES, FROM_KEPT_LAYER, Repair
from ghostlayers.repairs.hadamard import construction, hadamard
from ghostlayers.repairs.method import RepairMethod
from ghostlayers.spans import Span


def check_method(model: DenseModel, method: RepairMethod, spans: Iterable[Span] = ()) -> None:
    """Refuse a repair that needs what the model does not have.

    Args:
        model: the dense model.
        method: the repair.
        spans: the gaps, where they are known.

    Raises:
        InputError: the message names the repair, the feature and what works instead.
    """
    if method.needs.basis:
        hadamard(model.hidden_size)
    wanted = [name for name in method.features if name in FROM_KEPT_LAYER or name == "phi"]
    for name in wanted:
        reason = _missing(model, name, through_norm=method.through_norm)
        if reason:
            raise InputError(
                f"repair '{method.name}' reads {name} ({FEATURES[name]}), but {reason}. Use ghost, "
                f"normed, joint:x+norm or piecewise{_or_refit(model)}."
            )
    if method.scales:
        _check_scaling(model, method)
    for span in spans:
        if span.start == 0 and method.reach:
            raise InputError(
                f"repair '{method.name}' changes or reads the kept layer before a gap, and before "
                f"layer 0 there is none (the cut {span} starts there). Use ghost, or keep layer 0."
            )


def basis_note(model: DenseModel, method: RepairMethod) -> str | None:
    """What to say of a Hadamard basis that is not the authors' own; None where there is nothing."""
    size = int(model.hidden_size)
    if not method.needs.basis or construction(size) != "Paley":
        return None
    return (
        f"{method.name}: the tables of the authors' code reach no hidden size of {size}; a basis "
        "of Paley's construction stands in, and the result depends on which basis it is."
    )


def _or_refit(model: DenseModel) -> str:
    anatomy = model.anatomy_or_reason
    fits = isinstance(anatomy, Anatomy) and anatomy.mlp_post_norm
    return ", or refit, which fits that norm too" if fits else ""


def refits_through_norm(model: DenseModel, method: RepairMethod) -> bool:
    """Whether a method's stages fit a projection together with the norm behind it."""
    if not method.through_norm:
        return False
    anatomy = model.anatomy_or_reason
    return isinstance(anatomy, Anatomy) and anatomy.mlp_post_norm is not None


def _missing(model: DenseModel, name: str, *, through_norm: bool = False) -> str | None:
    """Why a model lacks a feature; None if it has it."""
    anatomy = model.anatomy_or_reason
    if isinstance(anatomy, str):
        return anatomy
    if name in FROM_KEPT_LAYER and anatomy.post_norms:
        if through_norm and anatomy.mlp_post_norm:
            return None
        return (
            f"models of type '{model.network.config.model_type}' put a norm between that "
            "projection and the stream, so no linear map can be folded into it"
        )
    if name == "o" and anatomy.attention_output is None:
        return "it is not known through which projection its attention writes"
    if name == "phi" and not _reads_the_norm_alone(model, anatomy):
        return "its MLP is not a module that reads the norm of the stream and nothing else"
    return None


def _reads_the_norm_alone(model: DenseModel, anatomy: Anatomy) -> bool:
    if anatomy.mlp is None or anatomy.mlp_norm is None:
        return False
    mlp = model.layers[0].get_submodule(anatomy.mlp)
    given = inspect.signature(mlp.forward).parameters.values()
    return sum(parameter.default is inspect.Parameter.empty for parameter in given) == 1


def _check_scaling(model: DenseModel, method: RepairMethod) -> None:
    anatomy = model.anatomy_or_reason
    reason = anatomy if isinstance(anatomy, str) else None
    if isinstance(anatomy, Anatomy) and not anatomy.post_norms and not anatomy.attention_output:
        reason = "it is not known through which projection its attention writes"
    if reason:
        raise InputError(
            f"repair '{method.name}' rescales what every later layer writes, but {reason}. Use "
            "linearpatch-diag or ghost."
        )


def feature_widths(model: DenseModel, names: Iterable[str], layer: int = 0) -> dict[str, int]:
    """Columns of each of the features, those of a layer's projections as in the given layer."""
    return {name: _width(model, name, layer) for name in names}


def _width(model: DenseModel, name: str, layer: int) -> int:
    if name == "one":
        return 1
    if name not in {"z", "phi", "o"}:
        return int(model.hidden_size)
    anatomy = model.anatomy
    if anatomy.experts and name == "z":
        return int(model.hidden_size)
    path = anatomy.attention_output if name == "o" else anatomy.mlp_output
    return row_map(model.layers[layer].get_submodule(path or "")).shape[0]


def check_fit_tokens(model: DenseModel, method: RepairMethod, num_tokens: int) -> None:
    """Refuse to fit more unknowns a channel than there are calibration tokens.

    Raises:
        WindowError: the message says how many tokens are needed.
    """
    if not method.solves:
        return
    needed = max(
        sum(feature_widths(model, needs.features).values())
        for needs in (method.needs, *(stage.needs for stage in method.before))
    )
    if num_tokens < needed:
        raise WindowError(
            f"the fit windows hold {num_tokens} tokens; repair '{method.name}' solves for {needed} "
            "unknowns a channel and needs at least as many tokens, better ten times as many. Raise "
            "--fit-windows (and --windows) or --sequence-length."
        )


def tap_places(model: DenseModel, names: Iterable[str]) -> dict[str, tuple[str, Tap]]:
    """For features that the last kept layer computes: the module's path, and a tap."""
    wanted = FROM_KEPT_LAYER & set(names)
    if not wanted:
        return {}
    anatomy = model.anatomy
    places = {
        "z": (anatomy.mlp_output, Tap(output=anatomy.experts)),
        "m": (anatomy.mlp_output, Tap(output=True)),
        "o": (anatomy.attention_output or "", Tap()),
    }
    return {name: places[name] for name in sorted(wanted)}


def writing_places(model: DenseModel) -> dict[str, tuple[str, Tap]]:
    """Where an MLP writes through a norm: the projection's input z, and the norm's output."""
    anatomy = model.anatomy
    assert anatomy.mlp_post_norm is not None
    return {
        "z": (anatomy.mlp_output, Tap()),
        "written": (anatomy.mlp_post_norm, Tap(output=True)),
    }


def stream_feature(model: DenseModel, name: str, stream: Stream, span: Span) -> Tensor:
    """A feature that can be computed from the stream before the gap."""
    if name == "x":
        return stream
    if name == "one":
        return stream.new_ones(*stream.shape[:-1], 1)
    if name == "norm":
        return unit_rms(stream, norm_eps(model.network.config))
    return first_removed_activations(model.layer(span.start), model.anatomy, stream)


def first_removed_activations(layer: nn.Module, anatomy: Anatomy, stream: Stream) -> Tensor:
    """phi: what the first removed layer's MLP would compute from its norm of the stream."""
    assert anatomy.mlp is not None
    assert anatomy.mlp_norm is not None
    tap = Tap()
    mlp = layer.get_submodule(anatomy.mlp)
    inner = anatomy.mlp_output.removeprefix(f"{anatomy.mlp}.")
    with tapped(mlp, [(inner, tap)]):
        mlp(layer.get_submodule(anatomy.mlp_norm)(stream))
    return tap.caught()


def mlp_output_of(model: DenseModel, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A layer's MLP output projection as a row map [z, hidden], and its bias.

    With experts there is no one projection: z is their sum, which is written as it is.
    """
    anatomy = model.anatomy
    if anatomy.experts:
        some = next(iter(writers(layer).values()))
        return torch.eye(model.hidden_size, dtype=some.dtype, device=some.device), None
    projection: Any = layer.get_submodule(anatomy.mlp_output)
    return row_map(projection), None if projection.bias is None else projection.bias.detach()


def caught(taps: Mapping[str, tuple[str, Tap]], stream: Stream) -> dict[str, Tensor]:
    """The tapped features, shaped like the stream: some families flatten it inside a layer."""
    return {name: tap.caught().reshape(*stream.shape[:-1], -1) for name, (_, tap) in taps.items()}


def reader(
    model: DenseModel, stream: Stream, span: Span, tapped: Mapping[str, Tensor]
) -> Callable[[str], Tensor]:
    """Reads features at a gap: tapped ones, or computed from the stream."""

    def read(name: str) -> Tensor:
        return tapped[name] if name in tapped else stream_feature(model, name, stream, span)

    return read


def act(repair: Repair, stream: Stream, read: Callable[[str], Tensor] | None = None) -> Stream:
    """What a repair does to the stream at its gap; folds have acted before."""
    if repair.scale != 1.0:
        stream = stream * repair.scale
    return stream if repair.operator is None else repair.operator.apply(stream, read)
