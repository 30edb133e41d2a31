"""LLSA: block means from coarse to fine, and means of what is left out (arXiv 2512.16615).

From summaries of the paper: queries, keys and values are mean-pooled again and again; at the
coarsest level each query keeps its best K chunks, at the next only their parts are ranked, down to
blocks; attention is over these and over the means of the coarser levels, each with the weight of
its tokens. The model is trained with it.
Departures, and where the paper is silent:

- Nothing is trained.
- Means are of the blocks that a row does not attend to, of one level, and not of all blocks and
  levels: what is attended to already would be counted twice (`dit_sparse/tail.py`).
- A level has `fan_out` parts, 4 by default for our larger blocks; the paper has 16 tokens of 16.
- Rows are the means of their own block at every level; the paper's are those of the level.
- K follows from the density. Text keys, own and conditioning blocks are kept and count towards it;
  rows of text choose as the others do, since means tell them the rest.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import SparseConfig, whole
from .search import Found, Search
from .select import most_kept, top_density_rows
from .tree import tree_logits


@dataclass(frozen=True)
class LLSA(SparseConfig):
    """Block means searched from coarse to fine, at every step; means of the other blocks.

    Args:
        fan_out: parts of a chunk at each level.
    """

    density: float = 0.1
    search_at: tuple[float, ...] = (0.2,)
    every_step: bool = True
    fan_out: int = 4

    paper: ClassVar[str] = "LLSA, arXiv 2512.16615 (untrained)"
    cost: ClassVar[str] = "density + 1 / block size (the tail); a search + N^2 / S^2 at most"
    tail: ClassVar[bool] = True
    text_queries: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        whole("fan_out", self.fan_out, 2)

    def find(self, search: Search) -> Found:
        forced = self.forced(search)
        most = most_kept(self.density, forced)
        scores, cost = tree_logits(search, self.block_size, most, self.fan_out)
        found = top_density_rows(scores, self.density, forced) & (scores > -torch.inf)
        return Found(found | forced, None, cost)
