"""Where a decoder layer writes into the residual stream: found out by name, proved by a probe.

Repairs that fold, and features of the kept layer before a gap, need to know which projection
writes last, and whether what it writes reaches the stream as it is. Names are much the same in all
families; whether they mean the same is tried on the model itself: a changed weight must show in the
layer's output as the product that it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ghostlayers.model.stream import LayerwiseModel, Stream
from ghostlayers.model.taps import Tap
from ghostlayers.modeling import norm_eps, unit_rms

MLP_OUTPUTS = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.fc2",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "feed_forward.down_proj",
    "ffn.down_proj",
    "feed_forward.w2",
    "fc2",
)
ATTENTION_OUTPUTS = (
    "self_attn.o_proj",
    "self_attn.dense",
    "self_attn.out_proj",
    "self_attention.dense",
    "attention.dense",
    "attn.out_proj",
    "attn.c_proj",
    "attn.attention.out_proj",
)
MLP_MODULES = ("mlp", "block_sparse_moe", "feed_forward", "moe", "ffn")
WRITERS = frozenset({"down_proj", "output_linear", "w2"})
"""Last projections of single experts, packed or not, and of those that all tokens pass."""

POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Norms between a layer's projections and the stream."""

MLP_NORMS = (
    "pre_feedforward_layernorm",
    "pre_ff_layernorm",
    "post_attention_layernorm",
    "feedforward_layernorm",
    "ffn_norm",
    "ln_mlp",
    "ln_2",
    "norm_2",
    "final_layer_norm",
    "input_layernorm",
    "ln_1",
)
"""Norms that may stand in front of the MLP."""

PROBE_TOKENS = 8
"""A product that holds for eight tokens of a random change holds for all: it is linear."""

TOLERANCE = 0.02
"""Largest share of a probe's effect that may be something else: rounding, in half precision."""


@dataclass(frozen=True)
class Anatomy:
    """Where the decoder layers of a model write.

    Attributes:
        mlp: path of the MLP; None where its projections lie in the layer itself.
        mlp_output: path of the projection by which the MLP writes.
        attention_output: path of the projection by which attention writes; None if not every layer
            has one that is known.
        mlp_norm: path of the norm that gives the MLP its input; None if none does.
        post_norms: paths of norms between those projections and the stream; where there are any, a
            linear map does not fold into the projections.
        mlp_post_norm: path of the one that normalises what the MLP's projection gives to its rms,
            applies a gain, and whose output is added to the stream as it is; None where there is
            none, or one that does anything else.
        gain_offset: what those norms add to their stored weight to get the gain.
        write_scale: factor between what the MLP's projection gives and what the stream receives.
        experts: many projections write, and `mlp_output` is the module whose output is their sum.
            A fold is a map of that sum, which goes into each of them.
        packed_inputs_first: packed experts hold their weights as [expert, input, hidden].
    """

    mlp: str | None
    mlp_output: str
    attention_output: str | None
    mlp_norm: str | None
    post_norms: tuple[str, ...] = ()
    mlp_post_norm: str | None = None
    gain_offset: float = 0.0
    write_scale: float = 1.0
    experts: bool = False
    packed_inputs_first: bool = False


def examine(model: LayerwiseModel) -> Anatomy | str:
    """The anatomy of a model's decoder layers, or why it is not known."""
    layers = list(model.layers)
    mlp_output = _shared_path(layers, MLP_OUTPUTS)
    if mlp_output is None:
        return _examine_experts(model, layers) or (
            f"not every {type(layers[0]).__name__} ends in projections that a repair could fold "
            "into"
        )
    mlp = mlp_output.rpartition(".")[0] or None
    kinds = _one_of_each_kind(layers)
    probes = [_Probe(model, index) for index in kinds]
    norms_before = {probe.norm_before(mlp) for probe in probes}
    mlp_norm = norms_before.pop() if len(norms_before) == 1 else None
    paths = (mlp, mlp_output, _shared_path(layers, ATTENTION_OUTPUTS), mlp_norm)
    for norms in POST_NORMS:
        if all(_shared_path(layers, (name,)) for name in norms):
            offset = _gain_offset(probes[0].layer.get_submodule(norms[0]))
            behind = all(probe.writes_through(norms[1], mlp_output, offset) for probe in probes)
            return Anatomy(*paths, norms, norms[1] if behind else None, offset)
    scales = {probe.write_scale(mlp_output) for probe in probes}
    reasons = [scale for scale in scales if isinstance(scale, str)]
    if reasons or len(scales) != 1:
        return (reasons or ["its layers write at different scales"])[0]
    return Anatomy(*paths, write_scale=float(scales.pop()))


def _examine_experts(model: LayerwiseModel, layers: Sequence[nn.Module]) -> Anatomy | None:
    """The anatomy where, in some layers at least, an MLP's output is a sum over experts."""
    module = _shared_path(layers, MLP_MODULES)
    if module is None or not all(writers(layer, f"{module}.") for layer in layers):
        return None
    probes = [_Probe(model, index) for index in _one_of_each_kind(layers)]
    attention = _shared_path(layers, ATTENTION_OUTPUTS)
    for inputs_first in (False, True):
        anatomy = Anatomy(
            None, module, attention, None, experts=True, packed_inputs_first=inputs_first
        )
        scales = {probe.sum_scale(anatomy) for probe in probes}
        if len(scales) == 1 and None not in scales:
            return replace(anatomy, write_scale=float(scales.pop() or 1.0))
    return None


def writers(layer: nn.Module, path: str = "") -> dict[str, Tensor]:
    """Weights and biases, by name, of all projections by which an MLP with experts writes.

    Without a path, those of the whole layer: some have an MLP for all tokens beside the experts.
    """
    parameters = {}
    for name, parameter in layer.named_parameters():
        last = name.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias")
        if name.startswith(path) and last.rpartition(".")[2] in WRITERS:
            parameters[name] = parameter.detach()
    return parameters


def mapped_writers(
    anatomy: Anatomy, layer: nn.Module, delta: Float[Tensor, "hidden hidden"]
) -> dict[str, Tensor]:
    """Those parameters after their sum m was to become m + m delta, each in its own type."""
    return {
        name: _mapped(anatomy, name, held, delta.to(held.device))
        for name, held in writers(layer, f"{anatomy.mlp_output}.").items()
    }


def _mapped(anatomy: Anatomy, name: str, held: Tensor, delta: Tensor) -> Tensor:
    """An expert at a time, because all of them in float64 may be gigabytes."""
    if held.ndim == 3 and not name.endswith("bias"):
        return torch.stack(
            [
                _mapped_one(expert, delta, outputs_last=anatomy.packed_inputs_first)
                for expert in held
            ]
        )
    return _mapped_one(held, delta, outputs_last=name.endswith("bias"))


def _mapped_one(held: Tensor, delta: Tensor, *, outputs_last: bool) -> Tensor:
    whole = held.double()
    added = whole @ delta if outputs_last else delta.T @ whole
    return (whole + added).to(held.dtype)


def _one_of_each_kind(layers: Sequence[nn.Module]) -> list[int]:
    """The first layer of every build: of every class, and of every set of modules within it."""
    first: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        first.setdefault(modules, index)
    return list(first.values())


def _shared_path(layers: Sequence[nn.Module], paths: Sequence[str]) -> str | None:
    """The first of the paths that leads to a module in every layer."""
    for path in paths:
        if all(_has(layer, path) for layer in layers):
            return path
    return None


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


@torch.no_grad()
def _gain_offset(norm: nn.Module) -> float:
    """0 or 1: what an RMS norm adds to its weight. A vector of ones has an rms of 1."""
    weight = norm.get_parameter("weight").detach()
    gain = norm(torch.ones_like(weight)[None])[0]
    return float(round(float((gain.float() - weight.float()).mean())))


class _Probe:
    """A few tokens in front of a decoder layer."""

    def __init__(self, model: LayerwiseModel, index: int) -> None:
        self.config = model.network.config
        self.index = index
        self.model = model
        ids = torch.arange(PROBE_TOKENS)[None] % self.config.vocab_size
        self.batch, self.stream = model.begin(ids)
        self.layer = model.layer(index)

    def norm_before(self, mlp: str | None) -> str | None:
        """The norm whose output is the MLP's input."""
        norms = [path for path in MLP_NORMS if _has(self.layer, path)]
        if mlp is None:
            return None
        taps = {mlp: Tap(), **{path: Tap(output=True) for path in norms}}
        self.model.run_layer(self.index, self.batch, self.stream, taps=taps.items())
        given = taps[mlp].value
        for path in norms:
            made = taps[path].value
            if given is not None and made is not None and torch.equal(given, made):
                return path
        return None

    def write_scale(self, path: str) -> float | str:
        """By how much the stream changes when the projection's output does: 1 in most families."""
        tap = Tap()
        before = self.model.run_layer(self.index, self.batch, self.stream, taps=[(path, tap)])
        effect, product = self._push(path, tap.caught(), before)
        if not bool(product.any()):
            return (
                f"'{path}' of layer {self.index} is given nothing but zeros, as where the weights "
                "before it are all zero, so that it cannot be told how it reaches the stream"
            )
        scale = float((effect * product).sum() / product.square().sum())
        rest = float((effect - scale * product).norm() / effect.norm().clamp_min(1e-30))
        if rest > TOLERANCE:
            return (
                f"what '{path}' writes does not reach the residual stream as it is (a norm or "
                "another module comes after it)"
            )
        return _known_scale(self.config, scale)

    def writes_through(self, norm: str, path: str, offset: float) -> bool:
        """Whether rms-norm(what the projection gives) times a gain is added to the stream."""
        if self.layer.get_submodule(path).bias is not None:
            return False
        taps = {"given": Tap(output=True), "taken": Tap(), "made": Tap(output=True)}
        places = zip((path, norm, norm), taps.values(), strict=True)
        before = self.model.run_layer(self.index, self.batch, self.stream, taps=[*places])
        seen = {name: tap.caught().flatten(0, -2).float() for name, tap in taps.items()}
        if not torch.equal(seen["given"], seen["taken"]):
            return False
        gain = self.layer.get_submodule(norm).get_parameter("weight").detach()
        expected = unit_rms(seen["taken"], norm_eps(self.config)) * (offset + gain.float())
        if _unlike(seen["made"], expected) > TOLERANCE:
            return False
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(gain.shape, generator=generator).to(gain)
        # Large beside the stream, so that rounding of the sum does not drown it.
        change *= 10.0 * before.float().square().mean().sqrt().to(gain)
        after = self.model.run_layer(
            self.index, self.batch, self.stream, weights={f"{norm}.weight": gain + change}
        )
        effect = (after.float() - before.float()).flatten(0, -2)
        product = unit_rms(seen["taken"], norm_eps(self.config)) * change.float()
        return _unlike(effect, product) <= TOLERANCE

    def _push(self, path: str, inputs: Tensor, before: Stream) -> tuple[Tensor, Tensor]:
        """Change the projection at random: the change of the layer's output, and of its own."""
        projection = self.layer.get_submodule(path)
        weight = projection.get_parameter("weight")
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(weight.shape, generator=generator).to(weight)
        rows = change if is_transposed(projection) else change.T
        product = inputs.flatten(0, -2).float() @ rows.float()
        # Large beside the stream, so that rounding of the sum does not drown it.
        size = 10.0 * float(before.float().norm() / product.norm().clamp_min(1e-30))
        changed = {f"{path}.weight": weight + size * change}
        after = self.model.run_layer(self.index, self.batch, self.stream, weights=changed)
        return (after.float() - before.float()).flatten(0, -2), size * product

    def sum_scale(self, anatomy: Anatomy) -> float | None:
        """By how much the stream changes when the sum over experts does; None if otherwise."""
        hidden = self.stream.shape[-1]
        packed = [
            weight
            for weight in writers(self.layer, f"{anatomy.mlp_output}.").values()
            if weight.ndim == 3
        ]
        if any(
            weight.shape[-1 if anatomy.packed_inputs_first else -2] != hidden for weight in packed
        ):
            return None
        tap, taken = Tap(output=True), self.stream
        before = self.model.run_layer(
            self.index, self.batch, taken, taps=[(anatomy.mlp_output, tap)]
        )
        written = tap.caught().flatten(0, -2).double()
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(hidden, hidden, generator=generator).double().to(written.device)
        product = written @ change
        # Large beside the stream, so that rounding of the sum does not drown it.
        size = 10.0 * float(before.double().norm() / product.norm().clamp_min(1e-30))
        changed = mapped_writers(anatomy, self.layer, size * change)
        after = self.model.run_layer(self.index, self.batch, taken, weights=changed)
        effect = (after.double() - before.double()).flatten(0, -2)
        scale = float((effect * product).sum() / product.square().sum()) / size
        rest = float((effect - scale * size * product).norm() / effect.norm().clamp_min(1e-30))
        return _known_scale(self.config, scale) if rest <= TOLERANCE else None


def _unlike(got: Tensor, expected: Tensor) -> float:
    """Distance, as a share of what was found."""
    return float((got - expected).norm() / got.norm().clamp_min(1e-30))


def _known_scale(config: Any, scale: float) -> float:
    for known in (1.0, getattr(config, "residual_multiplier", None)):
        if known is not None and abs(scale - known) < TOLERANCE * abs(known):
            return float(known)
    return scale


def is_transposed(projection: nn.Module) -> bool:
    """Whether a projection keeps its weight as [input, output], as GPT-2's does."""
    return type(projection).__name__ == "Conv1D"


def row_map(projection: nn.Module) -> Tensor:
    """The weight of a projection as a map of row vectors, [input, output]."""
    weight = projection.get_parameter("weight").detach()
    return weight if is_transposed(projection) else weight.T
