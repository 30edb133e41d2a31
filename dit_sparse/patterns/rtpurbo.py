"""RTPurbo, Full Attention Strikes Back: 16 dimensions find the keys (arXiv 2605.16928).

From the paper's abstract: long-range retrieval is governed by a low-dimensional subspace, so that
an indexer of 16 dimensions finds the tokens; a budget of top-p for each query; only a few heads
need the long range at all; some hundred steps of training.
Departures, and where that is silent:

- Nothing is trained: the 16 dimensions are those in which Q K^T of the call itself is best
  approximated (singular vectors of the roots of Q^T Q and K^T K).
- All heads are treated alike. Scores are softmaxed and summed into blocks, and each row keeps the
  fewest that hold `share`; `density` is the most that a row keeps.
- Text, own and conditioning blocks are kept and count towards the share.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import CAPS, SparseConfig, part, whole
from .score import Scores, mass_of_rows
from .search import Found, Search
from .select import most_kept, top_p_rows


@dataclass(frozen=True)
class RTPurbo(SparseConfig):
    """Block mass from 16 principal dimensions of Q K^T, the fewest blocks that hold a share.

    Args:
        density: the most that a row keeps, as a share of its blocks.
        share: of a row's estimated mass, that its blocks hold.
        dimensions: of the indexer.
    """

    density: float = 0.5
    share: float = 0.9
    dimensions: int = 16

    paper: ClassVar[str] = "RTPurbo, arXiv 2605.16928 (untrained; from its abstract)"
    cost: ClassVar[str] = "density at most; a search + dimensions / D + 2 D / S"
    swept: ClassVar[tuple[dict, ...]] = tuple({"density": cap} for cap in CAPS)

    def __post_init__(self):
        super().__post_init__()
        part("share", self.share)
        whole("dimensions", self.dimensions, 1)

    def find(self, search: Search) -> Found:
        scores, cost = principal_mass(search, self.block_size, self.dimensions)
        most = most_kept(self.density, scores)
        return Found(top_p_rows(scores, self.share, self.forced(search), cap=most), None, cost)


def principal_mass(search: Search, block_size: int, dimensions: int) -> Scores:
    """Block mass from the best approximation of Q K^T of so few dimensions, in each head.

    With the roots A of Q^T Q and B of K^T K and A B = U S V^T, it is Q A^-1 U S V^T B^-1 K^T, cut
    to the largest S. Cost: Q^T Q, K^T K, two projections and two passes over the dimensions.
    """
    tokens, dim = search.grid.tokens, search.query.shape[-1]
    dimensions = min(dimensions, dim)
    query, key = (x.transpose(1, 2).float() for x in (search.query, search.key))
    (root_q, inverse_q), (root_k, inverse_k) = (root(x.mT @ x) for x in (query, key))
    left, sizes, right = torch.linalg.svd(root_q @ root_k)
    halves = sizes.sqrt().unsqueeze(-2)  # on either side: all of it may be too much for float16
    project_q = inverse_q @ (left * halves)[..., :dimensions]
    project_k = inverse_k @ (right.mT * halves)[..., :dimensions]
    few_q, few_k = (
        (x @ y).transpose(1, 2).to(search.query.dtype)
        for x, y in ((query, project_q), (key, project_k))
    )
    scores = mass_of_rows(search, few_q, few_k, block_size, block_size)
    return scores, dim / tokens + dimensions / tokens + dimensions / dim


def root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a positive matrix and its inverse; directions without length have inverse 0."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    there = values > values[..., -1:] * 1e-6
    inverse = torch.where(there, values.clamp_min(1e-30).rsqrt(), 0)
    values = values.sqrt()
    return (vectors * values.unsqueeze(-2)) @ vectors.mT, (
        vectors * inverse.unsqueeze(-2)
    ) @ vectors.mT
