"""RTPurbo, Full Attention Strikes Back: 16 dimensions find the keys (arXiv 2605.16928).

From the paper's abstract: long-range retrieval is governed by a low-dimensional subspace, so that
an indexer of 16 dimensions finds the tokens; a budget of top-p for each query; only a few heads
need the long range at all; some hundred steps of training.
Departures, and where that is silent:

- Nothing is trained: the 16 dimensions are those in which Q K^T of the call itself is best
  approximated (from the root of Q^T Q and the eigenvectors of A K^T K A, A that root).
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

    With the root A of Q^T Q and the eigenvectors U and values S^2 of A K^T K A, Q A^-1 holds
    orthonormal columns and Q K^T = (Q A^-1 U) (K A U)^T, whose dimensions add S^2 each to its
    squared norm: those of the largest are kept. Cost: Q^T Q, K^T K, two projections and two passes
    over the dimensions.
    """
    tokens, dim = search.grid.tokens, search.query.shape[-1]
    dimensions = min(dimensions, dim)
    query, key = (x.transpose(1, 2).float() for x in (search.query, search.key))
    root, inverse = root_of(query.mT @ query)
    squares, directions = torch.linalg.eigh(root @ (key.mT @ key) @ root)  # ascending
    directions = directions[..., -dimensions:]
    # On either side the root of S: all of it may be too much for float16.
    least = (squares[..., -1:] * 1e-6).clamp_min(1e-30)
    half = squares[..., -dimensions:].maximum(least).unsqueeze(-2) ** 0.25
    few_q, few_k = (
        (x @ project).transpose(1, 2).to(search.query.dtype)
        for x, project in (
            (query, inverse @ directions * half),
            (key, root @ directions / half),
        )
    )
    scores = mass_of_rows(search, few_q, few_k, block_size, block_size)
    return scores, dim / tokens + dimensions / tokens + dimensions / dim


def root_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a positive matrix and its inverse; directions without length have inverse 0."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    there = values > values[..., -1:] * 1e-6
    inverse = torch.where(there, values.clamp_min(1e-30).rsqrt(), 0)
    values = values.sqrt()
    return (vectors * values.unsqueeze(-2)) @ vectors.mT, (
        vectors * inverse.unsqueeze(-2)
    ) @ vectors.mT
