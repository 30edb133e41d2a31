"""DFSAttn: means of 16 tokens along a Hilbert curve, fewer blocks with every refresh.

From a summary of the method (the paper itself was not read): Hilbert order; means of 16
tokens, the softmax of their products summed into blocks of 128; per-row top-k; 12 of 50 steps
dense, then a refresh every 12 steps at keep ratios 0.3, 0.2 and 0.1.
Departures, and where it is silent:

- `density` is that of the last search; earlier ones keep one and two times as much more, so that
  0.1 is the published 0.3, 0.2, 0.1. With another number of searches they count down likewise.
- Text, own and conditioning blocks are always kept and count towards the density.
- The first frame, or the conditioning frames, have a curve of their own, as in every order here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import DENSITIES, SparseConfig
from ..schedule import search_steps
from .score import pooled_sums
from .search import Found, Search
from .select import blocks_of, top_k_rows

POOL = 16


@dataclass(frozen=True)
class DFSAttn(SparseConfig):
    """Means of 16 tokens summed into blocks, per-row top-k, fewer blocks with every refresh."""

    density: float = 0.1
    search_at: tuple[float, ...] = (0.24, 0.48, 0.72)
    block_size: int = 128

    paper: ClassVar[str] = "DFSAttn (from a summary; the paper was not read)"
    cost: ClassVar[str] = "3, 2, 1 times density; a search + 1 / 512"
    # the videos of benchmarks are of few tokens: 34 blocks of 128
    swept: ClassVar[tuple[dict, ...]] = tuple(
        {"density": density, "block_size": 64} for density in DENSITIES
    )

    def find(self, search: Search) -> Found:
        scores, cost = pooled_sums(search, self.block_size, POOL)
        density = torch.full_like(scores[..., 0, 0], self.density_at(search.step, search.num_steps))
        kept = blocks_of(density, scores.shape[-1])
        return Found(top_k_rows(scores, kept, self.forced(search)), None, cost)

    def density_at(self, step: int, num_steps: int) -> float:
        later = sum(at > step for at in search_steps(self.search_at, num_steps))
        return min(self.density * (later + 1), 1.0)
