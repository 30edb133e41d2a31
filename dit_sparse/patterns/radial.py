"""Radial attention: the share of a frame that is kept halves as its distance doubles (2506.19852).

From the authors' code: between frames at distance d, a token keeps the keys at most a width away
from its own place in raster order; the width halves each time d doubles; where it would be less
than a block, the diagonal stays one block wide and only every second, fourth ... frame is kept
instead; own and next frames are whole, and so is the first frame of the video. The mask is static.
The width is decay 2^(bits of a frame's tokens - bits of d).
A re-implementation of the mask on our kernels. Departures, and where the paper is silent:

- A block is kept as its middle token is, where the authors ask for the density of its columns.
- `decay` follows from the density: the largest of 2^(k/4) whose mask is not denser. Own and next
  frames are whole at any decay, so that a video of few frames cannot be made as sparse as asked.
- The authors keep the first frame on Wan only; here it is an option, on by default.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, flag
from ..grid import VideoGrid
from .score import block_middles
from .search import Found, Search
from .select import forced_blocks

DECAYS = tuple(2 ** (k / 4) for k in range(16, -33, -1))


@dataclass(frozen=True)
class Radial(SparseConfig):
    """Keys near in space, fewer the farther a frame is: a static mask, the same for all heads.

    Args:
        first_frame: every row also keeps the first frame.
    """

    search_at: tuple[float, ...] = (0.2,)
    order: str = "raster"
    first_frame: bool = True

    paper: ClassVar[str] = "Radial Attention, arXiv 2506.19852 (re-implemented)"
    cost: ClassVar[str] = "density; no search"
    memory: ClassVar[str] = "mask bits N^2 / 8 bytes a layer and branch, one for all heads"

    def __post_init__(self):
        super().__post_init__()
        flag("first_frame", self.first_frame)

    def cache_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        _, tokens, _, dim = shape
        return super().cache_bytes((1, tokens, 1, dim), itemsize)  # one mask for all

    def find(self, search: Search) -> Found:
        shape = self.order, self.block_size, self.density, self.first_frame, self.own_block
        return Found(densest_mask(search.grid, *shape, search.query.device))


@lru_cache(maxsize=8)
def densest_mask(
    grid: VideoGrid,
    order: str,
    block_size: int,
    density: float,
    first_frame: bool,
    own_block: bool,
    device: torch.device,
) -> Tensor:
    """The mask of the largest decay that is not denser than asked, else of the smallest."""
    forced = forced_blocks(grid, block_size, torch.device("cpu"), own_block)
    mask = forced
    for decay in DECAYS:
        mask = radial_mask(grid, order, block_size, decay, first_frame) | forced
        if mask.float().mean() <= density:
            break
    return mask[None, None].to(device)


def radial_mask(
    grid: VideoGrid, order: str, block_size: int, decay: float, first_frame: bool
) -> Tensor:
    """What the middle token of each block keeps, (N, N) bool."""
    middle = block_middles(grid, order, block_size)  # (N,) raster places
    area = grid.height * grid.width
    frame, place = middle // area, middle % area
    frames_apart = (frame[:, None] - frame).abs()
    apart = (place[:, None] - place).abs()
    bits = frames_apart.clamp_min(1).float().frexp().exponent  # bit length, exactly
    width = decay * torch.exp2(area.bit_length() - bits)
    split = (block_size / width).clamp_min(1).long()
    kept = (apart <= width.clamp_min(block_size)) & (frames_apart % split == 0)
    kept |= frames_apart <= 1
    return kept | (frame == 0) if first_frame else kept
