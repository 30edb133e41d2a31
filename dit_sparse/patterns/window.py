"""A fixed 3-D window: every query block reads the key blocks nearest to it in space and time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig
from ..grid import VideoGrid, token_order
from .search import Found, Search
from .select import blocks_of, forced_blocks, most_blocks, top_k_rows


@dataclass(frozen=True)
class Window(SparseConfig):
    """The nearest blocks in space and time, the same for all heads, layers and steps.

    Args:
        time_scale: length of one frame in tokens; above 1 the window is shorter in time.
    """

    time_scale: float = 1.0

    paper: ClassVar[str] = "a floor, no paper; compare Sliding Tile Attention, arXiv 2502.04507"

    def __post_init__(self):
        super().__post_init__()
        if self.time_scale <= 0:
            raise ValueError(f"time_scale must be above 0, got {self.time_scale}")

    def find(self, search: Search) -> Found:
        device = search.query.device
        centres = _centres(search.grid, self.order, self.block_size).to(device)
        centres[:, 0] *= self.time_scale
        scores = -torch.cdist(centres, centres)[None, None]
        kept = blocks_of(torch.full((1, 1), self.density, device=device), len(centres))
        forced = forced_blocks(search.grid, self.block_size, device)
        return Found(top_k_rows(scores, kept, forced, most_blocks(self.density, len(centres))))


def _centres(grid: VideoGrid, order: str, block_size: int) -> Tensor:
    """Mean (t, y, x) of each block's video tokens, (N, 3); the origin for a block of text alone."""
    permutation, _ = token_order(grid, order, block_size)
    area = grid.height * grid.width
    place = torch.stack(
        [permutation // area, permutation % area // grid.width, permutation % grid.width], dim=1
    )
    first = grid.text_tokens if grid.text_first else 0
    block = (torch.arange(grid.video_tokens) + first) // block_size
    sums = torch.zeros(grid.num_blocks(block_size), 3).index_add_(0, block, place.float())
    counts = torch.bincount(block, minlength=len(sums)).clamp_min(1)
    return sums / counts.unsqueeze(1)
