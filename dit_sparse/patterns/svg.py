"""Sparse VideoGen 1: heads of space and heads of time, told apart on sampled rows (2502.01776).

From Alg. 1 and the authors' code: a spatial head attends to its own and near frames, a temporal
head to the same place in all frames; both masks have the same density. At every step 64 query rows
are computed densely and under both masks, and each head takes the mask of the smaller squared error
(Alg. 1). Dense first steps and first layers, and on Wan the first frame for all rows, follow the
authors' code.
A re-implementation of the selection on our kernels. Departures, and where the paper is silent:

- The temporal mask is a band after a transposition of frames and places; here it is rounded up to
  blocks of the one order: those nearest in space, through all frames.
- Rows are spread evenly over the video instead of drawn at random, so that equal runs are equal.
- Text, own and conditioning blocks, and the first frame, count towards the density.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, flag, whole
from ..grid import VideoGrid
from .sampled import choose_masks, output_errors, sampled_places
from .score import nearness
from .search import Found, Search
from .select import forced_blocks, top_density_rows
from .sparse_vdit import SPACE_FIRST


@dataclass(frozen=True)
class SparseVideoGen(SparseConfig):
    """Near frames, or the same place in all frames: each head takes what errs less on sampled rows.

    Args:
        rows: query rows that are sampled.
        first_frame: every row also keeps the first frame, as the authors do on Wan.
    """

    density: float = 0.3
    search_at: tuple[float, ...] = (0.2,)
    every_step: bool = True
    order: str = "raster"
    rows: int = 64
    first_frame: bool = False

    paper: ClassVar[str] = "Sparse VideoGen, arXiv 2502.01776 (re-implemented)"
    cost: ClassVar[str] = "density; a search + 2 rows / S"
    published: ClassVar[dict[str, dict]] = {
        "Wan": {"dense_layers": 1, "block_size": 128, "first_frame": True},
        "HunyuanVideo": {
            "density": 0.25,
            "search_at": (0.1,),
            "dense_layers": 2,
            "block_size": 128,
        },
    }

    def __post_init__(self):
        super().__post_init__()
        whole("rows", self.rows, 1)
        flag("first_frame", self.first_frame)

    def find(self, search: Search) -> Found:
        shape = self.order, self.block_size, self.density, self.own_block, self.first_frame
        masks = spatial_and_temporal(search.grid, *shape, search.query.device)
        places = sampled_places(search.grid, self.rows, search.query.device)
        errors, cost = output_errors(search, self.block_size, masks, places)
        return Found(choose_masks(masks, errors), None, cost)


@lru_cache(maxsize=8)
def spatial_and_temporal(
    grid: VideoGrid,
    order: str,
    block_size: int,
    density: float,
    own_block: bool,
    first_frame: bool,
    device: torch.device,
) -> list[Tensor]:
    """The two masks, each (1, 1, N, N) bool."""
    forced = forced_blocks(grid, block_size, device, own_block).clone()
    if first_frame:
        first, _ = grid.video_span
        end = first + grid.height * grid.width
        forced[:, first // block_size : -(-end // block_size)] = True
    place = torch.arange(len(forced), device=device)
    in_sequence = -(place[:, None] - place).abs().float()[None, None]
    in_space = nearness(grid, order, block_size, SPACE_FIRST).to(device)
    return [top_density_rows(scores, density, forced) for scores in (in_sequence, in_space)]
