"""MISA: a cheap ranking says where to look, an exact one is made only there.

From the abstract of "MISA: Mixture of Indexer Sparse Attention": block statistics route each query
to a few of the heads of an indexer, only these score tokens, and a wider set of candidates can be
ranked again exactly. The paper itself was not read.
Departures, and where that is silent:

- Our models have no trained indexer whose heads could be routed. What is routed are regions: the
  best `looked_at` of them by their means, as in BiFormer; inside, one query row in eight is exact.
- The best blocks of each row by that mass are kept.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..config import SparseConfig, part, whole
from .search import Found, Search
from .select import top_density_rows
from .tree import best_regions, mass_inside


@dataclass(frozen=True)
class MISA(SparseConfig):
    """Regions by their means, then sampled exact mass inside the best of them, per-row top-k.

    Args:
        looked_at: share of the regions in which exact mass is computed; the density at least.
        region: blocks in a region.
    """

    looked_at: float = 0.5
    region: int = 4

    paper: ClassVar[str] = "MISA (from its abstract; the paper was not read)"
    cost: ClassVar[str] = "density; a search + looked_at / 16"

    def __post_init__(self):
        super().__post_init__()
        part("looked_at", self.looked_at)
        whole("region", self.region, 1)

    def find(self, search: Search) -> Found:
        share, size = max(self.looked_at, self.density), self.block_size
        regions, ranking = best_regions(search, size, self.region, share)
        mass, cost = mass_inside(search, size, regions, self.region, every=8)
        forced = self.forced(search)
        found = top_density_rows(mass, self.density, forced) & regions
        return Found(found | forced, None, ranking + cost)
