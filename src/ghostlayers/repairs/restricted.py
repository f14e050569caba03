"""The best operators of restricted families, for the paper's theorem."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostlayers.repairs.base import Evidence, FitOptions, Needs, Repair, linear_repair
from ghostlayers.repairs.hadamard import hadamard
from ghostlayers.repairs.method import RepairMethod
from ghostlayers.statistics.moments import Moments


@dataclass(frozen=True)
class Restricted(RepairMethod):
    """The best linear map of a family, y = x + x M, by least squares.

    LinearPatch's scales come from ratios of absolute values, not from a fit, so a comparison with
    an unconstrained fit confounds the family with the way its member was chosen. Here each family
    gets its own optimum.

    Cost: one product of hidden x hidden a token.

    References:
        Ghosted Layers, arXiv:2605.15491, theorem 4.1 (the best operator is not symmetric).
    """

    source = "best of its family, for arXiv:2605.15491, theorem 4.1"
    stacks = True
    needs = Needs(("x",))

    @abstractmethod
    def best(self, sums: Moments) -> Float[Tensor, "hidden hidden"]:
        """M, from the moments of the stream."""

    def fit(self, evidence: Evidence, options: FitOptions) -> Repair:
        del options
        chosen = evidence.select(("x",))
        return linear_repair(self.name, chosen, self.best(chosen.moments))


@dataclass(frozen=True)
class Diagonal(Restricted):
    """The best diagonal operator by least squares.

    m_k = <x_k, d_k> / <x_k, x_k>.
    """

    keyword = "diagonal"

    def best(self, sums: Moments) -> Float[Tensor, "hidden hidden"]:
        return torch.diag(_ratio(sums.cross.diagonal(), sums.gram.diagonal()))


@dataclass(frozen=True)
class Hadamard(Restricted):
    """The best diagonal in the Hadamard basis by least squares.

    M = H diag(m) H', m fitted in the rotated basis, whose moments are H'GH and H'CH.
    """

    keyword = "hadamard"
    needs = Needs(("x",), basis=True)

    def best(self, sums: Moments) -> Float[Tensor, "hidden hidden"]:
        basis = hadamard(sums.gram.shape[0]).to(sums.gram.device)
        gram, cross = basis.T @ sums.gram @ basis, basis.T @ sums.cross @ basis
        return (basis * _ratio(cross.diagonal(), gram.diagonal())) @ basis.T


@dataclass(frozen=True)
class Symmetric(Restricted):
    """The best symmetric operator by least squares.

    Argmin over M = M' of ||X M - D||_W^2: G M + M G = C + C', in the eigenbasis of the Gram matrix
    G, a Sylvester equation.
    """

    keyword = "symmetric"

    def best(self, sums: Moments) -> Float[Tensor, "hidden hidden"]:
        values, vectors = torch.linalg.eigh(sums.gram)
        values = values.clamp_min(0.0)
        right = vectors.T @ (sums.cross + sums.cross.T) @ vectors
        total = values[:, None] + values
        # Pairs of directions in which there is no data leave M free: take none of it.
        floor = values[-1] * torch.finfo(values.dtype).eps * len(values)
        solved = torch.where(total > floor, right / total.clamp_min(floor), 0.0)
        back: Tensor = vectors @ solved @ vectors.T
        return back


@dataclass(frozen=True)
class Procrustes(Restricted):
    """The best rotation, with one scale.

    y = s x Q, Q orthogonal: U V' of the singular value decomposition of X'Y, s = tr S / tr G.

    References:
        Schoenemann, Psychometrika 31 (1966).
    """

    keyword = "procrustes"

    def best(self, sums: Moments) -> Float[Tensor, "hidden hidden"]:
        left, values, right = torch.linalg.svd(sums.gram + sums.cross)
        scale = values.sum() / sums.gram.trace()
        identity = torch.eye(left.shape[0], dtype=left.dtype, device=left.device)
        rotation: Tensor = scale * left @ right
        return rotation - identity


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(top.dtype).tiny), 0.0)
