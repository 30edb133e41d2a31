"""MInference and MMInference: each head takes a pattern, filled in by what a few rows see.

MInference (arXiv 2407.02490), from a summary of its code: a head is of one of three patterns:
A-shape (the first keys and the nearest), vertical-slash (columns and diagonals of most mass, seen
by the last 64 queries), or block-sparse (the best products of block means in each row). Which one
is searched offline, by the mass or the output that it keeps.
MMInference (arXiv 2504.16083), from a summary: adds the grid, tokens at the same place of all
frames, whose stride it estimates, and treats the parts of different modalities each by itself.
Departures, and where they are silent:

- Nothing is causal here: the 64 rows are spread over the video, and the pattern of a head is the
  one that keeps most of their mass, found at each search and not offline.
- Columns and diagonals are of blocks. An eighth of a row's budget goes to columns, the rest to
  diagonals, about the ratio of the published 1000 to 6096; nothing is forced beside.
- The stride of the grid is known: a frame. Its mask is that of the blocks nearest in space, through
  all frames. Text is a part of its own that is always kept.
- Text, own and conditioning blocks are kept, on top of columns and diagonals.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, whole
from .sampled import choose_masks, mass_of_places, sampled_places
from .score import nearness, pooled_logits
from .search import Found, Search
from .select import best, most_kept, top_density_rows
from .slashes import column_means, columns_and_diagonals, diagonal_means
from .sparse_vdit import SPACE_FIRST

COLUMNS = 1 / 8  # of the budget of vertical-slash


@dataclass(frozen=True)
class MInference(SparseConfig):
    """A-shape, columns and diagonals, or block means: each head takes what keeps most mass.

    Args:
        rows: query rows that are sampled.
    """

    search_at: tuple[float, ...] = (0.0,)
    every_step: bool = True
    order: str = "raster"
    rows: int = 64

    paper: ClassVar[str] = "MInference, arXiv 2407.02490"
    cost: ClassVar[str] = "density; a search + rows / (2 S) + N^2 / (2 S^2)"

    def __post_init__(self):
        super().__post_init__()
        whole("rows", self.rows, 1)

    def find(self, search: Search) -> Found:
        forced = self.forced(search)
        places = sampled_places(search.grid, self.rows, forced.device)
        mass, cost = mass_of_places(search, self.block_size, places)
        pooled, ranking = pooled_logits(search, self.block_size)
        row_blocks = places // self.block_size
        masks = [
            *self.static(search, forced),
            self.vertical_slash(mass, row_blocks) | forced,
            top_density_rows(pooled, self.density, forced),
        ]
        kept = torch.stack([(mass * mask[:, :, row_blocks]).sum((-1, -2)) for mask in masks])
        return Found(choose_masks(masks, -kept), None, cost + ranking)

    def static(self, search: Search, forced: Tensor) -> list[Tensor]:
        """Patterns that look at nothing, each (1, 1, N, N)."""
        place = torch.arange(len(forced), device=forced.device)
        near = -(place[:, None] - place).abs().float()
        near[:, : max(1, round(len(forced) * self.density * COLUMNS))] = 1.0  # the first keys
        return [top_density_rows(near[None, None], self.density, forced)]

    def vertical_slash(self, mass: Tensor, row_blocks: Tensor) -> Tensor:
        kept = most_kept(self.density, mass)
        columns = max(1, round(kept * COLUMNS))
        return columns_and_diagonals(
            best(column_means(mass), columns),
            best(diagonal_means(mass, row_blocks), max(1, kept - columns)),
        )


@dataclass(frozen=True)
class MMInference(MInference):
    """MInference's patterns, and the same place in all frames."""

    paper: ClassVar[str] = "MMInference, arXiv 2504.16083 (from a summary)"

    def static(self, search: Search, forced: Tensor) -> list[Tensor]:
        in_space = nearness(search.grid, self.order, self.block_size, SPACE_FIRST)
        grid = top_density_rows(in_space.to(forced.device), self.density, forced)
        return [*super().static(search, forced), grid]
