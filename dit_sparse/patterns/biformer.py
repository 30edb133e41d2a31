"""BiFormer: regions pick regions, and attend to all that is in them (arXiv 2303.08810).

From the paper's abstract and a summary: queries and keys are mean-pooled over regions, each query
region keeps the key regions of the largest products, and its tokens attend to all tokens of these.
The model is trained with it. Departures, and where that is silent:

- Nothing is trained. A region is `region` blocks of the order; the paper's are squares of an image.
- How many regions are kept follows from the density.
- Text, own and conditioning blocks are kept and come on top.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..config import SparseConfig, whole
from .search import Found, Search
from .tree import best_regions


@dataclass(frozen=True)
class BiFormer(SparseConfig):
    """Regions of blocks, ranked by the products of their means, at every step.

    Args:
        region: blocks in a region.
    """

    search_at: tuple[float, ...] = (0.2,)
    every_step: bool = True
    region: int = 4

    paper: ClassVar[str] = "BiFormer, arXiv 2303.08810 (untrained; from a summary)"
    cost: ClassVar[str] = "density; a search + N^2 / (2 region^2 S^2)"

    def __post_init__(self):
        super().__post_init__()
        whole("region", self.region, 1)

    def find(self, search: Search) -> Found:
        mask, cost = best_regions(search, self.block_size, self.region, self.density)
        return Found(mask | self.forced(search), None, cost)
