r"""Sufficient statistics of a regression from the stream before a cut to the stream after it.

Everything that a closed-form repair needs of N tokens is a handful of sums. With features F
[tokens, features], the stream before the cut X and after it Y [tokens, hidden], D = Y - X and
token weights w:

    gram = F' diag(w) F,    cross = F' diag(w) D,    target_energy = tr D' diag(w) D

The sums are additive, so batches, processes and machines merge by addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ACCUMULATOR = torch.float64
"""All sums are kept in this type, whatever the model's own."""

TOKENS_PER_BLOCK = 2048
"""Tokens converted to float64 at a time: bounds the copy, not the result."""

COLUMNS_PER_BLOCK = 288
COLUMNS_PER_BLOCK_ON_ACCELERATOR = 1024
"""The Gram matrix is symmetric: only tiles of this width on and above its diagonal are summed.

Narrow tiles waste less of the diagonal, wide ones run faster: 288 is a fifth faster than 1,024 on a
processor with hidden sizes of 1,024 to 4,096 (``benchmarks/gram.py``)."""

TokenWeight = Literal["uniform", "balanced", "relative"]
"""How much each token counts in a fit; see `token_weights`."""

Blocks = tuple[tuple[str, int], ...]
"""Names and widths of groups of features, in the order of the Gram matrix's rows."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens; see the module's docstring for the letters.

    Attributes:
        num_tokens: tokens counted, padding excluded.
        total_weight: sum of the token weights.
        gram: F' W F, [features, features].
        cross: F' W D, [features, hidden].
        target_energy: sum of w ||d||^2.
        abs_source: unweighted sum of |x| a channel, [hidden].
        abs_target: unweighted sum of |y| a channel, [hidden].
        blocks: what the features are.
    """

    num_tokens: int
    total_weight: float
    gram: Float[Tensor, "features features"]
    cross: Float[Tensor, "features hidden"]
    target_energy: float
    abs_source: Float[Tensor, " hidden"]
    abs_target: Float[Tensor, " hidden"]
    blocks: Blocks = ()


class Accumulator:
    """Moments that grow in place: the Gram matrix of several thousand features is copied once.

    Args:
        blocks: names and widths of the features.
        hidden_size: channels of the stream.
        device: where the sums are kept.
        together: names of blocks whose products are wanted; by default all. Products that no group
            holds are left out, and stand as NaN in the Gram matrix so that no fit can use them.
    """

    def __init__(
        self,
        blocks: Blocks,
        hidden_size: int,
        device: torch.device | str | None = None,
        together: Sequence[frozenset[str]] | None = None,
    ) -> None:
        width = sum(size for _, size in blocks)
        self.blocks = blocks
        wide = torch.device(device or "cpu").type != "cpu"
        columns = COLUMNS_PER_BLOCK_ON_ACCELERATOR if wide else COLUMNS_PER_BLOCK
        everything = [frozenset(name for name, _ in blocks)]
        self._tiles = _tiles(blocks, together or everything, columns)
        self._all_products = len(self._tiles) == len(_tiles(blocks, everything, columns))
        self._totals = torch.zeros(3, dtype=ACCUMULATOR)
        self._upper = torch.zeros(width, width, dtype=ACCUMULATOR, device=device)
        self._cross = torch.zeros(width, hidden_size, dtype=ACCUMULATOR, device=device)
        self._abs = torch.zeros(2, hidden_size, dtype=ACCUMULATOR, device=device)

    def add(
        self,
        source: Float[Tensor, "tokens hidden"],
        target: Float[Tensor, "tokens hidden"],
        features: Sequence[Float[Tensor, "tokens _"]],
        weights: Float[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add tokens; ``features`` are the blocks in order."""
        for start in range(0, source.shape[0], TOKENS_PER_BLOCK):
            block = slice(start, start + TOKENS_PER_BLOCK)
            x, y = source[block].to(ACCUMULATOR), target[block].to(ACCUMULATOR)
            f = torch.cat([feature[block].to(ACCUMULATOR) for feature in features], dim=1)
            self._add_block(x, y, f, None if weights is None else weights[block].to(ACCUMULATOR))

    def _add_block(self, x: Tensor, y: Tensor, f: Tensor, w: Tensor | None) -> None:
        d = y - x
        # Weighting the left factor alone keeps F'WF = (WF)'F without a square root.
        weighted = f if w is None else f * w[:, None]
        energy = d.square().sum(dim=1)
        for rows, columns in self._tiles:
            self._upper[rows, columns].addmm_(weighted[:, rows].T, f[:, columns])
        self._cross.addmm_(weighted.T, d)
        self._abs[0] += x.abs().sum(dim=0)
        self._abs[1] += y.abs().sum(dim=0)
        weight = x.shape[0] if w is None else float(w.sum())
        energy_here = float(energy.sum() if w is None else torch.dot(energy, w))
        self._totals += torch.tensor([x.shape[0], weight, energy_here], dtype=ACCUMULATOR)

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves by name, not copies; they may be filled and added to."""
        return {
            "gram": self._upper,
            "cross": self._cross,
            "abs": self._abs,
            "totals": self._totals,
        }

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far."""
        return int(self._totals[0])

    def moments(self) -> Moments:
        """The sums so far, as a value of its own."""
        gram = torch.full_like(self._upper, float("nan"))
        for rows, columns in self._tiles:
            gram[rows, columns] = self._upper[rows, columns]
        return self._moments(_mirrored(gram, self._tiles), self._cross.clone())

    def finished(self) -> Moments:
        """The sums, without a copy: nothing may be added any more."""
        if not self._all_products:
            return self.moments()
        return self._moments(_mirrored(self._upper, self._tiles), self._cross)

    def _moments(self, gram: Tensor, cross: Tensor) -> Moments:
        return Moments(
            num_tokens=self.num_tokens,
            total_weight=float(self._totals[1]),
            gram=gram,
            cross=cross,
            target_energy=float(self._totals[2]),
            abs_source=self._abs[0].clone(),
            abs_target=self._abs[1].clone(),
            blocks=self.blocks,
        )


def _mirrored(gram: Tensor, tiles: Sequence[tuple[slice, slice]]) -> Tensor:
    """Fill what lies below the diagonal, in place."""
    for rows, columns in tiles:
        if rows != columns:
            gram[columns, rows] = gram[rows, columns].T
    return gram


def _tiles(
    blocks: Blocks, together: Sequence[frozenset[str]], columns: int
) -> list[tuple[slice, slice]]:
    """Rows and columns of the products that are wanted, on and above the diagonal."""
    pieces = [
        (name, slice(start, min(start + columns, place.stop)))
        for name, place in block_slices(blocks).items()
        for start in range(place.start, place.stop, columns)
    ]
    return [
        (rows, others)
        for index, (a, rows) in enumerate(pieces)
        for b, others in pieces[index:]
        if any({a, b} <= group for group in together)
    ]


def empty(
    blocks: Blocks | int, hidden_size: int, device: torch.device | str | None = None
) -> Moments:
    """Moments of no tokens; a number stands for that many features called ``x``."""
    named = (("x", blocks),) if isinstance(blocks, int) else blocks
    return Accumulator(named, hidden_size, device).moments()


def update(
    moments: Moments,
    source: Float[Tensor, "tokens hidden"],
    target: Float[Tensor, "tokens hidden"],
    *,
    features: Float[Tensor, "tokens features"] | None = None,
    weights: Float[Tensor, " tokens"] | None = None,
) -> Moments:
    """Add tokens to the moments.

    Args:
        moments: the sums so far.
        source: the stream before the cut, X.
        target: the stream after the cut, Y, same shape.
        features: what the repair regresses on; the source itself if not given.
        weights: one weight >= 0 a token; one each if not given.

    Returns:
        New moments; the argument is unchanged.
    """
    sums = Accumulator(moments.blocks, source.shape[1], source.device)
    sums.add(source, target, [source if features is None else features], weights)
    return merge(moments, sums.moments())


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the tokens of both.

    Raises:
        ValueError: they are of different features.
    """
    if a.blocks != b.blocks:
        raise ValueError(f"cannot merge moments of {a.blocks} and {b.blocks}.")
    return Moments(
        num_tokens=a.num_tokens + b.num_tokens,
        total_weight=a.total_weight + b.total_weight,
        gram=a.gram + b.gram,
        cross=a.cross + b.cross,
        target_energy=a.target_energy + b.target_energy,
        abs_source=a.abs_source + b.abs_source,
        abs_target=a.abs_target + b.abs_target,
        blocks=a.blocks,
    )


def select(moments: Moments, names: Sequence[str]) -> Moments:
    """Moments of some of the features, in the given order.

    Returns:
        The moments themselves where that is all of them in that order.

    Raises:
        KeyError: a block that was not gathered.
    """
    if tuple(names) == tuple(name for name, _ in moments.blocks):
        return moments
    places = block_slices(moments.blocks)
    index = torch.cat(
        [torch.arange(places[n].start, places[n].stop, device=moments.gram.device) for n in names]
    )
    return replace(
        moments,
        gram=moments.gram[index[:, None], index],
        cross=moments.cross[index],
        blocks=tuple((name, places[name].stop - places[name].start) for name in names),
    )


def block_slices(blocks: Blocks) -> dict[str, slice]:
    """Where each block lies among the features."""
    ends = list(accumulate(size for _, size in blocks))
    return {name: slice(end - size, end) for (name, size), end in zip(blocks, ends, strict=True)}


def transform(moments: Moments, matrix: Float[Tensor, "features new"], blocks: Blocks) -> Moments:
    """Moments of the features F T, from those of F: T'(F'WF)T and T'(F'WD)."""
    return replace(
        moments,
        gram=matrix.T @ moments.gram @ matrix,
        cross=matrix.T @ moments.cross,
        blocks=blocks,
    )


def shift_target(moments: Moments, share: float) -> Moments:
    """Moments of the same features with a share of the discrepancy as the target."""
    return replace(
        moments,
        cross=share * moments.cross,
        target_energy=share * share * moments.target_energy,
    )


def residual_energy(moments: Moments, weight: Float[Tensor, "features hidden"]) -> float:
    """Weighted squared error of a map from features to the difference.

    sum_t w_t ||d_t - f_t M||^2 = tr D'WD - 2 tr M'F'WD + tr M'F'WF M, from the moments alone.
    Rounding can make a perfect fit slightly negative; it is clamped at zero.
    """
    explained = 2.0 * torch.sum(weight * moments.cross)
    penalty = torch.sum(weight * (moments.gram @ weight))
    return max(0.0, moments.target_energy - float(explained) + float(penalty))


def relative_weights(target: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
    """One weight 1/||y||^2 a token: every token's *relative* error then counts alike.

    The next layer's norm divides each token by its own length, so that is the error it sees. A
    zero token has no direction to preserve and gets weight zero.
    """
    energy = target.to(ACCUMULATOR).square().sum(dim=-1)
    return torch.where(energy > 0, 1.0 / energy.clamp_min(torch.finfo(ACCUMULATOR).tiny), 0.0)


def token_weights(
    target: Float[Tensor, "tokens hidden"], kind: TokenWeight
) -> Float[Tensor, " tokens"] | None:
    """The weight of every token in a fit; None for one each.

    ``relative`` 1/||y||^2, ``balanced`` 1/||y||: a token that is a hundred times longer than the
    others, an attention sink for instance, then counts a hundred times as much as one of them in
    relative error, and a hundredth of what it counts in absolute error. Every later token attends
    to it, so it must not be lost; and no linear map creates it, so it must not take the whole fit.
    """
    if kind == "uniform":
        return None
    weights = relative_weights(target)
    return weights if kind == "relative" else weights.sqrt()


def products_of_a_token(blocks: Blocks, hidden_size: int) -> int:
    """Multiply-adds by which an `Accumulator` adds one token: X'X above the diagonal, and X'D."""
    tiles = _tiles(blocks, [frozenset(name for name, _ in blocks)], COLUMNS_PER_BLOCK)
    gram: int = sum((r.stop - r.start) * (c.stop - c.start) for r, c in tiles)
    return gram + sum(width for _, width in blocks) * hidden_size
