"""AdaSpa's rule on sampled rows: what a search costs when it needs no log-sum-exp.

Not of the paper: 8 query rows of each 64 stand for their block. They find their log-sum-exp
themselves, so that no step has to run dense for a search and none is kept between steps; an eighth
of the rows counts as 0.125 of dense attention where the exact mass costs 0.5.
Everything else is AdaSpa (arXiv 2502.21079, `adaspa.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

from .adaspa import AdaSpa
from .score import Scores, sampled_rows
from .search import Search


@dataclass(frozen=True)
class AdaSpaSampled(AdaSpa):
    """AdaSpa with block mass from one query row in eight: cheap searches, sparse at once."""

    paper: ClassVar[str] = "ours; the rule of AdaSpa, arXiv 2502.21079"
    cost: ClassVar[str] = "search 0.125 + density; reuse: density"
    memory: ClassVar[str] = "mask bits B H N^2 / 8 bytes a layer and branch"
    published: ClassVar[dict[str, dict]] = {}
    uses_lse: ClassVar[bool] = False
    search_cost: ClassVar[float] = 0.125

    def score(self, search: Search) -> Scores:
        return sampled_rows(search, self.block_size, engine=self.engine)
