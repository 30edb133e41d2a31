"""Scatterbrain: large entries by hashing, a low-rank estimate of all others (arXiv 2110.15343).

From the paper's abstract and a summary: locality-sensitive hashing finds the pairs with large q.k,
which are exact; all others come from random features phi(q) phi(k), which are subtracted where the
exact value is known, so that nothing counts twice, in one softmax.
Departures, and where that is silent:

- The low-rank part is one mean key and value for each block, over the blocks left out
  (`dit_sparse/tail.py`): the same subtraction, less noise than random features.
- A block's score is the number of pairs that fall into one bucket, over some rounds of hashing with
  the signs of random projections; queries and keys are centred first. Same hashes in every run.
- Text keys, own and conditioning blocks are kept and count towards the density; rows of text choose
  as the others do, since means tell them the rest.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, whole
from .score import Scores
from .search import Found, Search
from .select import top_density_rows
from .svg2 import tokens_in_both

MAX_BITS = 12  # every block counts the tokens in each of 2^bits buckets


@dataclass(frozen=True)
class Scatterbrain(SparseConfig):
    """Blocks whose tokens fall into the same hash buckets; means of the other blocks.

    Args:
        bits: of a hash, at most 12.
        rounds: of hashing.
    """

    density: float = 0.1
    bits: int = 8
    rounds: int = 8

    paper: ClassVar[str] = "Scatterbrain, arXiv 2110.15343 (from a summary)"
    cost: ClassVar[str] = (
        "density + 1 / block size (the tail); a search + rounds (bits / S + 2^bits N^2 / (2 S^2 D))"
    )
    tail: ClassVar[bool] = True
    text_queries: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        whole("bits", self.bits, 1)
        if self.bits > MAX_BITS:
            raise ValueError(f"bits is at most {MAX_BITS}, got {self.bits}: take more rounds")
        whole("rounds", self.rounds, 1)

    def find(self, search: Search) -> Found:
        scores, cost = collisions(search, self.block_size, self.bits, self.rounds)
        return Found(top_density_rows(scores, self.density, self.forced(search)), None, cost)


def collisions(search: Search, block_size: int, bits: int, rounds: int) -> Scores:
    """Pairs of a query and a key of two blocks that share a bucket, summed over rounds.

    Cost: the projections, and a product of the histograms of blocks.
    """
    tokens, dim, device = search.grid.tokens, search.query.shape[-1], search.query.device
    blocks = search.grid.num_blocks(block_size)
    block = torch.arange(tokens, device=device) // block_size
    generator = torch.Generator().manual_seed(0)
    scores: Tensor | float = 0.0
    for _ in range(rounds):
        planes = torch.randn(dim, bits, generator=generator).to(device)
        query, key = (
            tokens_in_both(buckets(x, planes), block, 2**bits, blocks)
            for x in (search.query, search.key)
        )  # (B, H, buckets, N)
        scores = scores + query.mT @ key
    assert isinstance(scores, Tensor)
    products = rounds * (2 * tokens * bits * dim + blocks**2 * 2**bits)
    return scores, products / (2 * tokens**2 * dim)


def buckets(x: Tensor, planes: Tensor) -> Tensor:
    """The bucket of each token, (B, H, S) int64; x (B, S, H, D)."""
    x = x.transpose(1, 2).float()
    signs = (x - x.mean(-2, keepdim=True)) @ planes > 0
    return (signs.long() << torch.arange(planes.shape[1], device=x.device)).sum(-1)
