"""Sparse VideoGen 2: clusters of queries and of keys, and the mass between them (2505.18875).

From a summary of the paper and the authors' scripts: k-means of the queries and of the keys of each
head; the softmax of the products of centroids, weighed by the size of the key cluster, estimates
the mass between two clusters; each query cluster keeps the fewest key clusters that hold `share` of
it, and a tenth of them at least.
A re-implementation of the scores on our kernels. Departures, and where the paper is silent:

- The paper puts the tokens of a cluster side by side, in an order for each head, for queries and
  for keys. Our engines take one order for all heads, so a block cannot be a cluster: the estimated
  mass is spread over the tokens of both clusters and summed into blocks of the one order. Clusters
  pick the blocks, but what is kept are blocks.
- `density` is the most that a row keeps.
- k-means starts from evenly spaced tokens at every search; the paper goes on from the centroids of
  the step before, with 50 iterations at first and 2 later. Ours are 2: on small pipelines 10 are
  no nearer to dense, and each costs as much as a hundredth of dense attention.
- At most one cluster for every block of tokens: at small sizes k-means would cost more than
  attention. It is of the video alone.
- Text, own and conditioning blocks are kept and count towards the share.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import CAPS, SparseConfig, part, whole
from .score import CHUNK_ELEMENTS, Scores
from .search import Found, Search
from .select import most_kept, top_p_rows


@dataclass(frozen=True)
class SparseVideoGen2(SparseConfig):
    """Mass between clusters of queries and of keys, summed into blocks; a share of each row.

    Args:
        density: the most that a row keeps, as a share of its blocks.
        share: of a row's estimated mass, that its blocks hold.
        least: the least that a row keeps, as a share of its blocks.
        q_clusters: of queries in each head, at most one for every block.
        k_clusters: of keys, the same.
        iterations: of k-means.
    """

    density: float = 0.5
    search_at: tuple[float, ...] = (0.2,)
    every_step: bool = True
    share: float = 0.9
    least: float = 0.1
    q_clusters: int = 300
    k_clusters: int = 1000
    iterations: int = 2

    paper: ClassVar[str] = "Sparse VideoGen 2, arXiv 2505.18875 (re-implemented, its scores only)"
    cost: ClassVar[str] = (
        "density at most; a search + iterations (q_clusters + k_clusters) / (2 S) and the products"
        " of centroids"
    )
    published: ClassVar[dict[str, dict]] = {
        "Wan": {"density": 0.99, "dense_layers": 1, "own_block": False},
        "HunyuanVideo": {
            "density": 0.99,
            "search_at": (0.1,),
            "dense_layers": 2,
            "q_clusters": 400,
            "own_block": False,
        },
    }
    swept: ClassVar[tuple[dict, ...]] = tuple({"density": cap, "least": 0.02} for cap in CAPS)

    def __post_init__(self):
        super().__post_init__()
        part("share", self.share)
        part("least", self.least)
        for name in ("q_clusters", "k_clusters", "iterations"):
            whole(name, getattr(self, name), 1)

    def find(self, search: Search) -> Found:
        most_clusters = search.grid.num_blocks(self.block_size)
        clusters = min(self.q_clusters, most_clusters), min(self.k_clusters, most_clusters)
        scores, cost = cluster_mass(search, self.block_size, clusters, self.iterations)
        least, most = (most_kept(d, scores) for d in (self.least, self.density))
        return Found(top_p_rows(scores, self.share, self.forced(search), least, most), None, cost)


def cluster_mass(
    search: Search, block_size: int, clusters: tuple[int, int], iterations: int
) -> Scores:
    """Mass between clusters of queries and of keys, summed into blocks, (B, H, N, N).

    A row sums to the video tokens of its block. Cost: distances of k-means, one product of the
    centroids, and two that spread it over blocks.
    """
    grid, blocks = search.grid, search.grid.num_blocks(block_size)
    first, end = grid.video_span
    block = torch.arange(first, end, device=search.query.device) // block_size
    centroids, members = [], []
    for x, count in zip((search.query, search.key), clusters):
        video = x[:, first:end].transpose(1, 2).float()
        found, label = k_means(video, count, iterations)
        centroids.append(found)
        members.append(tokens_in_both(label, block, found.shape[-2], blocks))  # (B, H, C, N)
    sizes = members[1].sum(-1)
    logits = centroids[0] @ centroids[1].mT * search.query.shape[-1] ** -0.5
    mass = (logits + sizes.log().unsqueeze(-2)).softmax(-1)  # an empty cluster has log size -inf
    spread = members[1] / sizes.clamp_min(1).unsqueeze(-1)
    scores = members[0].mT @ mass @ spread
    dim, (q, k) = search.query.shape[-1], (x.shape[-2] for x in centroids)
    pairs = iterations * (q + k) * grid.video_tokens * dim + q * k * dim + blocks * k * (q + blocks)
    return scores, pairs / (2 * grid.tokens**2 * dim)


def k_means(x: Tensor, clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Centroids (B, H, C, D) and the cluster of each token (B, H, S); x (B, H, S, D).

    Starts from evenly spaced tokens; an empty cluster keeps its centroid.
    """
    clusters = min(clusters, x.shape[-2])
    place = (torch.arange(clusters, device=x.device) + 0.5) * x.shape[-2] / clusters
    centroids = x[..., place.long(), :]
    label = nearest(x, centroids)
    for _ in range(iterations - 1):
        index = label.unsqueeze(-1)
        sums = torch.zeros_like(centroids).scatter_add_(-2, index.expand_as(x), x)
        ones = torch.ones_like(x[..., :1])
        sizes = torch.zeros_like(centroids[..., :1]).scatter_add_(-2, index, ones)
        centroids = torch.where(sizes > 0, sums / sizes.clamp_min(1), centroids)
        label = nearest(x, centroids)
    return centroids, label


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each token, (B, H, S) int64."""
    at_once = max(
        1, CHUNK_ELEMENTS // (centroids.shape[0] * centroids.shape[1] * len(centroids[0, 0]))
    )
    lengths = centroids.square().sum(-1).unsqueeze(-2) / 2
    parts = [(t @ centroids.mT - lengths).argmax(-1) for t in x.split(at_once, dim=-2)]
    return torch.cat(parts, dim=-1)


def tokens_in_both(label: Tensor, block: Tensor, clusters: int, blocks: int) -> Tensor:
    """How many tokens each cluster has in each block, (B, H, clusters, blocks) float32."""
    both = label * blocks + block
    counts = torch.zeros(*label.shape[:2], clusters * blocks, device=label.device)
    return counts.scatter_add_(-1, both, torch.ones_like(both, dtype=counts.dtype)).unflatten(
        -1, (clusters, blocks)
    )
