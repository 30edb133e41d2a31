"""XAttention: sums of q.k along antidiagonals pick the blocks (arXiv 2503.16428).

From a summary of the paper and the authors' README: the logits of a block are summed along the
antidiagonals of stride x stride squares, the softmax of these sums over a row is summed into
blocks, and each row keeps the fewest blocks that hold `share` of it; on HunyuanVideo stride 8,
threshold 0.9, and 5 dense steps of 50.
A re-implementation of the selection on our kernels. Departures, and where the paper is silent:

- `density` is the most that a row keeps; the rule alone has no bound.
- One share for all heads; the paper can also search one for each.
- Text, own and conditioning blocks are kept and count towards the share.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..config import CAPS, SparseConfig, part
from .score import antidiagonal
from .search import Found, Search
from .select import most_kept, top_p_rows


@dataclass(frozen=True)
class XAttention(SparseConfig):
    """Antidiagonal sums of q.k, the fewest blocks of each row that hold a share, at every step.

    Args:
        density: the most that a row keeps, as a share of its blocks.
        share: of a row's softmaxed sums, that its blocks hold.
        stride: of the antidiagonals, in tokens.
    """

    density: float = 0.5
    search_at: tuple[float, ...] = (0.1,)
    every_step: bool = True
    order: str = "raster"
    block_size: int = 128
    share: float = 0.9
    stride: int = 8

    paper: ClassVar[str] = "XAttention, arXiv 2503.16428 (re-implemented)"
    cost: ClassVar[str] = "density at most; a search + 1 / (2 stride)"
    published: ClassVar[dict[str, dict]] = {"HunyuanVideo": {"density": 0.99, "own_block": False}}
    swept: ClassVar[tuple[dict, ...]] = tuple({"density": cap} for cap in CAPS)

    def __post_init__(self):
        super().__post_init__()
        part("share", self.share)
        if self.stride not in (4, 8, 16, 32):
            raise ValueError(f"stride must be 4, 8, 16 or 32, got {self.stride!r}")

    def find(self, search: Search) -> Found:
        scores, cost = antidiagonal(search, self.block_size, self.stride)
        most = most_kept(self.density, scores)
        return Found(top_p_rows(scores, self.share, self.forced(search), cap=most), None, cost)
