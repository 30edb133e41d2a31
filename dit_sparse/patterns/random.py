"""Random blocks: the floor that every method must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import SparseConfig, whole
from .search import Found, Search
from .select import blocks_of, most_blocks, top_k_rows


@dataclass(frozen=True)
class RandomBlocks(SparseConfig):
    """As many random blocks in every row, drawn anew for each head, layer and search.

    Args:
        seed: of the drawing.
    """

    seed: int = 0

    paper: ClassVar[str] = "a floor, no paper"
    cost: ClassVar[str] = "density; no search"

    def __post_init__(self):
        super().__post_init__()
        whole("seed", self.seed, 0)

    def find(self, search: Search) -> Found:
        batch, heads = len(search.query), search.heads
        device = search.query.device
        blocks = search.grid.num_blocks(self.block_size)
        seed = (self.seed * 1_000_003 + search.step) * 1009 + search.layer
        generator = torch.Generator().manual_seed(seed % (2**61 - 1))  # any whole number
        scores = torch.rand(batch, heads, blocks, blocks, generator=generator)
        scores = scores[:, search.own_heads].to(device)
        kept = blocks_of(torch.full(scores.shape[:2], self.density, device=device), blocks)
        most = most_blocks(self.density, blocks)
        return Found(top_k_rows(scores, kept, self.forced(search), most))
