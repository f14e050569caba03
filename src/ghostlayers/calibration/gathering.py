"""What is gathered at one gap: the evidence that a repair is fitted from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostlayers.repairs.base import Evidence, Needs, Pieces, Tokens
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.repairs.linearpatch import channel_scales
from ghostlayers.statistics import moments
from ghostlayers.statistics.moments import Accumulator, TokenWeight

SAMPLED_TOKENS = 16_384
"""Tokens that clusters see."""

HELD_OUT_SHARE = 8
"""One window in so many chooses a ridge, where one is to be chosen."""


@dataclass(frozen=True)
class Layout:
    """What comes to a gap, known before it comes.

    Attributes:
        widths: channels of every feature, ``x`` (the stream) among them.
        num_windows: that will be added, by all processes together.
        window_tokens: tokens of each.
        dtype: of the stream.
        device: where it comes.
    """

    widths: Mapping[str, int]
    num_windows: int
    window_tokens: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @property
    def num_tokens(self) -> int:
        """Tokens that come, by all processes together."""
        return self.num_windows * self.window_tokens

    @property
    def num_sampled(self) -> int:
        """Tokens that clusters see: the first ones."""
        return min(SAMPLED_TOKENS, self.num_tokens)


class Gatherer:
    """Grows the evidence for one gap, some windows at a time, in any order.

    Args:
        needs: what the methods to be fitted want.
        layout: of what comes.
        token_weight: how much each token counts.
        centroids: by number of pieces.
        share: of the discrepancy that is the target.
    """

    def __init__(
        self,
        needs: Needs,
        layout: Layout,
        *,
        token_weight: TokenWeight,
        centroids: Mapping[int, Tensor] | None = None,
        share: float = 1.0,
    ) -> None:
        self.features = gathered_features(needs)
        self._needs, self._token_weight, self._share = needs, token_weight, share
        self._layout = layout
        self._centroids = dict(centroids or {})
        hidden, device = layout.widths["x"], layout.device
        blocks = tuple((name, layout.widths[name]) for name in self.features)
        parts = 2 if needs.held_out else 1
        groups = _groups(needs, self.features)
        self._sums = [Accumulator(blocks, hidden, device, groups) for _ in range(parts)]
        stream = (("x", hidden),)
        self._pieces = {
            count: [[Accumulator(stream, hidden, device) for _ in range(count)] for _ in self._sums]
            for count in self._centroids
        }
        bases = (False, True) if needs.rotated else (False,)
        self._rotated = torch.zeros(2, hidden, dtype=moments.ACCUMULATOR, device=device)
        self._ratios = {
            rotated: torch.zeros(hidden, dtype=moments.ACCUMULATOR, device=device)
            for rotated in (bases if needs.ratios else ())
        }
        self._token_rows = self._room_for_tokens() if needs.tokens else {}

    def _room_for_tokens(self) -> dict[str, Tensor]:
        """Rows that are filled in their places, so that those of all processes add up."""
        names = ("source", "target", *(name for name in self.features if name == "m"))
        shape = (self._layout.num_tokens, self._layout.widths["x"])
        dtype, device = self._layout.dtype, self._layout.device
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """See `passes.Sums`."""
        tensors = {f"kept.{name}": rows for name, rows in self._token_rows.items()}
        if self._needs.rotated:
            tensors["rotated"] = self._rotated
        tensors.update({f"ratios.{int(basis)}": ratios for basis, ratios in self._ratios.items()})
        named = {f"sums.{part}": sums for part, sums in enumerate(self._sums)}
        for count, lists in self._pieces.items():
            for part, pieces in enumerate(lists):
                named.update({f"{count}.{part}.{i}": piece for i, piece in enumerate(pieces)})
        for prefix, sums in named.items():
            tensors.update({f"{prefix}.{name}": tensor for name, tensor in sums.tensors().items()})
        return tensors

    def add(
        self,
        first: int,
        source: Tensor,
        target: Tensor,
        features: Mapping[str, Tensor],
        weights: Tensor | None = None,
    ) -> None:
        """Add whole windows.

        Args:
            first: number of the first of them.
            source: the stream before the gap, [tokens, hidden].
            target: the stream behind it.
            features: by name, [tokens, width].
            weights: of the tokens, where they are not the target's, [tokens].
        """
        if weights is None:
            weights = moments.token_weights(target, self._token_weight)
        for part, rows in enumerate(self._parts(first, len(source))):
            if rows is None:
                self._add(part, source, target, features, weights)
            elif len(rows):
                here = rows.to(source.device)
                some = {name: feature[here] for name, feature in features.items()}
                own = None if weights is None else weights[here]
                self._add(part, source[here], target[here], some, own)
        if self._needs.rotated or self._ratios:
            self._add_scales(source, target)
        if self._token_rows:
            self._keep(first * self._layout.window_tokens, source, target, features)

    def _parts(self, first: int, count: int) -> list[Tensor | None]:
        """Which tokens the fit sees, and which choose a ridge; None for all of them."""
        if not self._needs.held_out:
            return [None]
        windows = first + torch.arange(count) // self._layout.window_tokens
        chooses = windows % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
        return [torch.nonzero(~chooses)[:, 0], torch.nonzero(chooses)[:, 0]]

    def _add(
        self,
        part: int,
        source: Tensor,
        target: Tensor,
        features: Mapping[str, Tensor],
        weights: Tensor | None,
    ) -> None:
        blocks = [features[name] for name in self.features]
        self._sums[part].add(source, target, blocks, weights)
        for count, centroids in self._centroids.items():
            _add_pieces(self._pieces[count][part], centroids, source, target, weights)

    def _add_scales(self, source: Tensor, target: Tensor) -> None:
        """Absolute values in the Hadamard basis, and every window's ratios of them."""
        kinds = dict.fromkeys((*self._ratios, self._needs.rotated))
        bases = {
            rotated: hadamard(source.shape[1]).to(source.device) if rotated else None
            for rotated in kinds
        }
        for start in range(0, len(source), self._layout.window_tokens):
            window = slice(start, start + self._layout.window_tokens)
            pair = torch.stack([source[window].double(), target[window].double()])
            for rotated, basis in bases.items():
                sums = (pair if basis is None else pair @ basis).abs().sum(dim=1)
                if rotated:
                    self._rotated += sums
                if rotated in self._ratios:
                    self._ratios[rotated] += channel_scales(sums[0], sums[1])

    def _keep(
        self, place: int, source: Tensor, target: Tensor, features: Mapping[str, Tensor]
    ) -> None:
        given = {"source": source, "target": target, **features}
        for name, rows in self._token_rows.items():
            stretch = rows[place : place + len(source)]
            stretch.copy_(given[name][: len(stretch)])

    def evidence(self, eps: float, output: tuple[Tensor, Tensor | None] | None = None) -> Evidence:
        """Everything so far; ``output`` is the last kept layer's MLP output projection."""
        training, *rest = (sums.finished() for sums in self._sums)
        held_out = rest[0] if rest and rest[0].num_tokens else None
        whole = training if held_out is None else moments.merge(training, held_out)
        pieces = {
            count: _pieces(self._centroids[count], *sums) for count, sums in self._pieces.items()
        }
        evidence = Evidence(
            moments=whole,
            training=training,
            held_out=training if held_out is None else held_out,
            rotated=(self._rotated[0], self._rotated[1]) if self._needs.rotated else None,
            ratios=self._mean_ratios(rotated=False),
            rotated_ratios=self._mean_ratios(rotated=True),
            pieces=pieces,
            tokens=self._tokens(),
            mlp_output=None if output is None else output[0],
            mlp_bias=None if output is None else output[1],
            eps=eps,
        )
        return evidence if self._share == 1.0 else _with_share(evidence, self._share)

    def _mean_ratios(self, *, rotated: bool) -> Tensor | None:
        total = self._ratios.get(rotated)
        return None if total is None else total / self._layout.num_windows

    def _tokens(self) -> Tokens | None:
        if not self._token_rows:
            return None
        features = {name: rows for name, rows in self._token_rows.items() if name == "m"}
        return Tokens(self._token_rows["source"], self._token_rows["target"], features)


def _add_pieces(
    sums: Sequence[Accumulator],
    centroids: Tensor,
    source: Tensor,
    target: Tensor,
    weights: Tensor | None,
) -> None:
    nearest = (source @ centroids.to(source.dtype).T).argmax(dim=1)
    for index, piece in enumerate(sums):
        members = nearest == index
        if bool(members.any()):
            x = source[members]
            piece.add(x, target[members], [x], None if weights is None else weights[members])


def _pieces(
    centroids: Tensor, training: Sequence[Accumulator], held_out: Sequence[Accumulator] = ()
) -> Pieces:
    fit = tuple(sums.finished() for sums in training)
    if not held_out:
        return Pieces(centroids, fit, fit, fit)
    choose = tuple(sums.finished() for sums in held_out)
    whole = tuple(moments.merge(*pair) for pair in zip(fit, choose, strict=True))
    return Pieces(centroids, whole, fit, choose)


def _with_share(evidence: Evidence, share: float) -> Evidence:
    """The same tokens with a share of the discrepancy as the target."""
    assert evidence.training is not None
    assert evidence.held_out is not None
    return replace(
        evidence,
        moments=moments.shift_target(evidence.moments, share),
        training=moments.shift_target(evidence.training, share),
        held_out=moments.shift_target(evidence.held_out, share),
    )


def gathered_features(needs: Needs) -> tuple[str, ...]:
    """The blocks that are summed.

    The stream where nothing else is asked for, and ``m`` only where it cannot be made from ``z``.
    """
    names = needs | Needs(("x",)) if not needs.features else needs
    wanted = list(names.features)
    if "m" in wanted and "z" in wanted and not needs.tokens:
        wanted.remove("m")
        if "one" not in wanted:
            wanted.append("one")
    return tuple(wanted)


def _groups(needs: Needs, gathered: Sequence[str]) -> list[frozenset[str]]:
    """Features whose products are wanted; ``z`` where it stands for ``m``."""
    stands_in = {} if "m" in gathered else {"m": "z"}
    groups = [frozenset(stands_in.get(name, name) for name in group) for group in needs.together]
    return [(group or frozenset({"x"})) | {"one"} for group in groups]
