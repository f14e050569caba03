r"""Layers to remove from clusters of similar layers (LoRP, arXiv:2605.27786).

S [L, L] is the token-mean cosine of the inputs of every two layers (eq. 3 and 4). Its mean off the
diagonal gives the Representation Locality Score, RLS = -log2(mean) (eq. 5 and 6), which chooses the
number of clusters; spectral clustering on (S + 1) / 2 (eq. 7) makes them; then layers go one by
one, first the most redundant one of each cluster, then always one of the cluster that remains most
similar in itself (eq. 8 to 11). What the paper leaves open is read as its released code does:

- A layer's redundancy is its mean S with all *other* members of its cluster, removed and protected
  ones included, and is computed once: removing layers does not change the order within a cluster.
- A cluster's remaining mean is that of S over pairs of its members that are left, protected ones
  included. A cluster of fewer than two is last.
- Clusters are numbered by their first layer; the first round visits them in that order, and equal
  means go to the lower number.
- Layers 0 and L - 1 are never removed, but are clustered.

The code clusters with scikit-learn. Here it is written out, and free of chance: k-means starts from
every layer in turn (the other centres being the farthest ones), moves one layer at a time, and
keeps the tightest result.
"""

import math
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

LOCAL = 1.0
"""RLS from which on redundancy is local: two clusters."""

MIXED = 0.7
"""RLS from which on there are three clusters; below, four."""

TIED = 1e-12
"""A move that lowers the sum of squared distances by less is not made."""


def locality(similarity: Float[Tensor, "layers layers"]) -> float:
    """RLS = -log2(mean of S above the diagonal); infinite where that mean is not positive."""
    count = similarity.shape[0]
    above = similarity[torch.triu(torch.ones(count, count), diagonal=1).bool()]
    mean = float(above.mean()) if count > 1 else 1.0
    return -math.log2(mean) if mean > 0.0 else math.inf


def number_of_clusters(rls: float) -> int:
    """Two, three or four (section 5.1)."""
    return 2 if rls >= LOCAL else 3 if rls >= MIXED else 4


def cluster_layers(similarity: Float[Tensor, "layers layers"], clusters: int) -> list[list[int]]:
    """Spectral clustering on the affinity (S + 1) / 2, clusters in order of their first layer.

    The rows that are clustered are those of the first eigenvectors of the normalised Laplacian,
    divided by the square root of the layer's degree; a layer's affinity to itself does not count.
    """
    affinity = (similarity.double() + 1.0) / 2.0
    affinity = affinity - torch.diag(affinity.diagonal())
    root = affinity.sum(dim=1).clamp_min(1e-12).sqrt()
    laplacian = torch.eye(len(root), dtype=torch.float64) - affinity / root[:, None] / root
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :clusters]
    labels = nearest_centres(vectors / root[:, None], clusters)
    members: dict[int, list[int]] = {}
    for layer, label in enumerate(labels):
        members.setdefault(label, []).append(layer)
    return list(members.values())


def nearest_centres(points: Float[Tensor, "points axes"], clusters: int) -> list[int]:
    """K-means without chance: from every start, the result of the least squared distance."""
    clusters = min(clusters, len(points))
    results = [_settle(points, _farthest(points, first, clusters)) for first in range(len(points))]
    return min(results, key=lambda result: result[0])[1]


def _farthest(points: Tensor, first: int, clusters: int) -> Tensor:
    """Centres to start from: one point, then always the point farthest from all so far."""
    chosen = [first]
    while len(chosen) < clusters:
        nearest = torch.cdist(points, points[chosen]).min(dim=1).values
        chosen.append(int(nearest.argmax()))
    return points[chosen]


def _settle(points: Tensor, centres: Tensor) -> tuple[float, list[int]]:
    """Move one point at a time, where that lowers the sum of squared distances most.

    Returns the sum (rounded, so that equal clusterings tie) and the labels.
    """
    clusters = torch.arange(len(centres))
    labels = torch.cdist(points, centres).argmin(dim=1)
    while True:
        member = (labels[:, None] == clusters).to(points.dtype)
        sizes = member.sum(dim=0)
        centres = (member.T @ points) / sizes.clamp_min(1.0)[:, None]
        squares = torch.cdist(points, centres).square()
        own = squares.gather(1, labels[:, None])
        # Leaving a cluster of n saves n / (n - 1) times the squared distance to its centre,
        # joining one of n costs n / (n + 1) times the distance to that one's.
        size = sizes[labels][:, None]
        saved = torch.where(size > 1, own * size / (size - 1).clamp_min(1.0), 0.0)
        gain = saved - squares * sizes / (sizes + 1)
        gain[torch.arange(len(points)), labels] = 0.0
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= TIED:
            return round(float(own.sum()), 12), labels.tolist()
        labels[best // len(clusters)] = best % len(clusters)


def choose_layers(
    similarity: Float[Tensor, "layers layers"], count: int, clusters: int | None = None
) -> list[int]:
    """The layers that LoRP removes, in the order in which it does.

    Args:
        similarity: S, the mean cosine of the inputs of every two layers.
        count: how many; at most L - 2.
        clusters: how many instead of what the locality says.
    """
    members = cluster_layers(similarity, clusters or number_of_clusters(locality(similarity)))
    protected = {0, similarity.shape[0] - 1}
    waiting = [
        sorted(
            (layer for layer in cluster if layer not in protected),
            key=lambda layer, cluster=cluster: -_redundancy(similarity, layer, cluster),  # type: ignore[misc]
        )
        for cluster in members
    ]
    chosen = [queue.pop(0) for queue in waiting if queue][:count]
    while len(chosen) < count:
        means = [
            _remaining_mean(similarity, [m for m in cluster if m not in chosen])
            for cluster in members
        ]
        open_clusters = [index for index, queue in enumerate(waiting) if queue]
        chosen.append(waiting[max(open_clusters, key=lambda index: means[index])].pop(0))
    return chosen


def _redundancy(similarity: Tensor, layer: int, members: list[int]) -> float:
    others = [member for member in members if member != layer]
    return float(similarity[layer, others].mean()) if others else -math.inf


def _remaining_mean(similarity: Tensor, left: list[int]) -> float:
    pairs = [float(similarity[a, b]) for a, b in combinations(left, 2)]
    return sum(pairs) / len(pairs) if pairs else -math.inf
