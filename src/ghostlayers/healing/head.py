"""The loss of a frozen head and its gradient in closed form, a chunk of positions at a time.

With logits z = h U^T of the student and the teacher, and their softmaxes q and p, the gradient of
KL(p || q) by the student's hidden states is (q - p) U, and that of the cross-entropy (q - y) U. So
nothing as large as the logits outlives its chunk, and no graph goes through the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ghostlayers.calibration.cuts import positions_at_once
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe.healing import Loss

Hidden = Float[Tensor, "positions hidden"]

AGREES = 1e-3
"""Relative difference of logits up to which a map of the head's products is the model's own."""


@dataclass(frozen=True)
class LogitMap:
    """What a family makes of its head's products z: scaled, and capped by c tanh(scaled z / c).

    Attributes:
        scale: of the products.
        cap: c; None where they are not capped.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """The logits, in float32."""
        scaled = products.float()
        scaled = scaled if self.scale == 1.0 else scaled * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """Derivative of the logits by the products, from the logits; None where it is one."""
        if self.cap is None:
            return None if self.scale == 1.0 else self.scale
        return self.scale * (1.0 - (logits / self.cap).square())


@dataclass(frozen=True)
class Head:
    """A frozen head: final hidden states to logits.

    Attributes:
        output: the module that multiplies hidden states with the vocabulary.
        logits_of: what comes behind it.
    """

    output: nn.Module
    logits_of: LogitMap

    @classmethod
    def of(cls, model: DenseModel) -> "Head | None":
        """The head of a model; None where its logits come about in some other way."""
        output = model.network.get_output_embeddings()
        whole = model.network.base_model is model.network  # it hands out no hidden states
        if output is None or whole or not isinstance(getattr(output, "weight", None), Tensor):
            return None
        known = _logit_map(model, output)
        return None if known is None else cls(output, known)

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.output.weight  # type: ignore[assignment]
        return weight

    @torch.no_grad()
    def logits(self, hidden: Hidden) -> Float[Tensor, "positions vocabulary"]:
        """The model's logits, in float32."""
        bias: Tensor | None = getattr(self.output, "bias", None)
        return self.logits_of(F.linear(hidden, self._weight, bias))

    @torch.no_grad()
    def loss(
        self,
        hidden: Hidden,
        teacher: Hidden | None,
        targets: Int[Tensor, " positions"],
        kind: Loss,
        weights: Float[Tensor, " positions"] | None = None,
    ) -> tuple[float, Hidden]:
        """The loss in nats, summed over positions, and its gradient by the hidden states.

        Args:
            hidden: the student's, behind the final norm.
            teacher: the dense model's; None where the loss does not ask for it.
            targets: the true next tokens.
            kind: which loss.
            weights: of each position; None where all are one.
        """
        total, gradient = 0.0, torch.empty_like(hidden)
        for part in self._chunks(len(hidden)):
            guide = None if teacher is None else self.logits(teacher[part])
            logits = self.logits(hidden[part])
            own = None if weights is None else weights[part]
            steepness = self.logits_of.slope(logits)
            loss, slope = logit_loss(logits, guide, targets[part], kind, own)
            total += loss
            slope = slope if steepness is None else slope.mul_(steepness)
            gradient[part] = slope.to(hidden.dtype) @ self._weight
        return total, gradient

    def _chunks(self, count: int) -> Iterator[slice]:
        step = positions_at_once(self._weight.shape[0], self._weight.device)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))


def logit_loss(
    logits: Float[Tensor, "positions vocabulary"],
    teacher: Float[Tensor, "positions vocabulary"] | None,
    targets: Int[Tensor, " positions"],
    kind: Loss,
    weights: Float[Tensor, " positions"] | None = None,
) -> tuple[float, Float[Tensor, "positions vocabulary"]]:
    """The loss summed over positions, and its gradient by the logits.

    Every pass over the vocabulary counts, so KL(p || q) is taken as a dot product of p with the
    difference of the logits, and the difference of their normalisers.

    Args:
        logits: the student's, float32.
        teacher: the dense model's, float32; overwritten.
        targets: the true next tokens.
        kind: ``kl``, ``ce``, or their sum.
        weights: of each position; None where all are one.
    """
    slope, normaliser = _softmax(logits)
    losses = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if kind == "kl+ce":
        slope.mul_(2.0)
    if kind in ("kl", "kl+ce"):
        assert teacher is not None
        p, theirs = _softmax(teacher)
        slope.sub_(p)
        losses += p.mul_(teacher.sub_(logits)).sum(dim=-1) - theirs + normaliser
    if kind in ("ce", "kl+ce"):
        losses += normaliser - logits.gather(1, targets[:, None])[:, 0]
        slope.scatter_add_(1, targets[:, None], torch.full_like(slope[:, :1], -1.0))
    if weights is not None:
        losses, slope = losses * weights, slope.mul_(weights[:, None])
    return float(losses.sum()), slope


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and log sum_v exp(logits): the largest logit and probability tell it."""
    q = torch.softmax(logits, dim=-1)
    return q, logits.amax(dim=-1) - q.amax(dim=-1).log()


@torch.no_grad()
def _logit_map(model: DenseModel, output: nn.Module) -> LogitMap | None:
    """What the model makes of its head's products, tried on some tokens."""
    some = torch.arange(8, device=model.device)[None] % model.network.config.vocab_size
    batch, stream = model.begin(some)
    wanted = model.logits(batch, stream)[0].float()
    products = output(model.final_states(batch, stream))[0].float()
    if products.shape != wanted.shape:
        return None
    cap = getattr(model.config, "final_logit_softcapping", None)
    before = wanted if cap is None else cap * torch.atanh((wanted / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    scale = float((products * before).sum() / products.square().sum().clamp_min(1e-30))
    allowed = max(AGREES, 2.0 * float(torch.finfo(model.dtype).eps))
    # Rounding alone makes another scale of one.
    nearest = LogitMap(1.0 if abs(scale - 1.0) < allowed else scale, cap)
    far = float((nearest(products) - wanted).norm())
    return nearest if far <= allowed * float(wanted.norm().clamp_min(1e-30)) else None
