"""A selection rule of one's own: block means say what matters, and near blocks count more.

dit-sparse compare --method samples/own_rule.py:density=0.3 --method draftattention
"""

from dataclasses import dataclass

import torch

from dit_sparse.config import SparseConfig
from dit_sparse.patterns.score import nearness, pooled_map
from dit_sparse.patterns.search import Found, Search
from dit_sparse.patterns.select import blocks_of, top_k_rows


@dataclass(frozen=True)
class NearMeans(SparseConfig):
    """Softmax of block means, less for blocks that are far, top-k in every row.

    Args:
        reach: distance in tokens at which a score counts 1 / e.
    """

    reach: float = 16.0

    def find(self, search: Search) -> Found:
        means, cost = pooled_map(search, self.block_size)  # (B, H, N, N)
        near = nearness(search.grid, self.order, self.block_size).to(means.device)
        scores = means * (near / self.reach).exp()
        density = torch.full_like(scores[..., 0, 0], self.density)  # (B, H)
        kept = blocks_of(density, scores.shape[-1])
        return Found(top_k_rows(scores, kept, self.forced(search)), cost=cost)
