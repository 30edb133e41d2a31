"""SparseD: one search after the first dense steps, for ever, in each part by itself (2509.24014).

From summaries of the paper and its code, for diffusion language models: 20% of the steps are dense,
then the exact map is summed into blocks once, each row keeps its best 30% among the keys of the
prompt and, apart from that, among those that are generated, and the mask serves all later steps.
Departures, and where the paper is silent:

- Parts are text, frames that are given, and frames that are generated. Text and given frames are
  kept whole, and so is a row's own block, which counts in its part.
- Blocks of 64: theirs have 128 tokens in long sequences, with 30% of them kept, and 32 in short
  ones, with 50%.
- The code divides logits by the wrong number in one of its models, and keeps a block more than
  asked; neither is followed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import SparseConfig
from .score import exact_mass
from .search import Found, Search
from .select import blocks_of, kept_share, quota_rows, segments_of


@dataclass(frozen=True)
class SparseD(SparseConfig):
    """Exact block mass searched once; the best of every row in text and video each."""

    density: float = 0.3
    search_at: tuple[float, ...] = (0.2,)

    paper: ClassVar[str] = "SparseD, arXiv 2509.24014"
    cost: ClassVar[str] = (
        "the search 1.5 of a dense call, a later one 0.5 + density; reuse: density"
    )
    memory: ClassVar[str] = "mask bits B H N^2 / 8 and log-sum-exp 4 B H S bytes a layer and branch"
    published: ClassVar[dict[str, dict]] = {
        model: {"order": "raster", "own_block": False, "block_size": 128}
        for model in ("LLaDA", "Dream")
    }
    uses_lse: ClassVar[bool] = True
    search_cost: ClassVar[float] = 0.5

    def find(self, search: Search) -> Found:
        mass, cost = exact_mass(search, self.block_size, self.engine)
        segments = segments_of(search.grid, self.block_size, mass.device)
        counts = torch.bincount(segments, minlength=3)
        quota = torch.stack(
            [blocks_of(torch.tensor(self.density), int(n)) for n in counts.clamp_min(1)]
        )
        kept = quota.to(mass.device).expand(*mass.shape[:2], -1)
        mask = quota_rows(mass, kept, segments, self.forced(search))
        return Found(mask, kept_share(mass, mask).mean(0), cost)
