"""LycheeDecode: a few heads search, the others take over what they found (arXiv 2602.04541).

From the paper's abstract: heads are split into a few that find the crucial tokens with full
attention and many that reuse them; which are which is learned.
Departures, and where that is silent:

- Nothing is learned, and it is for decoding there. At each search the heads of a layer are compared
  by the overlap of the masks that block means give them; searching heads are chosen one by one so
  that every head overlaps most with one of them, which it then follows.
- Only the searching heads compute mass, from one query row in eight, for block masks.
- A head follows one of its own layer; the paper hands tokens on from layer to layer.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, part
from .score import pooled_map, sampled_rows
from .search import Found, Search
from .select import top_density_rows


@dataclass(frozen=True)
class LycheeDecode(SparseConfig):
    """A few heads of each layer search by sampled exact mass; every other follows the most alike.

    Args:
        searching: share of the heads that search.
    """

    searching: float = 0.25

    paper: ClassVar[str] = "LycheeDecode, arXiv 2602.04541 (untrained; from its abstract)"
    compares_heads: ClassVar[bool] = True
    cost: ClassVar[str] = "density; a search + searching / 8 + N^2 / (2 S^2)"

    def __post_init__(self):
        super().__post_init__()
        part("searching", self.searching)

    def find(self, search: Search) -> Found:
        forced = self.forced(search)
        pooled, cost = pooled_map(search, self.block_size)
        cheap = top_density_rows(pooled, self.density, forced)
        heads = cheap.shape[1]
        count = max(1, round(self.searching * heads))
        searching, followed = leading_heads(overlap_of_heads(cheap), count)
        index = searching[:, None, :, None]
        query, key = (
            x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (search.query, search.key)
        )
        mass, of_each = sampled_rows(
            replace(search, query=query, key=key), self.block_size, engine=self.engine
        )
        found = top_density_rows(mass, self.density, forced)
        mask = found.gather(1, followed[..., None, None].expand_as(cheap))
        return Found(mask, None, cost + of_each * count / heads)


def overlap_of_heads(mask: Tensor) -> Tensor:
    """Blocks that two heads both keep over those that either keeps, (B, H, H)."""
    flat = mask.flatten(2).float()
    both, each = flat @ flat.mT, flat.sum(-1)
    return both / (each.unsqueeze(-1) + each.unsqueeze(-2) - both)


def leading_heads(overlap: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Heads chosen one by one so that all overlap most with one of them.

    Returns:
        The chosen heads (B, count), and for each head which of these it follows (B, H).
    """
    chosen: list[Tensor] = []
    covered = torch.zeros_like(overlap[:, 0])  # (B, H), by the heads chosen so far
    for _ in range(count):
        gain = torch.maximum(covered.unsqueeze(1), overlap).sum(-1)  # (B, H)
        for head in chosen:
            gain.scatter_(1, head.unsqueeze(1), -torch.inf)
        chosen.append(gain.argmax(1))
        best = overlap[torch.arange(len(overlap), device=overlap.device), chosen[-1]]
        covered = torch.maximum(covered, best)
    heads = torch.stack(chosen, dim=1)
    index = heads.unsqueeze(-1).expand(-1, -1, overlap.shape[-1])
    return heads, overlap.gather(1, index).argmax(1)
