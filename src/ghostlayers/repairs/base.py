"""What a repair is: the result of a closed-form fit across one gap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.errors import NonFiniteError
from ghostlayers.modeling import repair_stream
from ghostlayers.statistics import moments as sums
from ghostlayers.statistics.moments import Moments, residual_energy

Read = Callable[[str], Tensor]
"""Reads a feature by name, [..., width], at the gap where a repair acts."""

FEATURES: dict[str, str] = {
    "x": "the stream before the gap",
    "norm": "x / rms(x), without gains",
    "m": "the MLP output of the last kept layer before the gap",
    "z": "the input of the last kept MLP's output projection (with experts, their sum)",
    "o": "the input of the last kept attention's output projection",
    "phi": "the MLP hidden activations that the first removed layer computes from its norm of x",
    "one": "a constant",
}
"""What a repair can regress on."""

FROM_KEPT_LAYER = frozenset({"m", "z", "o"})
"""Features that the last kept layer before the gap computes."""


@dataclass(frozen=True)
class FitOptions:
    """How a fit is damped.

    Attributes:
        ridge: added to the diagonal of the Gram matrix after every feature was scaled to unit
            length, so it is dimensionless and the same for any model. Changes the answer. None
            chooses it by held-out windows.
        absolute_ridge: added to the diagonal of the Gram matrix as it is, as the paper does.
            Changes the answer where it is not small against the smallest eigenvalue.
        report_condition: compute the condition number, which costs more than the solve.
    """

    ridge: float | None = 1e-6
    absolute_ridge: float = 0.0
    report_condition: bool = True


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as a checkpoint in a type will hold them, in their own type.

    Raises:
        NonFiniteError: the type does not reach that far, or they are none.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "a repair gives NaN or infinity as weights: the model's own hold such numbers, most "
            "likely those of its embedding, norms or head, or are so large that sums over them "
            "leave the range of a float. Look for them there."
        )
    rounded = values.to(dtype).to(values.dtype)
    if not bool(torch.isfinite(rounded).all()):
        kind = str(dtype).removeprefix("torch.")
        largest = float(values.abs().max())
        raise NonFiniteError(
            f"a repair gives weights of up to {largest:.3g}, which {kind}, the type of the model's "
            "files, does not hold. Let held-out tokens damp the fit (:ridge=auto behind the "
            "repair's name), or start from the model in bfloat16 or float32."
        )
    return rounded


@dataclass(frozen=True)
class Operator:
    """A map of the stream at a gap, y = x + sum of terms.

    Attributes:
        parameters: as a checkpoint holds them and as `modeling.repair_stream` reads them.
        maps: B [width, hidden] by feature, for terms f B of features that need more than the
            stream; a checkpoint cannot hold these yet.
        eps: of ``norm``.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[str, Float[Tensor, "width hidden"]] = field(default_factory=dict)
    eps: float = 1e-6

    def __repr__(self) -> str:
        sizes = {name: list(t.shape) for name, t in {**self.parameters, **self.maps}.items()}
        return f"Operator({sizes})"

    def apply(self, stream: Tensor, read: Read | None = None) -> Tensor:
        """The repaired stream, computed in the stream's own type as the saved model does."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(device=stream.device, dtype=stream.dtype)

        parameters = {name: cast(value) for name, value in self.parameters.items()}
        repaired = repair_stream(stream, parameters, self.eps)
        for name, weight in self.maps.items():
            assert read is not None
            repaired = repaired + read(name).to(stream.dtype) @ cast(weight)
        return repaired

    def rounded(self, dtype: torch.dtype) -> "Operator":
        """The operator as a checkpoint in this type will hold it."""

        def round_off(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: rounded_once(value, dtype) for name, value in values.items()}

        return replace(self, parameters=round_off(self.parameters), maps=round_off(self.maps))

    @property
    def num_parameters(self) -> int:
        """Numbers that the operator holds, those of ``phi`` itself not counted."""
        return sum(tensor.numel() for tensor in (*self.parameters.values(), *self.maps.values()))


@dataclass(frozen=True)
class Fold:
    """A change of the MLP output projection of a kept layer, which costs nothing at run time.

    Attributes:
        layers_back: 1 is the last kept layer before the gap, 2 the one before it.
        delta: what the stream gets beside what the projection writes, a row map [z, hidden].
        bias: the same for its bias, where it has one, [hidden].
        gain: of the norm behind the projection, in the place of its own, [hidden]. ``delta`` is
            then what the projection gets, not what the stream does.
    """

    layers_back: int
    delta: Float[Tensor, "input hidden"]
    bias: Float[Tensor, " hidden"] | None = None
    gain: Float[Tensor, " hidden"] | None = None


@dataclass(frozen=True)
class Repair:
    """What is changed at one gap, and what its fit says about itself.

    Attributes:
        method: name of the method, with its arguments.
        operator: acts on the stream at the gap; None for none.
        folds: changes of kept layers before the gap.
        scale: the stream after the gap is to be multiplied by this; a checkpoint divides every
            later write by it instead, which later norms cannot tell apart.
        num_tokens: tokens it was fitted on.
        relative_residual: share of the discrepancy, in the fit's own metric, that is left on the
            fit tokens; 1 is what no repair leaves. None for a product of several fits.
        condition_number: of the damped and scaled Gram matrix; None where nothing was solved.
        ridge: the relative ridge used, where it was chosen.
    """

    method: str
    operator: Operator | None = None
    folds: tuple[Fold, ...] = ()
    scale: float = 1.0
    num_tokens: int = 0
    relative_residual: float | None = 1.0
    condition_number: float | None = None
    ridge: float | None = None

    def __repr__(self) -> str:
        left = "" if self.relative_residual is None else f", {self.relative_residual:.3f} left"
        return f"Repair({self.method!r}, {self.operator}, {len(self.folds)} folds{left})"

    @property
    def delta(self) -> Float[Tensor, "hidden hidden"] | None:
        """M of x -> x + x M, if that is all that the repair is."""
        if self.operator is None or set(self.operator.parameters) != {"weight"}:
            return None
        return None if self.operator.maps else self.operator.parameters["weight"].T

    @property
    def changes_something(self) -> bool:
        """Whether it is more than the bare cut."""
        return self.operator is not None or bool(self.folds) or self.scale != 1.0

    @property
    def reach(self) -> int:
        """Kept layers before the gap that the repair changes or reads."""
        back = [fold.layers_back for fold in self.folds]
        reads = self.operator is not None and FROM_KEPT_LAYER & set(self.operator.maps)
        return max([*back, 1 if reads else 0])

    @property
    def num_parameters(self) -> int:
        """Parameters that the repair adds to the model."""
        return 0 if self.operator is None else self.operator.num_parameters

    def rounded(self, dtype: torch.dtype) -> "Repair":
        """With the operator as stored; folds are rounded together with the weights they change."""
        return (
            self if self.operator is None else replace(self, operator=self.operator.rounded(dtype))
        )


def linear(delta: Tensor, bias: Tensor | None = None) -> Operator:
    """X -> x + x M (+ b)."""
    extra = {} if bias is None else {"bias": bias}
    return Operator({"weight": delta.T.contiguous(), **extra})


@dataclass(frozen=True)
class Needs:
    """What has to be gathered at a gap before a method can be fitted.

    Attributes:
        features: blocks of the Gram matrix.
        rotated: also the mean absolute values in a Hadamard basis.
        ratios: the ratios of mean absolute values of every window.
        basis: a Hadamard matrix of the hidden size must exist.
        pieces: numbers of clusters of tokens with moments of their own.
        tokens: the tokens themselves.
        held_out: moments of held-out windows too.
        others: features of other methods, whose products with these nobody wants.
    """

    features: tuple[str, ...] = ("x",)
    rotated: bool = False
    ratios: bool = False
    pieces: tuple[int, ...] = ()
    tokens: bool = False
    held_out: bool = False
    basis: bool = False
    others: tuple[frozenset[str], ...] = ()

    @property
    def together(self) -> tuple[frozenset[str], ...]:
        """Groups of features whose products are wanted."""
        return self.others or (frozenset(self.features),)

    def __or__(self, other: "Needs") -> "Needs":
        wanted = {*self.features, *other.features}
        return Needs(
            tuple(name for name in FEATURES if name in wanted),
            self.rotated or other.rotated,
            self.ratios or other.ratios,
            tuple(sorted({*self.pieces, *other.pieces})),
            self.tokens or other.tokens,
            self.held_out or other.held_out,
            self.basis or other.basis,
            tuple(dict.fromkeys((*self.together, *other.together))),
        )


@dataclass(frozen=True)
class Pieces:
    """Tokens grouped by the direction of their stream.

    Attributes:
        centroids: a token belongs to that of the largest product with it, [pieces, hidden].
        moments: of the tokens nearest to each.
        training: of those in the windows that a prior is fitted on, where it is chosen.
        held_out: of those in the windows that choose it.
    """

    centroids: Float[Tensor, "pieces hidden"]
    moments: tuple[Moments, ...]
    training: tuple[Moments, ...] = ()
    held_out: tuple[Moments, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """All fit tokens: stream before and after, and the last kept layer's MLP output."""

    source: Float[Tensor, "tokens hidden"]
    target: Float[Tensor, "tokens hidden"]
    features: Mapping[str, Float[Tensor, "tokens width"]]


@dataclass(frozen=True)
class Evidence:
    """What was gathered at a gap: all that a fit may know.

    Attributes:
        moments: of the features, of all fit tokens.
        training: those of the windows that a ridge is fitted on, where it is chosen.
        held_out: those of the windows that choose it.
        rotated: sums of |xH| and |yH| a rotated channel.
        ratios: means over windows of the ratio of mean |y| to mean |x|, a channel.
        rotated_ratios: the same of yH and xH.
        pieces: by their number.
        tokens: themselves.
        mlp_output: row map of the last kept layer's MLP output projection, [z, hidden].
        mlp_bias: its bias; None if it has none.
        eps: of the model's norms.
        expendable: nobody reads the Gram matrix after this fit, so that it may be used up.
    """

    moments: Moments
    training: Moments | None = None
    held_out: Moments | None = None
    rotated: tuple[Tensor, Tensor] | None = None
    ratios: Tensor | None = None
    rotated_ratios: Tensor | None = None
    pieces: Mapping[int, Pieces] = field(default_factory=dict)
    tokens: Tokens | None = None
    mlp_output: Tensor | None = None
    mlp_bias: Tensor | None = None
    eps: float = 1e-6
    expendable: bool = False

    def select(self, names: Sequence[str]) -> "Evidence":
        """The same evidence with moments of some features only.

        ``m`` is made from ``z`` where only that was gathered: it is a linear map of it.
        """
        whole = _select(self.moments, names, self.mlp_output, self.mlp_bias)

        def chosen(part: Moments | None) -> Moments | None:
            if part is None or part is self.moments:  # nothing was held out: one copy is enough
                return None if part is None else whole
            return _select(part, names, self.mlp_output, self.mlp_bias)

        return replace(
            self, moments=whole, training=chosen(self.training), held_out=chosen(self.held_out)
        )


def _select(
    moments: Moments, names: Sequence[str], output: Tensor | None, bias: Tensor | None
) -> Moments:
    if "m" not in names or "m" in sums.block_slices(moments.blocks):
        return sums.select(moments, names)
    assert output is not None
    before = sums.select(moments, ["z", *(n for n in (*names, "one") if n not in {"m", "z"})])
    widths = dict(before.blocks)
    places = sums.block_slices(before.blocks)
    columns, blocks = [], []
    for name in names:
        width = output.shape[1] if name == "m" else widths[name]
        column = output.new_zeros(before.gram.shape[0], width, dtype=sums.ACCUMULATOR)
        if name == "m":
            column[places["z"]] = output.to(sums.ACCUMULATOR)
            if bias is not None:
                column[places["one"]] = bias.to(sums.ACCUMULATOR)
        else:
            column[places[name]] = torch.eye(width, dtype=sums.ACCUMULATOR, device=column.device)
        columns.append(column)
        blocks.append((name, width))
    return sums.transform(before, torch.cat(columns, dim=1), tuple(blocks))


def linear_repair(
    name: str, evidence: Evidence, delta: Tensor, bias: Tensor | None = None
) -> Repair:
    """X -> x + x M (+ b), and what is left of the discrepancy.

    Args:
        name: of the method, with its arguments.
        evidence: of x, and with a bias of the constant; more features do no harm.
        delta: M, [hidden, hidden].
        bias: b, [hidden].
    """
    sums = evidence.select(("x",) if bias is None else ("x", "one")).moments
    whole = delta if bias is None else torch.cat([delta, bias[None]])
    left = relative_residual(sums, whole)
    return Repair(name, linear(delta, bias), num_tokens=sums.num_tokens, relative_residual=left)


def relative_residual(moments: Moments, delta: Float[Tensor, "features hidden"]) -> float:
    """Share of the discrepancy that a map from the moments' features leaves; 0 if there is none."""
    if moments.target_energy == 0.0:
        return 0.0
    return residual_energy(moments, delta) / moments.target_energy
