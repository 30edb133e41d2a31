"""FlexPrefill: block means where they can be trusted, else columns and diagonals (2502.20766).

From summaries of the paper and its code: the exact attention of a representative query block,
summed into key blocks, is compared with its estimate from block means by the root of the
Jensen-Shannon divergence. Below tau (0.1) a head keeps the fewest blocks of its whole estimated map
that hold `share` of it; else the fewest columns and the fewest diagonals that hold `share` of the
representative's mass.
Departures, and where the paper is silent:

- Nothing is causal here: some representative blocks are spread over the video, and the largest of
  their divergences counts.
- `density` is the most that a head's map, or its columns and its diagonals together, keep.
- Divergence is over blocks without text. Columns and diagonals are of blocks; no diagonal is
  forced.
- Text, own and conditioning blocks are kept; in a map they count towards the share.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import CAPS, SparseConfig, part, whole
from .sampled import mass_of_places, sampled_places
from .score import pooled_map
from .search import Found, Search
from .select import best, most_kept, top_p_rows
from .slashes import column_means, columns_and_diagonals, diagonal_means


@dataclass(frozen=True)
class FlexPrefill(SparseConfig):
    """The map of block means, or columns and diagonals where that strays: a share of either.

    Args:
        density: the most that a head keeps, as a share of its blocks.
        share: of the mass that is kept.
        tau: root of the divergence from which on block means are not trusted.
        representatives: query blocks that are computed exactly.
    """

    density: float = 0.5
    search_at: tuple[float, ...] = (0.0,)
    every_step: bool = True
    order: str = "raster"
    block_size: int = 128
    share: float = 0.9
    tau: float = 0.1
    representatives: int = 4

    paper: ClassVar[str] = "FlexPrefill, arXiv 2502.20766"
    cost: ClassVar[str] = (
        "density at most; a search + representatives block / (2 S) + N^2 / (2 S^2)"
    )
    swept: ClassVar[tuple[dict, ...]] = tuple({"density": cap} for cap in CAPS)

    def __post_init__(self):
        super().__post_init__()
        part("share", self.share)
        part("tau", self.tau)
        whole("representatives", self.representatives, 1)

    def find(self, search: Search) -> Found:
        forced = self.forced(search)
        pooled, ranking = pooled_map(search, self.block_size)
        places = sampled_places(search.grid, self.representatives, forced.device)
        blocks = (places // self.block_size).unique()
        exact, cost = mass_of_blocks(search, self.block_size, blocks)
        trusted = divergence(exact, pooled[:, :, blocks]).amax(-1).sqrt() < self.tau
        most = most_kept(self.density, pooled)
        whole_map = self.fewest(pooled.flatten(2), forced.flatten(), most * len(forced))
        slashes = columns_and_diagonals(
            self.fewest(column_means(exact), forced.new_zeros(1), -(-most // 2)),
            self.fewest(diagonal_means(exact, blocks), forced.new_zeros(1), max(1, most // 2)),
        )
        of_map = whole_map.view_as(pooled) | best(pooled, 1)  # no row without keys
        mask = torch.where(trusted[..., None, None], of_map, slashes)
        return Found(mask | forced, None, cost + ranking)

    def fewest(self, scores: Tensor, forced: Tensor, most: int) -> Tensor:
        """The fewest along the last axis of (B, H, n) that hold the share, at most so many."""
        return top_p_rows(scores.unsqueeze(2), self.share, forced[None], cap=most).squeeze(2)


def mass_of_blocks(search: Search, block_size: int, blocks: Tensor) -> tuple[Tensor, float]:
    """Mean softmax mass of whole query blocks in each key block, (B, H, len(blocks), N)."""
    place = blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)
    there = place < search.grid.tokens
    mass, cost = mass_of_places(search, block_size, place[there])
    sums = mass.new_zeros(*mass.shape[:2], len(blocks), mass.shape[-1])
    owner = there.nonzero()[:, 0]
    return sums.index_add_(2, owner, mass) / there.sum(1)[:, None], cost


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon, natural log, over the blocks where the second is not 0; (..., N) -> (...)."""
    first = first * (second > 0)
    p, q = (x / x.sum(-1, keepdim=True).clamp_min(1e-20) for x in (first, second))
    mean = (p + q) / 2
    terms = (torch.xlogy(p, p) + torch.xlogy(q, q)) / 2 - torch.xlogy(mean, mean)
    return terms.sum(-1).clamp_min(0)  # rounding may pass it, and the root would be NaN
