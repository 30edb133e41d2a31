"""Sol-Attn: blocks whose mean logit is far below the row's best are told by their means.

From a summary of the method (the paper itself was not found): while the online softmax walks the
key blocks, a block whose estimated logit, query block against block mean, lies more than a
threshold below the running maximum is not computed but represented by its mean key and value,
weighed by its length; Morton order; text exact.
Departures, and where it is silent:

- The maximum is that of the row's estimates, found before the walk, and not the running one: the
  result does not depend on the order of the walk, and the rule is a block mask and a tail.
- `density` is the most that a row keeps, the best blocks first; the rule alone has no bound.
- The threshold is not known. Ours, in nats, is so high that the density bounds most rows: at 3,
  outputs on the small Wan were further from dense than those of other thresholds of equal cost.
- Hilbert order, which is as compact as Morton's; own and conditioning blocks stay.
- The mask is made anew at every step, as the rule is part of the walk.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import SparseConfig, positive
from .score import pooled_logits
from .search import Found, Search
from .select import blocks_of, top_k_rows


@dataclass(frozen=True)
class SolAttn(SparseConfig):
    """Blocks near the best block mean of their row, the others told by their means, at every step.

    Args:
        density: the most that a row keeps, as a share of its blocks.
        threshold: how far below the row's best a block may lie and still be computed, in nats.
    """

    density: float = 0.5
    search_at: tuple[float, ...] = (0.2,)
    every_step: bool = True
    threshold: float = 6.0

    paper: ClassVar[str] = "Sol-Attn (from a summary; the paper was not found)"
    cost: ClassVar[str] = "density + 1 / block size (the tail) + N^2 / (2 S^2)"
    tail: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        positive("threshold", self.threshold)

    def find(self, search: Search) -> Found:
        scores, cost = pooled_logits(search, self.block_size)
        forced = self.forced(search)
        most = blocks_of(torch.full_like(scores[..., 0, 0], self.density), scores.shape[-1])
        near = scores >= scores.amax(-1, keepdim=True) - self.threshold
        return Found(top_k_rows(scores, most, forced) & near | forced, None, cost)
