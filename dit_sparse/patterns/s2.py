"""S2-Attention: each head has a shard of the keys, many heads together have all (2407.17678).

From the paper's abstract: heads attend to different strided shards of the context and to what is
near, their union covers the context, and some layers stay dense. The model is trained with it.
Departures, and where that is silent:

- Nothing is trained.
- Half of a row's blocks are the nearest, half are evenly spaced; each head's shard begins
  elsewhere, and moves on with every layer. Heads x density / 2 below 1 leave keys to no shard.
- `dense_layers` leaves leading layers dense; none by default.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig
from .score import nearness
from .search import Found, Search
from .select import blocks_of, top_density_rows


@dataclass(frozen=True)
class S2Attention(SparseConfig):
    """The nearest blocks and evenly spaced ones, a different shard for each head."""

    search_at: tuple[float, ...] = (0.2,)

    paper: ClassVar[str] = "S2-Attention, arXiv 2407.17678 (untrained; from its abstract)"
    cost: ClassVar[str] = "density; no search"
    memory: ClassVar[str] = "mask bits H N^2 / 8 bytes a layer and branch, one for all samples"

    def cache_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return super().cache_bytes((1, *shape[1:]), itemsize)

    def find(self, search: Search) -> Found:
        forced = self.forced(search)
        of = search.heads, len(forced), self.density / 2, search.layer, forced.device
        shards = strided_shards(*of)[:, search.own_heads]
        near = nearness(search.grid, self.order, self.block_size).to(forced.device)
        scores = near.masked_fill(shards.unsqueeze(-2), 1.0)  # the shard, then the nearest: below 0
        return Found(top_density_rows(scores, self.density, forced))


def strided_shards(
    heads: int, blocks: int, density: float, layer: int, device: torch.device
) -> Tensor:
    """The evenly spaced key blocks of each head, (1, H, N) bool."""
    count = int(blocks_of(torch.tensor(density), blocks))
    phase = ((torch.arange(heads, device=device) + layer) % heads + 0.5) / heads  # of a stride
    place = (torch.arange(count, device=device) + phase[:, None]) * blocks / count
    shards = torch.zeros(heads, blocks, dtype=torch.bool, device=device)
    return shards.scatter_(-1, place.long().clamp(max=blocks - 1), True).unsqueeze(0)
