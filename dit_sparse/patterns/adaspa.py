"""AdaSpa: exact block mass found online at a few steps, reused in between (arXiv 2502.21079).

From the paper: block mass W = sum of exp(q.k / sqrt(D) - LSE) over the pairs of a block (Eq. 12 to
14); the first search is fused with a dense forward that also yields the LSE, later searches reuse
that LSE; per-row top-k; text blocks are always kept; three levels of density from the recall of
heads.
Where the paper is silent or wrong:

- Its pseudocode takes the logarithm of qk - LSE and leaves out the scale; the equation is followed.
- More than half of the heads above the recall threshold: the count is capped at half, or the
  levels would overlap.
- Above density 2/3 the top level would pass 1: every head keeps the same density there.
- Recall is normalised by the row sum of W, since a stale LSE changes that sum.
- Text and own blocks count towards a row's budget; rows of text blocks keep everything. An image
  to start from and reference frames are treated like text.
- A block that mixes text and video counts as text.
- Masks and LSE are kept per CFG branch and per sample; nothing is shared between them.
- Step indices are 0-based: with (0.2, 0.6) of 50 steps the searches are at steps 10 and 30, and
  the fused search's own output is dense, so 11 steps are dense.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, flag, is_number
from .score import Scores, exact_mass
from .search import Found, Search
from .select import blocks_of, kept_share, most_blocks, pack_rows, packs, top_k_rows

TOP_LEVEL = 1.5  # the densest level of heads, as a multiple of the density
MAX_ADAPTIVE_DENSITY = 1 / TOP_LEVEL


@dataclass(frozen=True)
class AdaSpa(SparseConfig):
    """Exact block mass searched at two steps, per-row top-k, three density levels over heads.

    Args:
        recall_threshold: heads that keep more mass than this give half of their budget away.
        head_adaptive: False keeps one density for all heads.
    """

    recall_threshold: float = 0.8
    head_adaptive: bool = True

    paper: ClassVar[str] = "AdaSpa, arXiv 2502.21079"
    cost: ClassVar[str] = "first search 1.5 of a dense call, later 0.5 + density; reuse: density"
    memory: ClassVar[str] = "mask bits B H N^2 / 8 and log-sum-exp 4 B H S bytes a layer and branch"
    published: ClassVar[dict[str, dict]] = {
        model: {"density": 0.2, "search_at": (0.2, 0.6), "order": "raster", "own_block": False}
        for model in ("HunyuanVideo", "CogVideoX 1.5")
    }
    uses_lse: ClassVar[bool] = True
    uneven_heads: ClassVar[bool] = True
    search_cost: ClassVar[float] = 0.5

    def __post_init__(self):
        super().__post_init__()
        flag("head_adaptive", self.head_adaptive)
        if not is_number(self.recall_threshold) or not 0 <= self.recall_threshold <= 1:
            raise ValueError(
                f"recall_threshold is a share of mass, 0 to 1, got {self.recall_threshold!r}"
            )

    def find(self, search: Search) -> Found:
        mass, cost = self.score(search)
        forced = self.forced(search)
        if packs(mass) and search.shared is None:
            return self.find_packed(mass, forced, search.grid.tokens, cost)
        return self.find_in_torch(mass, forced, cost, search)

    def find_in_torch(
        self, mass: Tensor, forced: Tensor, cost: float, search: Search | None = None
    ) -> Found:
        """`search` tells where the heads are that are not in `mass`."""
        density = mass.new_full(mass.shape[:2], self.density)
        mask = self._select(mass, density, forced)
        if self.head_adaptive and self.density <= MAX_ADAPTIVE_DENSITY:
            recall = kept_share(mass, mask)
            if search is None:
                density = self.head_densities(recall)
            else:
                recall = search.of_all_heads(recall)
                density = self.head_densities(recall)[:, search.own_heads]
            mask = self._select(mass, density, forced)
        return Found(mask, kept_share(mass, mask).mean(0), cost)

    def find_packed(self, mass: Tensor, forced: Tensor, tokens: int, cost: float) -> Found:
        """The same in a few launches, without the bool mask."""
        density = torch.tensor([self.density])
        levels = torch.cat([density * 0.5, density, density * TOP_LEVEL])
        low, usual, high = blocks_of(levels, mass.shape[-1]).tolist()
        adaptive = self.head_adaptive and self.density <= MAX_ADAPTIVE_DENSITY
        budgets = (low, usual, high, self.recall_threshold) if adaptive else None
        kept = torch.full(mass.shape[:2], usual, dtype=torch.int32, device=mass.device)
        return Found(*pack_rows(mass, kept, forced, tokens, self.block_size, budgets), cost)

    def score(self, search: Search) -> Scores:
        return exact_mass(search, self.block_size, self.engine)

    def _select(self, mass: Tensor, density: Tensor, forced: Tensor) -> Tensor:
        blocks = mass.shape[-1]
        most = most_blocks(TOP_LEVEL * self.density, blocks)
        return top_k_rows(mass, blocks_of(density, blocks), forced, most)

    def head_densities(self, recall: Tensor) -> Tensor:
        """Half the density for the best heads, 1.5 times for as many of the worst, (B, H)."""
        heads = recall.shape[1]
        levels = (recall > self.recall_threshold).sum(1, keepdim=True).clamp(max=heads // 2)
        rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 keeps most
        density = torch.full_like(recall, self.density)
        density = torch.where(rank < levels, density * 0.5, density)
        return torch.where(rank >= heads - levels, density * TOP_LEVEL, density)
