"""HiP: halves of chunks of keys, the better ones kept, down to blocks (arXiv 2406.09827).

From the paper: for a block of queries the keys are cut into k equal chunks; each chunk is halved, a
half is judged by one key in it, the best k halves are kept, and so on until chunks are blocks: the
search costs S log S. The mask may be kept for some steps.
Read from a summary of the paper. Departures, and where that is silent:

- The query that a half is judged by is the mean of its block; the paper takes the best of several.
- The key is that of the middle token. Along a Hilbert curve a chunk is a compact piece of the
  video.
- Chunks are halves of powers of two of blocks, not equal parts of the sequence.
- Bidirectional, nothing is cut off by causality; no keys are moved out of the GPU's memory.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import SparseConfig
from .search import Found, Search
from .select import most_kept, top_density_rows
from .tree import tree_logits


@dataclass(frozen=True)
class HiP(SparseConfig):
    """A binary tree of chunks, each judged by one key, searched from coarse to fine."""

    paper: ClassVar[str] = "HiP Attention, arXiv 2406.09827 (from a summary)"
    cost: ClassVar[str] = "density; a search + N^2 / S^2 at most"

    def find(self, search: Search) -> Found:
        forced = self.forced(search)
        scores, cost = tree_logits(
            search, self.block_size, most_kept(self.density, forced), fan_out=2, middles=True
        )
        found = top_density_rows(scores, self.density, forced) & (scores > -torch.inf)
        return Found(found | forced, None, cost)
