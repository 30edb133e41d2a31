"""Sliding tile attention: each tile reads the tiles in a 3-D window around it (2502.04507).

From a summary of the paper: tokens go in 3-D tiles, a tile is a block, and each query tile reads
the key tiles in a box around it that is moved inwards at the borders, so that all tiles read
equally many; each head has a window of its own, from an offline search; 15 of 50 steps are dense.
A re-implementation of the selection on our kernels. Departures, and where the paper is silent:

- Tiles are our blocks, 4 x 4 x 4 tokens at 64, where the paper's have 6 x 8 x 8.
- The window is what the density pays for: the nearest tiles by the largest distance along any axis,
  as a share of the video's length along it. That is a box, and smaller ones than whole tiles allow.
- Three shapes of window: even, through four times as much of the time, or of a fourth of it. Each
  head takes the one that errs least on sampled rows at the search, in place of the offline one.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, whole
from ..grid import VideoGrid
from .sampled import choose_masks, output_errors, sampled_places
from .score import block_centres
from .search import Found, Search
from .select import forced_blocks, top_density_rows

TIME_SCALES = (1.0, 0.25, 4.0)  # of the window's shapes; above 1 it is shorter in time


@dataclass(frozen=True)
class SlidingTile(SparseConfig):
    """A 3-D window of tiles around each tile, of three shapes; each head takes the best.

    Args:
        rows: query rows that are sampled to choose the shape.
    """

    search_at: tuple[float, ...] = (0.3,)
    order: str = "tile"
    rows: int = 64

    paper: ClassVar[str] = "Sliding Tile Attention, arXiv 2502.04507 (re-implemented)"
    cost: ClassVar[str] = "density; a search + 2.5 rows / S"

    def __post_init__(self):
        super().__post_init__()
        whole("rows", self.rows, 1)

    def find(self, search: Search) -> Found:
        device = search.query.device
        shape = self.order, self.block_size, self.density, self.own_block, device
        windows = tile_windows(search.grid, *shape)
        places = sampled_places(search.grid, self.rows, device)
        errors, cost = output_errors(search, self.block_size, windows, places)
        return Found(choose_masks(windows, errors), None, cost)


@lru_cache(maxsize=8)
def tile_windows(
    grid: VideoGrid,
    order: str,
    block_size: int,
    density: float,
    own_block: bool,
    device: torch.device,
) -> list[Tensor]:
    """The window of each of `TIME_SCALES`, (1, 1, N, N) bool."""
    length = torch.tensor([grid.frames, grid.height, grid.width])
    centres = block_centres(grid, order, block_size) / length
    apart = (centres[:, None] - centres).abs()  # (N, N, 3)
    forced = forced_blocks(grid, block_size, device, own_block)
    windows = []
    for scale in TIME_SCALES:
        farthest = (apart * torch.tensor([scale, 1.0, 1.0])).amax(-1)
        windows.append(top_density_rows(-farthest[None, None].to(device), density, forced))
    return windows
