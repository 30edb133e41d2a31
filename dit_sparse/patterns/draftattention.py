"""DraftAttention: the softmax of block means picks the blocks, at every step (arXiv 2505.14708).

From the paper: tokens go frame after frame in patches of 8 x 16, so that a patch is a block of 128
(order "patch"); the draft map is the softmax over video blocks of the products of mean queries and
mean keys, after RoPE (Alg. 1); each head keeps the largest entries of its whole map, whatever their
row; text rows and columns are dense; the map is made anew at every step; a dense warm-up.
Departures, and where the paper is silent:

- Global selection may leave a row without video keys, which on Wan is a row without any: every row
  keeps its `row_floor` best blocks and its own (`row_floor=0, own_block=False` is as published).
- Text and conditioning blocks count towards the density; the paper's r is of the video alone.
- Blocks are cut from the ordered sequence. Where 8 or 16 does not divide the frame, or text stands
  in front (CogVideoX), they are not patches; their means are still those of the block.
- `every_step=False` keeps masks from one search to the next as AdaSpa does; the paper never does.
- The paper says 25% dense steps, its code 30% and the first layers: `published` follows the code
  (two leading layers on HunyuanVideo, one on Wan), with its fractions of 50 steps.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import DENSITIES, SparseConfig, whole
from .score import pooled_map
from .search import Found, Search
from .select import blocks_of, most_blocks, top_k_map


@dataclass(frozen=True)
class DraftAttention(SparseConfig):
    """Softmax of block means, the largest entries of each head's map, anew at every step.

    Args:
        row_floor: best blocks that every row keeps, whatever the rank of the row.
    """

    search_at: tuple[float, ...] = (0.25,)
    every_step: bool = True
    order: str = "patch"
    block_size: int = 128
    row_floor: int = 1

    paper: ClassVar[str] = "DraftAttention, arXiv 2505.14708"
    cost: ClassVar[str] = "density + N^2 / (2 S^2) at a search (N blocks, S tokens)"
    published: ClassVar[dict[str, dict]] = {
        model: {
            "density": density,
            "search_at": (0.3,),
            "dense_layers": dense_layers,
            "row_floor": 0,
            "own_block": False,
        }
        for model, density, dense_layers in (("HunyuanVideo", 0.1, 2), ("Wan", 0.25, 1))
    }
    # 8 x 16 tokens are a thirtieth of the paper's frames and half of one that benchmarks make
    swept: ClassVar[tuple[dict, ...]] = tuple(
        {"density": density, "block_size": 64} for density in DENSITIES
    )

    def __post_init__(self):
        super().__post_init__()
        whole("row_floor", self.row_floor, 0)

    def find(self, search: Search) -> Found:
        scores, cost = pooled_map(search, self.block_size)
        in_all = scores.shape[-1] * scores.shape[-2]
        kept = blocks_of(torch.full_like(scores[..., 0, 0], self.density), in_all)
        most = most_blocks(self.density, in_all)
        mask = top_k_map(scores, kept, self.forced(search), self.row_floor, most)
        return Found(mask, None, cost)
