"""A fixed 3-D window: every query block reads the key blocks nearest to it in space and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, positive
from .score import nearness
from .search import Found, Search
from .select import blocks_of, most_blocks, top_k_rows


@dataclass(frozen=True)
class Window(SparseConfig):
    """The nearest blocks in space and time, the same for all heads, layers and steps.

    Args:
        time_scale: length of one frame in tokens; above 1 the window is shorter in time.
    """

    time_scale: float = 1.0

    paper: ClassVar[str] = "a floor, no paper; compare Sliding Tile Attention, arXiv 2502.04507"
    cost: ClassVar[str] = "density; no search"
    memory: ClassVar[str] = "mask bits N^2 / 8 bytes a layer and branch, one for all heads"

    def __post_init__(self):
        super().__post_init__()
        positive("time_scale", self.time_scale)

    def cache_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        _, tokens, _, dim = shape
        return super().cache_bytes((1, tokens, 1, dim), itemsize)  # one mask for all

    def find(self, search: Search) -> Found:
        return Found(nearest_blocks(self, search, self.time_scale))


def nearest_blocks(config: SparseConfig, search: Search, time_scale: float) -> Tensor:
    """The window of a config's order, block size and density, (1, 1, N, N) bool."""
    device = search.query.device
    scores = nearness(search.grid, config.order, config.block_size, time_scale).to(device)
    blocks = scores.shape[-1]
    kept = blocks_of(torch.full((1, 1), config.density, device=device), blocks)
    return top_k_rows(scores, kept, config.forced(search), most_blocks(config.density, blocks))
