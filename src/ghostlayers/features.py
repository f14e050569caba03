"""Reading what a repair regresses on: the stream, and what the layers beside the gap compute."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ghostlayers.errors import InputError, WindowError
from ghostlayers.families import FAMILIES, Family
from ghostlayers.modeling import norm_eps, unit_rms
from ghostlayers.repairs.base import FEATURES, FROM_KEPT_LAYER, Method
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.spans import Span
from ghostlayers.stream import LayerwiseModel, Stream, Tap, find_decoder_layers, tapped


def check_method(model: Any, method: Method, spans: Iterable[Span] = ()) -> None:
    """Refuse a repair that needs what the model does not have.

    Args:
        model: the dense model.
        method: the repair.
        spans: the gaps, where they are known.

    Raises:
        InputError: the message names the repair, the feature and what works instead.
    """
    if method.needs.basis:
        hadamard(model.config.hidden_size)
    wanted = [name for name in method.features if name in FROM_KEPT_LAYER or name == "phi"]
    if not wanted:
        return
    family = FAMILIES.get(model.config.model_type)
    for name in wanted:
        reason = _missing(family, name, model.config.model_type)
        if reason:
            raise InputError(
                f"repair '{method.name}' reads {name} ({FEATURES[name]}), but {reason}. Use ghost, "
                "normed, joint:x+norm or piecewise."
            )
    for span in spans:
        if span.start == 0 and method.reach:
            raise InputError(
                f"repair '{method.name}' changes or reads the kept layer before a gap, and before "
                f"layer 0 there is none (the cut {span} starts there). Use ghost, or keep layer 0."
            )


def _missing(family: Family | None, name: str, model_type: str) -> str | None:
    """Why a family lacks a feature; None if it has it."""
    if family is None:
        return f"it is not known where models of type '{model_type}' keep it"
    if name in FROM_KEPT_LAYER and family.post_norms:
        return (
            f"models of type '{model_type}' put a norm between that projection and the stream, so "
            "nothing can be folded into it"
        )
    return None


def feature_widths(model: Any) -> dict[str, int]:
    """Columns of every feature that the model has, by name."""
    hidden = model.config.hidden_size
    widths = {"x": hidden, "norm": hidden, "m": hidden, "one": 1}
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return widths
    layer = find_decoder_layers(model)[0]
    inner = layer.get_parameter(f"{family.mlp_output}.weight").shape[1]
    heads = layer.get_parameter(f"{family.attention_output}.weight").shape[1]
    return {**widths, "z": inner, "phi": inner, "o": heads}


def check_fit_tokens(model: Any, method: Method, num_tokens: int) -> None:
    """Refuse to fit more unknowns a channel than there are calibration tokens.

    Raises:
        WindowError: the message says how many tokens are needed.
    """
    if not method.solves:
        return
    widths = feature_widths(model)
    needed = max(
        sum(widths[name] for name in needs.features)
        for needs in (method.needs, *(stage.needs for stage in method.before))
    )
    if num_tokens < needed:
        raise WindowError(
            f"the fit windows hold {num_tokens} tokens; repair '{method.name}' solves for {needed} "
            "unknowns a channel and needs at least as many tokens, better ten times as many. Raise "
            "--fit-windows (and --windows) or --sequence-length."
        )


def tap_places(model: Any, names: Iterable[str]) -> dict[str, tuple[str, Tap]]:
    """For features that the last kept layer computes: the module's path, and a tap."""
    wanted = FROM_KEPT_LAYER & set(names)
    if not wanted:
        return {}
    family = FAMILIES[model.config.model_type]
    places = {
        "z": (family.mlp_output, Tap()),
        "m": (family.mlp, Tap(output=True)),
        "o": (family.attention_output, Tap()),
    }
    return {name: places[name] for name in sorted(wanted)}


def stream_feature(model: LayerwiseModel, name: str, stream: Stream, span: Span) -> Tensor:
    """A feature that can be computed from the stream before the gap."""
    if name == "x":
        return stream
    if name == "one":
        return stream.new_ones(*stream.shape[:-1], 1)
    if name == "norm":
        return unit_rms(stream, norm_eps(model.model.config))
    family = FAMILIES[model.model.config.model_type]
    return first_removed_activations(model.layers[span.start], family, stream)


def first_removed_activations(layer: Any, family: Family, stream: Stream) -> Tensor:
    """phi: what the first removed layer's MLP would compute from its norm of the stream."""
    tap = Tap()
    mlp = layer.get_submodule(family.mlp)
    inner = family.mlp_output.removeprefix(f"{family.mlp}.")
    with tapped(mlp, {inner: tap}):
        mlp(layer.get_submodule(family.mlp_norm)(stream))
    return tap.caught()


def mlp_output_of(model: Any, layer: Any) -> tuple[Tensor, Tensor | None]:
    """A layer's MLP output projection as a row map [z, hidden], and its bias."""
    projection = layer.get_submodule(FAMILIES[model.config.model_type].mlp_output)
    return (
        projection.weight.detach().T,
        None if projection.bias is None else projection.bias.detach(),
    )


def caught(taps: Mapping[str, tuple[str, Tap]]) -> dict[str, Tensor]:
    """The tapped features."""
    return {name: tap.caught() for name, (_, tap) in taps.items()}
