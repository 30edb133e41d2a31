"""RTPurbo, Full Attention Strikes Back: 16 dimensions find the keys (arXiv 2605.16928).

From the paper's abstract: long-range retrieval is governed by a low-dimensional subspace, so that
an indexer of 16 dimensions finds the tokens; a budget of top-p for each query; only a few heads
need the long range at all; some hundred steps of training.
Departures, and where that is silent:

- Nothing is trained: the 16 dimensions are those in which Q K^T of the call itself is nearly best
  approximated.
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
    """Block mass from an approximation of Q K^T in so few dimensions, in each head.

    Cost: Q^T Q, K^T K, two projections and two passes over the dimensions.
    """
    tokens, dim = search.grid.tokens, search.query.shape[-1]
    dimensions = min(dimensions, dim)
    given = search.query.transpose(1, 2).float(), search.key.transpose(1, 2).float()
    few_q, few_k = (
        (x @ project).transpose(1, 2).to(search.query.dtype)
        for x, project in zip(given, projections(*given, dimensions), strict=True)
    )
    scores = mass_of_rows(search, few_q, few_k, block_size, block_size)
    return scores, dim / tokens + dimensions / tokens + dimensions / dim


def projections(query: Tensor, key: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """P and R, `(B, H, D, dimensions)`, with Q P (K R)^T as near to Q K^T as so few may be.

    Subspace iteration: Q^T Q K^T K turns any directions towards those that hold most of Q K^T,
    8 times to within some percent of the best. With the columns of K R orthonormal, P = K^T K R.
    (Decomposed exactly, matrices of more than 32 rows go through a GPU one after the other.)
    """
    # Not a number: no reason to end a run, which it does not with other methods.
    gram_q, gram_k = ((x.mT @ x).nan_to_num(0, 0, 0) for x in (query, key))
    place = torch.arange(query.shape[-1], device=query.device)
    start = torch.cos(torch.pi / len(place) * (place[:, None] + 0.5) * place[:dimensions])
    directions = orthonormal(start.expand(*gram_k.shape[:2], -1, -1), gram_k)
    for _ in range(8):
        back = gram_k @ directions
        turned = gram_q @ back
        # One for each dimension, or a large one would hide the small ones in all of them.
        turned = turned @ torch.linalg.eigh(back.mT @ turned).eigenvectors
        directions = orthonormal(turned, gram_k)
    back = gram_k @ directions
    # On either side the root of a dimension's size: all of it may be too much for float16.
    half = (back * (gram_q @ back)).sum(-2, keepdim=True).clamp_min(1e-30) ** 0.25
    return back / half, directions * half


def orthonormal(directions: Tensor, gram: Tensor) -> Tensor:
    """Directions of the same span whose products by `gram` are 1 each and 0 between two.

    What `gram` has nothing of becomes 0.
    """
    directions = directions / directions.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    least = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    lengths = (directions * (gram @ directions)).sum(-2, keepdim=True)
    directions = directions * inverse_root(lengths, least)  # so that small ones count as much
    values, vectors = torch.linalg.eigh(directions.mT @ (gram @ directions))
    return directions @ (vectors * inverse_root(values.unsqueeze(-2), 1e-6))


def inverse_root(x: Tensor, least: Tensor | float) -> Tensor:
    return torch.where(x > least, x.clamp_min(1e-30).rsqrt(), 0)
