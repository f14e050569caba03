"""Cross-entropy, divergence and agreement from logits: pure functions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

POSITIONS_PER_BLOCK = 256
"""Positions turned into float32 log-probabilities at a time: bounds memory, not the result."""


@dataclass(frozen=True)
class LossSums:
    """Sums over predicted tokens.

    Attributes:
        num_tokens: predictions.
        loss: cross-entropy of the true next token, in nats.
        kl: KL(reference || model), in nats; 0 where there is no reference.
        agreements: predictions whose most likely token is the reference's.
    """

    num_tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agreements: int = 0

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(
            self.num_tokens + other.num_tokens,
            self.loss + other.loss,
            self.kl + other.kl,
            self.agreements + other.agreements,
        )

    @property
    def loss_nats(self) -> float:
        """Mean cross-entropy a token."""
        return self.loss / max(self.num_tokens, 1)

    @property
    def kl_nats(self) -> float:
        """Mean divergence from the reference a token."""
        return self.kl / max(self.num_tokens, 1)

    @property
    def agreement(self) -> float:
        """Share of predictions that agree with the reference's."""
        return self.agreements / max(self.num_tokens, 1)


def sum_losses(
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int[Tensor, " positions"],
    reference: Float[Tensor, "positions vocabulary"] | None = None,
) -> LossSums:
    """Sums over positions, each predicting its target.

    Args:
        logits: the model's, any float type.
        targets: the true next tokens.
        reference: the dense model's logits on the same positions.
    """
    sums = LossSums()
    for start in range(0, targets.shape[0], POSITIONS_PER_BLOCK):
        block = slice(start, start + POSITIONS_PER_BLOCK)
        other = None if reference is None else reference[block]
        sums = sums + _sum_block(logits[block], targets[block], other)
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
    return torch.cat(losses)


def _sum_block(logits: Tensor, targets: Tensor, reference: Tensor | None) -> LossSums:
    log_q = torch.log_softmax(logits.float(), dim=-1)
    loss = -log_q.gather(1, targets[:, None]).double().sum()
    if reference is None:
        return LossSums(targets.shape[0], float(loss))
    log_p = torch.log_softmax(reference.float(), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).double().sum()
    agreements = int((log_p.argmax(dim=1) == log_q.argmax(dim=1)).sum())
    return LossSums(targets.shape[0], float(loss), float(kl), agreements)
