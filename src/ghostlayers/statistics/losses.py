"""Cross-entropy, divergence and agreement from logits: pure functions."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostlayers.errors import NonFiniteError

POSITIONS_PER_BLOCK = 64
"""Positions turned into float32 log-probabilities at a time: bounds memory, not the result."""

DRAFTED = 4
"""Tokens that a draft model proposes before the dense model verifies them, gamma."""


@dataclass(frozen=True)
class LossSums:
    """Sums over predicted tokens.

    Attributes:
        num_tokens: predictions.
        loss: cross-entropy of the true next token, in nats.
        kl: KL(reference || model), in nats; 0 where there is no reference.
        agreements: predictions whose most likely token is the reference's.
        variation: total variation distance of both distributions; 0 where there is no reference.
    """

    num_tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    variation: float = 0.0

    def __repr__(self) -> str:
        count = f"num_tokens={self.num_tokens}"
        return f"LossSums(loss_nats={self.loss_nats:.4f}, kl_nats={self.kl_nats:.4f}, {count})"

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums.of_row(self.row() + other.row())

    def row(self) -> Float[Tensor, "5"]:
        """The sums as numbers that are added up elsewhere, as many as `ROW`."""
        row = (self.num_tokens, self.loss, self.kl, self.agreements, self.variation)
        return torch.tensor(row, dtype=torch.float64)

    @classmethod
    def of_row(cls, row: Float[Tensor, "5"]) -> "LossSums":
        """From what became of `row`."""
        num_tokens, loss, kl, agreements, variation = row.tolist()
        return cls(int(num_tokens), loss, kl, int(agreements), variation)

    def to_dict(self) -> dict[str, float]:
        """Means a token, and their number, as plain values."""
        return {"num_tokens": self.num_tokens, "loss_nats": self.loss_nats, **self.divergences()}

    def divergences(self) -> dict[str, float]:
        """How far the predictions are from the reference's, as plain values."""
        return {
            "kl_nats": self.kl_nats,
            "greedy_agreement": self.agreement,
            "total_variation": self.total_variation,
            "acceptance": self.acceptance,
            "tokens_a_verification": tokens_a_verification(self.acceptance),
        }

    @property
    def loss_nats(self) -> float:
        """Mean cross-entropy a token."""
        return self.loss / max(self.num_tokens, 1)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss; infinite where that overflows."""
        return math.exp(self.loss_nats) if self.loss_nats < 700 else math.inf

    @property
    def kl_nats(self) -> float:
        """Mean divergence from the reference a token."""
        return self.kl / max(self.num_tokens, 1)

    @property
    def agreement(self) -> float:
        """Share of predictions that agree with the reference's."""
        return self.agreements / max(self.num_tokens, 1)

    @property
    def total_variation(self) -> float:
        """Mean of half of sum_v |p(v) - q(v)|, 0 to 1."""
        return self.variation / max(self.num_tokens, 1)

    @property
    def acceptance(self) -> float:
        """Chance that the reference keeps a token that the model has drafted.

        E sum_v min(p(v), q(v)), which is 1 minus the total variation distance. Leviathan, Kalman,
        Matias, Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
        """
        return 1.0 - self.total_variation


ROW = len(LossSums().row())
"""Numbers of `LossSums.row`."""


def tokens_a_verification(acceptance: float, drafted: int = DRAFTED) -> float:
    """Tokens that one pass of the reference gives, where a draft model proposes some before it.

    (1 - a^(drafted + 1)) / (1 - a), if each token is kept with the same chance a, whatever became
    of those before it (arXiv:2211.17192, eq. 1).

    Args:
        acceptance: a, 0 to 1.
        drafted: tokens proposed at a time.
    """
    return sum(acceptance**accepted for accepted in range(drafted + 1))


@dataclass(frozen=True)
class Reference:
    """The dense model's predictions, prepared once for comparing any number of others with them.

    Attributes:
        probabilities: [positions, vocabulary].
        entropies: in nats, [positions].
        words: the most likely ones, [positions].
    """

    probabilities: Float[Tensor, "positions vocabulary"]
    entropies: Float[Tensor, " positions"]
    words: Int[Tensor, " positions"]

    @classmethod
    def of(cls, logits: Float[Tensor, "positions vocabulary"]) -> "Reference":
        """From logits of any float type."""
        log_p = torch.log_softmax(logits.float(), dim=-1)
        words = log_p.argmax(dim=-1)
        probabilities = log_p.exp()
        return cls(probabilities, -torch.linalg.vecdot(probabilities, log_p), words)


def sum_losses(
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int[Tensor, " positions"],
    reference: Float[Tensor, "positions vocabulary"] | Reference | None = None,
) -> LossSums:
    """Sums over positions, each predicting its target.

    Args:
        logits: the model's, any float type.
        targets: the true next tokens.
        reference: the dense model's logits on the same positions, or what was made of them.

    Raises:
        NonFiniteError: the logits hold NaN or infinity.
    """
    sums = LossSums()
    whole = reference if isinstance(reference, Reference) else None
    for start in range(0, targets.shape[0], POSITIONS_PER_BLOCK):
        block = slice(start, start + POSITIONS_PER_BLOCK)
        if isinstance(reference, Tensor):
            against = Reference.of(reference[block])
        elif whole is not None:
            against = Reference(
                whole.probabilities[block], whole.entropies[block], whole.words[block]
            )
        else:
            against = None
        sums = sums + _sum_block(logits[block], targets[block], against)
    return sums


def token_losses(
    logits: Float[Tensor, "positions vocabulary"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """Cross-entropy of the true next token at every position, in nats."""
    losses = [
        torch.nn.functional.cross_entropy(block.float(), wanted, reduction="none")
        for block, wanted in zip(
            logits.split(POSITIONS_PER_BLOCK), targets.split(POSITIONS_PER_BLOCK), strict=True
        )
    ]
    joined = torch.cat(losses)
    _check_finite(float(joined.sum()))
    return joined


def _check_finite(sum_of_block: float) -> None:
    """Refuse losses that are no numbers where they are made: they would spoil every mean.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    if not math.isfinite(sum_of_block):
        raise NonFiniteError(
            "the model's logits hold NaN or infinity, so that it has no loss: check the weights of "
            "its final norm, head and embedding, or try --dtype float32."
        )


def _sum_block(logits: Tensor, targets: Tensor, reference: Reference | None) -> LossSums:
    """KL(p || q) = -H(p) - sum p log q, the sum a dot product that needs no copy."""
    wide = logits.float()
    log_q = wide - wide.logsumexp(dim=-1, keepdim=True)
    loss = float(-log_q.gather(1, targets[:, None]).double().sum())
    _check_finite(loss)
    if reference is None:
        return LossSums(targets.shape[0], loss)
    cross = -torch.linalg.vecdot(reference.probabilities, log_q)
    kl = float((cross - reference.entropies).double().sum().clamp_min(0.0))
    _check_finite(kl)
    agreements = int((reference.words == log_q.argmax(dim=1)).sum())
    apart = log_q.exp_().sub_(reference.probabilities).abs_().sum(dim=-1)
    variation = float(apart.double().sum()) / 2
    return LossSums(targets.shape[0], loss, kl, agreements, variation)
